# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["whisperx==3.8.6"]
# ///
"""Worker program: transcribes recordings with WhisperX, in an environment of its own.

WhisperX (Bain et al., https://arxiv.org/abs/2303.00747) pins packages that can't be installed with transformers 5, so
`transcriber.py` runs this file with `uv run --script`, which reads the header above and creates the environment at the
first start. Any python that has whisperx can run it by hand:

    uv run --script processing/speech/worker.py --model small
    {"op": "transcribe", "id": 1, "path": "question.wav"}

Protocol: one JSON object per line on standard input and output. The program writes `{"event": "started"}` at once and
`{"event": "ready", ...}` when the model is loaded, or `{"event": "fatal", "kind", "message", "details"}`. A request
has an `id` and an `op`, `transcribe` or `ping`. Its reply has the same `id`, `ok`, and either the result or
`{"error": {"kind", "message"}}`. The program ends at the end of standard input. Output of the libraries goes to
standard error.

Only the standard library is needed until the model is loaded. Of this package only `transcriber.py` imports this file,
and only if whisperx can be imported.
"""

import argparse
import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


SAMPLING_RATE = 16_000
# Containers of recordings. Playlists are excluded, because they make FFmpeg open other files and URLs.
AUDIO_FORMATS = (
    "aac,ac3,aiff,amr,asf,au,avi,caf,flac,flv,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mp3,mpeg,mpegts,ogg,opus,rm,tta,w64,"
    "wav,wv"
)
NETWORK_ERRORS = (
    "ConnectError",
    "ConnectionError",
    "ConnectTimeout",
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "ReadTimeout",
)
# pyannote would report the length of each file, onnxruntime its use, huggingface_hub the downloads.
NO_TELEMETRY = {
    "PYANNOTE_METRICS_ENABLED": "false",
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}


