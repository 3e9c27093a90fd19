"""Values of the transcriber: transcripts, errors, speech model names and WAV files from samples."""

import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np


MODEL_FILES = ("model.bin", "config.json", "tokenizer.json")
VOCABULARY_FILES = ("vocabulary.json", "vocabulary.txt")


class TranscriptionError(RuntimeError):
    """
    A recording could not be transcribed.

    Args:
        message (`str`): the problem and the remedy, for users; contains file names without directories.
        kind (`str`): the kind of error, for programs: `audio` (a bad file), `too_long`, `environment` (WhisperX can't
            be run), `network`, `model`, `timeout`, `crash`, `closed` or `internal`.
        details (`str`, *optional*): the last lines that the worker logged; for the log, not for users.
    """

    def __init__(self, message: str, kind: str, details: str = ""):
        super().__init__(message)
        self.kind = kind
        self.details = details


@dataclass(frozen=True)
class Transcript:
    """
    The text of a recording.

    Args:
        text (`str`): the words; empty if the recording has no speech.
        language (`str`, *optional*): code of the language; `None` without speech.
        seconds (`float`): length of the recording.
        model (`str`): the speech model.
        elapsed (`float`): seconds that the transcription took, without loading the model.
    """

    text: str
    language: str | None
    seconds: float
    model: str
    elapsed: float


def speech_model(model: str | Path) -> str:
    """
    WhisperX's name of a speech model.

    Args:
        model (`str` or `Path`): a size, OpenAI's Hub id of a size, another Hub id, or a directory.

    Returns:
        `str`: `openai/whisper-small` becomes `small`; a directory becomes its absolute path; other names are
            unchanged.

    Raises:
        ValueError: if a directory lacks files of a CTranslate2 checkpoint (the message lists them), or does not exist.
    """
    from jnana.processing.data.paths import names_local_path  # `processing.data` imports this module

    name = str(model)
    path = Path(name).expanduser()
    if path.is_dir():
        missing = [file for file in MODEL_FILES if not (path / file).is_file()]
        if not any((path / file).is_file() for file in VOCABULARY_FILES):
            missing.append(VOCABULARY_FILES[0])
        if not missing:
            return str(path.resolve())
        is_transformers = any(path.glob("*.safetensors")) or (path / "pytorch_model.bin").is_file()
        remedy = (
            "It is a transformers checkpoint: convert it with `ct2-transformers-converter --model DIRECTORY "
            "--output_dir NEW --copy_files tokenizer.json preprocessor_config.json`."
            if is_transformers
            else "Pass the directory of a Whisper checkpoint in CTranslate2's format, or a model size such as 'small'."
        )
        raise ValueError(f"model={name!r} lacks {', '.join(missing)}. {remedy}")
    if names_local_path(name):
        raise ValueError(
            f"model={name!r} is not a directory; pass a directory, a model size such as 'small', or a Hub id."
        )
    openai = re.fullmatch(r"(?:openai/)?whisper-(.+)", name)
    return openai.group(1) if openai else name


def wav_bytes(samples: np.ndarray, sampling_rate: int) -> bytes:
    """
    Samples as the bytes of a float32 WAV file.

    Args:
        samples (`numpy.ndarray`): `(num_samples,)` or `(num_samples, num_channels)`, floats or integers.
        sampling_rate (`int`): in Hz.

    Raises:
        TranscriptionError: if the array does not have the shape or type of a recording, or the rate is not positive.
    """
    if samples.ndim not in (1, 2) or samples.dtype.kind not in "fiu" or (samples.ndim == 2 and samples.shape[1] > 16):
        raise TranscriptionError(
            f"An array of shape {samples.shape} and type {samples.dtype} is not a recording; pass numbers of shape "
            "(num_samples,) or (num_samples, num_channels).",
            "audio",
        )
    if int(sampling_rate) < 1:
        raise TranscriptionError(f"sampling_rate={sampling_rate} must be at least 1 Hz.", "audio")
    values = samples.astype(np.float32)
    if samples.dtype.kind == "i":
        values /= -float(np.iinfo(samples.dtype).min)
    elif samples.dtype.kind == "u":
        middle = (np.iinfo(samples.dtype).max + 1) / 2
        values = (values - middle) / middle
    data = values.astype("<f4").tobytes()
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    header = struct.pack(
        *("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(data), b"WAVE", b"fmt ", 16, 3, channels, int(sampling_rate)),
        *(int(sampling_rate) * channels * 4, channels * 4, 32, b"data", len(data)),
    )
    return header + data
