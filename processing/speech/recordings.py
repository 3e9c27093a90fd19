"""What goes into a transcription and what comes out: samples as a file, the speech model's name, text or an error."""

import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np


MODEL_FILES = ("model.bin", "config.json", "tokenizer.json")
VOCABULARY_FILES = ("vocabulary.json", "vocabulary.txt")


class TranscriptionError(RuntimeError):
    """
    A recording could not be transcribed. Its text is for people: what happened and what to do.

    Args:
        message (`str`): the text; it names files by their last part only.
        kind (`str`): one word for programs: `audio` (the file's fault), `too_long`, `environment` (nothing to run
            WhisperX with), `network`, `model`, `timeout`, `crash`, `closed` or `internal`.
        details (`str`, *optional*): the last lines the worker logged, for the log and not for a visitor.
    """

    def __init__(self, message: str, kind: str, details: str = ""):
        super().__init__(message)
        self.kind = kind
        self.details = details


@dataclass(frozen=True)
class Transcript:
    """
    What was said in a recording.

    Args:
        text (`str`): the words; empty if no speech was heard.
        language (`str`, *optional*): the language's code; `None` without speech.
        seconds (`float`): length of the recording.
        model (`str`): the speech model.
        elapsed (`float`): seconds the transcription took, without waiting for the model to load.
    """

    text: str
    language: str | None
    seconds: float
    model: str
    elapsed: float


def speech_model(model: str | Path) -> str:
    """
    The name that WhisperX knows a speech model by.

    Args:
        model (`str` or `Path`): a size, OpenAI's Hub id of one, another Hub id, or a folder.

    Returns:
        `str`: `openai/whisper-small` becomes `small`; a folder, its absolute path; other names stay.

    Raises:
        ValueError: if a folder lacks files of a CTranslate2 checkpoint (names them), or does not exist.
    """
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
            "It is a transformers checkpoint: convert it with `ct2-transformers-converter --model FOLDER --output_dir "
            "NEW --copy_files tokenizer.json preprocessor_config.json`."
            if is_transformers
            else "Name the folder of a Whisper checkpoint in CTranslate2's format, or a size such as 'small'."
        )
        raise ValueError(f"model={name!r} lacks {', '.join(missing)}. {remedy}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"model={name!r} is no folder. Name one, a size such as 'small', or a Hub id.")
    openai = re.fullmatch(r"(?:openai/)?whisper-(.+)", name)
    return openai.group(1) if openai else name


def wav_bytes(samples: np.ndarray, sampling_rate: int) -> bytes:
    """
    A WAV file of float32 samples.

    Args:
        samples (`numpy.ndarray`): `(num_samples,)` or `(num_samples, num_channels)`, floats or integers.
        sampling_rate (`int`): in Hz.

    Raises:
        TranscriptionError: if the array holds no samples of sound, or the rate is not positive.
    """
    if samples.ndim not in (1, 2) or samples.dtype.kind not in "fiu" or (samples.ndim == 2 and samples.shape[1] > 16):
        raise TranscriptionError(
            f"An array of shape {samples.shape} and type {samples.dtype} is no recording: (num_samples,) or "
            "(num_samples, num_channels) of numbers is.",
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