class WorkerError(Exception):
    """
    The start or a request failed.

    Args:
        kind (`str`): the kind of error, for programs, as in `TranscriptionError`.
        message (`str`): the problem and the remedy, for users.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Recogniser:
    """
    WhisperX with a loaded model.

    Speech is detected with the Silero network that is part of faster-whisper. WhisperX's own options unpickle a
    checkpoint (pyannote) or download code (its `silero`). Words are not aligned, because only the text is needed.

    Args:
        model (`str`): a size (`small`), or the Hub id or directory of a CTranslate2 Whisper checkpoint.
        language (`str`, *optional*): code of the spoken language; by default detected in each recording.
        device (`str`, *optional*, defaults to `"auto"`): `cpu`, `cuda`, or `auto`.
        compute_type (`str`, *optional*, defaults to `"default"`): `float32`, `float16`, `int8` ...
        beam_size (`int`, *optional*, defaults to 5): hypotheses kept while decoding.
        threads (`int`, *optional*, defaults to 4): CPU threads.
        max_seconds (`float`, *optional*, defaults to 300): longer recordings raise.

    Raises:
        WorkerError: if WhisperX is not installed or the model can't be loaded.
    """

    def __init__(
        self,
        model: str,
        *,
        language: str | None = None,
        device: str = "auto",
        compute_type: str = "default",
        beam_size: int = 5,
        threads: int = 4,
        max_seconds: float = 300.0,
    ):
        os.environ.update(NO_TELEMETRY)
        try:
            import ctranslate2
            import whisperx
            from faster_whisper.vad import get_speech_timestamps
            from whisperx.diarize import Segment
            from whisperx.vads import Vad
        except ImportError as error:
            raise WorkerError("environment", f"WhisperX can't be imported by {sys.executable}: {error}") from error

        def speech_in(samples: Any, longest: float) -> list[tuple[float, float]]:
            found = get_speech_timestamps(
                samples, min_silence_duration_ms=500, speech_pad_ms=200, max_speech_duration_s=longest
            )
            return [(speech["start"] / SAMPLING_RATE, speech["end"] / SAMPLING_RATE) for speech in found]

        class SpeechDetector(Vad):
            """Gives WhisperX the segments of speech, which `Vad` merges to up to 30 s."""

            def __call__(self, audio, **kwargs):
                return [Segment(start, end, "UNKNOWN") for start, end in speech_in(audio["waveform"], 30.0)]

            @staticmethod
            def preprocess_audio(audio):
                return audio

        if device == "auto":
            device = "cuda" if ctranslate2.get_cuda_device_count() else "cpu"
        self.about = {"model": model, "device": device, "whisperx": _version("whisperx")}
        self.language, self.max_seconds, self._speech_in = language, max_seconds, speech_in
        try:
            self.pipeline = whisperx.load_model(
                model,
                device,
                compute_type=compute_type,
                language=language,
                asr_options={"beam_size": beam_size},
                vad_model=SpeechDetector(0.5),
                threads=threads,
            )
        except Exception as error:
            raise _load_error(model, error) from error
        # Exclude the loaded objects, which stay alive, from garbage collection.
        gc.collect()
        gc.freeze()

    def transcribe(self, path: str) -> dict[str, Any]:
        """
        Transcribe a recording.

        Args:
            path (`str`): a local audio file, or a video file with sound.

        Returns:
            `dict[str, Any]`: `text` (`""` without speech), `language` (`None` without speech) and `seconds`.

        Raises:
            WorkerError: if the file can't be used.
        """
        samples = decode_audio(path, self.max_seconds)
        result: dict[str, Any] = {"text": "", "language": None, "seconds": len(samples) / SAMPLING_RATE}
        if self._speech_in(samples, 30.0):
            # Without `task`, a recording in a second language fails with the tokenizer of the first language.
            transcription = self.pipeline.transcribe(samples, batch_size=1, language=self.language, task="transcribe")
            result["text"] = " ".join(
                " ".join(segment["text"].split()) for segment in transcription["segments"]
            ).strip()
            result["language"] = transcription["language"] if result["text"] else None
        return result

    def answer(self, request: Any) -> dict[str, Any]:
        """The reply to a request. Errors, also of malformed requests, become replies."""
        reply: dict[str, Any] = {"id": request.get("id") if isinstance(request, dict) else None}
        try:
            return {**reply, "ok": True, **self._perform(request)}
        except WorkerError as failure:
            error = {"kind": failure.kind, "message": str(failure)}
        except Exception as failure:  # an error must not end the worker
            traceback.print_exc()
            error = {"kind": "internal", "message": f"The transcription failed ({type(failure).__name__}: {failure})."}
        return {**reply, "ok": False, "error": error}

    def _perform(self, request: Any) -> dict[str, Any]:
        if not isinstance(request, dict):
            raise WorkerError("request", "Not a JSON object.")
        if request.get("op") == "ping":
            return {}
        if request.get("op") != "transcribe":
            raise WorkerError("request", f"op={request.get('op')!r} must be 'transcribe' or 'ping'.")
        if not isinstance(request.get("path"), str):
            raise WorkerError("request", f"path={request.get('path')!r} must be the path of a file.")
        return self.transcribe(request["path"])


def decode_audio(path: str, max_seconds: float) -> Any:
    """
    Decode the sound of a file with the FFmpeg libraries in PyAV. No ffmpeg program is needed.

    Args:
        path (`str`): the file.
        max_seconds (`float`): longer recordings raise, before they are decoded if the header shows it.

    Returns:
        `numpy.ndarray`: float32 samples `(num_samples,)` at 16 kHz, channels mixed.

    Raises:
        WorkerError: of kind `audio` (missing, unreadable, without sound, unknown codec) or `too_long`.
    """
    import av
    import numpy as np

    name = Path(path).name
    too_long = WorkerError(
        "too_long",
        f"{name} is longer than {max_seconds:g} seconds, the limit. Cut out the question.",
    )
    pieces, good, bad, num_samples = [], 0, 0, 0
    try:
        # Opened by python, so that FFmpeg does not take the name for a URL, and in known formats only.
        with (
            open(path, "rb") as file,
            av.open(file, options={"format_whitelist": AUDIO_FORMATS}, metadata_errors="ignore") as container,
        ):
            if not container.streams.audio:
                raise WorkerError("audio", f"{name} has no sound.")
            # The duration in the header may be an estimate, so only twice the limit raises here.
            if (container.duration or 0) / 1e6 > 2.0 * max_seconds:
                raise too_long
            resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLING_RATE)
            for packet in container.demux(container.streams.audio[0]):
                try:
                    frames = packet.decode()
                    good += 1
                except av.error.InvalidDataError:  # damaged packets are skipped unless most are
                    bad += 1
                    continue
                resampled = [piece for frame in frames for piece in resampler.resample(frame)]
                pieces += [piece.to_ndarray().reshape(-1) for piece in resampled]
                num_samples += sum(piece.samples for piece in resampled)
                if num_samples > max_seconds * SAMPLING_RATE:
                    raise too_long
            pieces += [frame.to_ndarray().reshape(-1) for frame in resampler.resample(None)]
    except (OSError, ValueError, av.error.FFmpegError) as error:
        raise _decode_error(name, error) from error
    if bad > good:
        raise WorkerError("audio", f"{name} is damaged: {bad} of its {bad + good} packets can't be decoded.")
    samples = np.concatenate([np.zeros(0, np.float32), *pieces])
    return np.nan_to_num(samples, nan=0.0, posinf=1.0, neginf=-1.0).clip(-1.0, 1.0)


def _decode_error(name: str, error: Exception) -> WorkerError:
    reason = type(error).__name__
    if isinstance(error, FileNotFoundError):
        return WorkerError("audio", f"{name} does not exist.")
    if isinstance(error, PermissionError):
        return WorkerError("audio", f"{name} can't be read: permission denied.")
    if reason in ("DecoderNotFoundError", "PatchWelcomeError", "UnknownCodecError"):
        return WorkerError(
            "audio", f"{name} is in a codec that can't be decoded. Convert it to WAV, MP3, M4A, OGG or WebM."
        )
    return WorkerError(
        "audio", f"{name} is not a readable audio file ({reason}). WAV, FLAC, MP3, M4A, OGG and WebM can be read."
    )


def _load_error(model: str, error: Exception) -> WorkerError:
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and len(chain) < 10:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    if not Path(model).is_dir() and any(type(item).__name__ in NETWORK_ERRORS for item in chain):
        return WorkerError(
            "network",
            f"The speech model {model!r} is not on this machine and could not be downloaded. Connect to the network "
            "once, or pass the directory of a CTranslate2 Whisper checkpoint.",
        )
    return WorkerError("model", f"The speech model {model!r} could not be loaded ({type(error).__name__}: {error}).")


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def main() -> None:
    """Load the model and answer requests until standard input ends."""
    # Duplicate and redirect the streams before the imports: libraries write to standard output, and child processes
    # must not read the requests.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    sys.stdin, sys.stdout = open(os.devnull), sys.stderr  # noqa: SIM115
    if sys.path and sys.path[0] == str(Path(__file__).resolve().parent):
        del sys.path[0]  # files of this directory must not shadow installed packages

    def send(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message).encode() + b"\n")

    parser = argparse.ArgumentParser(description="Transcribes recordings requested on standard input with WhisperX.")
    parser.add_argument("--model", default="small")
    parser.add_argument("--language")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compute_type", default="default")
    parser.add_argument("--beam_size", type=int, default=5)
    parser.add_argument("--threads", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--max_seconds", type=float, default=300.0)
    options = vars(parser.parse_args())
    send({"event": "started", "pid": os.getpid()})
    try:
        recogniser = Recogniser(options.pop("model"), **options)
    except WorkerError as error:
        send({"event": "fatal", "kind": error.kind, "message": str(error), "details": traceback.format_exc()})
        sys.exit(1)
    send({"event": "ready", **recogniser.about})
    for line in requests:
        try:
            request = json.loads(line)
        except ValueError:
            request = None
        send(recogniser.answer(request))


if __name__ == "__main__":
    main()
