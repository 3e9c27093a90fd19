"""`Transcriber`: turns recordings into text with WhisperX, which runs in a process of its own.

WhisperX can't be installed in one environment with transformers 5. It runs in a worker process (`worker.py`) with an
environment that `uv` creates at the first start. The worker loads the model once and answers requests, one JSON object
per line (`worker_process.py`). Nothing here imports torch, and no model or checkpoint imports this file.
"""

import importlib.util
import logging
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from .recordings import Transcript, TranscriptionError, speech_model, wav_bytes
from .worker_process import WorkerEnded, WorkerProcess, WorkerTimeout


logger = logging.getLogger(__name__)

WORKER_SCRIPT = Path(__file__).with_name("worker.py")
PYTHON_VARIABLE = "JNANA_WHISPERX_PYTHON"
MODEL_VARIABLE = "JNANA_WHISPERX_MODEL"

DEFAULT_MODEL = "small"
# Patterns in uv's error output, each with the kind and the message of our error
UV_ERRORS = {
    r"dns error|failed to lookup|network is unreachable|connect|timed? ?out|error sending request|failed to fetch"
    r"|network was disabled": (
        "network",
        "The speech recogniser is not installed yet and could not be downloaded. Connect to the network and try "
        f"again, or set {PYTHON_VARIABLE} to a python that has whisperx.",
    ),
    r"no space left": (
        "environment",
        "The speech recogniser could not be installed: the disk is full. It needs about 8 GB; set UV_CACHE_DIR "
        "to a directory with more room.",
    ),
    r"no interpreter found|no python": (
        "environment",
        "The speech recogniser could not be installed: uv finds no python from 3.10 to 3.13. Install one.",
    ),
}


class Transcriber:
    """
    Turns recordings into text with WhisperX, which is started once and keeps running.

    WhisperX is run by, in this order: the python given as `python` or by the environment variable
    `JNANA_WHISPERX_PYTHON`; the current process, if whisperx can be imported here; otherwise `uv`, which creates an
    environment at the first start (a download of about 4 GB). After a crash or a timeout, the next request starts the
    worker again. A worker process needs Linux or macOS.

    Threads may share a transcriber, which then answers one request after the other. Forked processes may not.

        with Transcriber() as transcriber:          # loads in the background
            question = transcriber.transcribe("question.wav").text

    Args:
        model (`str`, *optional*): a size (`small`, `large-v3-turbo` ...), OpenAI's name of a size
            (`openai/whisper-small`), or the Hub id or directory of a CTranslate2 Whisper checkpoint; by default the
            environment variable `JNANA_WHISPERX_MODEL`, or `small`.
        language (`str`, *optional*): code of the spoken language; by default detected in each recording.
        device (`str`, *optional*, defaults to `"auto"`): `cpu`, `cuda`, or `auto` (the GPU if there is one).
        compute_type (`str`, *optional*, defaults to `"default"`): `float32`, `float16`, `int8` ...; by default float16
            on a GPU and float32 on a CPU.
        beam_size (`int`, *optional*, defaults to 5): hypotheses kept while decoding.
        threads (`int`, *optional*): CPU threads; by default at most 4.
        max_seconds (`float`, *optional*, defaults to 300): longer recordings raise.
        start_timeout (`float`, *optional*, defaults to 1800): seconds until the worker must be ready, the first
            download included.
        request_timeout (`float`, *optional*, defaults to 120): seconds until the worker must reply.
        python (`str` or `Path`, *optional*): an interpreter that has whisperx.
        worker_script (`str` or `Path`, *optional*): another program with the protocol of `worker.py`.

    Raises:
        ValueError: if `model` is a directory that lacks files, or a path that does not exist.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        language: str | None = None,
        device: str = "auto",
        compute_type: str = "default",
        beam_size: int = 5,
        threads: int | None = None,
        max_seconds: float = 300.0,
        start_timeout: float = 1800.0,
        request_timeout: float = 120.0,
        python: str | Path | None = None,
        worker_script: str | Path = WORKER_SCRIPT,
    ):
        self.model = speech_model(model or os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL)
        self.options: dict[str, Any] = {
            "language": language,
            "device": device,
            "compute_type": compute_type,
            "beam_size": beam_size,
            "threads": threads or min(4, os.cpu_count() or 1),
            "max_seconds": max_seconds,
        }
        self.start_timeout, self.request_timeout = start_timeout, request_timeout
        self.python = python or os.environ.get(PYTHON_VARIABLE) or None
        self.worker_script = Path(worker_script)
        self._lock = threading.Lock()  # held while the worker is used
        self._worker: WorkerProcess | None = None
        self._recogniser: Any = None  # a `worker.Recogniser`, if whisperx runs in this process
        self._ready_message: dict[str, Any] = {}  # from the worker
        self._closed = False

    # ------------------------------------------------------------------ start and close

    def __enter__(self) -> "Transcriber":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def ready(self) -> bool:
        """Whether the model is loaded (`bool`)."""
        return self._recogniser is not None or (
            bool(self._ready_message) and self._worker is not None and self._worker.alive
        )

    def start(self, wait: bool = False) -> None:
        """
        Start the worker. The first `transcribe` also does so.

        Args:
            wait (`bool`, *optional*, defaults to `False`): return when the worker is ready. By default it starts in
                the background, errors are logged, and the next request tries again.

        Raises:
            TranscriptionError: with `wait`, if the worker can't be started.
        """
        self._closed = False
        if wait:
            with self._lock:
                self._ensure_started()
        else:
            threading.Thread(target=self._start_quietly, daemon=True, name="Transcriber.start").start()

    def close(self) -> None:
        """End the worker, also during a request. `start` reopens a closed transcriber."""
        self._closed = True
        worker = self._worker
        if worker is not None:
            if self._lock.acquire(blocking=False):  # no request is running: the worker may end by itself
                try:
                    worker.close()
                finally:
                    self._lock.release()
            else:
                worker.kill()
        self._worker, self._recogniser, self._ready_message = None, None, {}

    def _start_quietly(self) -> None:
        try:
            with self._lock:
                if not self._closed:
                    self._ensure_started()
        except TranscriptionError as error:
            if error.kind != "closed":
                logger.warning("%s", error)

    # ------------------------------------------------------------------ requests

    def transcribe(self, audio: str | Path | np.ndarray, sampling_rate: int = 16_000) -> Transcript:
        """
        The text of a recording.

        Args:
            audio (`str`, `Path` or `numpy.ndarray`): a file (WAV, FLAC, MP3, M4A, OGG, WebM, a video with sound ...),
                or samples `(num_samples,)` or `(num_samples, num_channels)`: floats from -1 to 1, or integers over the
                full range of their type.
            sampling_rate (`int`, *optional*, defaults to 16,000): of an array, in Hz.

        Returns:
            `Transcript`: its text is empty if the recording has no speech.

        Raises:
            TranscriptionError: if the recording can't be used, or WhisperX can't be started or does not reply.
        """
        if isinstance(audio, np.ndarray):
            seconds, limit = len(np.atleast_1d(audio)) / max(sampling_rate, 1), self.options["max_seconds"]
            if seconds > limit:
                raise TranscriptionError(
                    f"The recording has {seconds:.0f} seconds; at most {limit:g} are transcribed.",
                    "too_long",
                )
            with tempfile.NamedTemporaryFile(suffix=".wav", prefix="recording-") as file:
                file.write(wav_bytes(audio, sampling_rate))
                file.flush()
                return self._transcribe_file(Path(file.name))
        path = Path(audio)
        if "://" in str(audio):
            raise TranscriptionError("The recording is a URL; only local files are transcribed.", "audio")
        if not path.is_file():
            raise TranscriptionError(f"{path.name} is not a file.", "audio")
        return self._transcribe_file(path.resolve())

    def _transcribe_file(self, path: Path) -> Transcript:
        with self._lock:
            if self._closed:
                raise TranscriptionError("The transcriber was closed.", "closed")
            self._ensure_started()
            begin = time.monotonic()
            reply = self._ask({"op": "transcribe", "path": str(path)})
            elapsed = time.monotonic() - begin
        if not reply.get("ok"):
            error = reply.get("error") or {}
            kind = str(error.get("kind", "internal"))
            raise TranscriptionError(str(error.get("message", "The transcription failed.")), kind)
        try:
            text, language, seconds = str(reply["text"]), reply["language"], float(reply["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise TranscriptionError("The speech recogniser sent a malformed reply.", "internal") from error
        return Transcript(text, language, seconds, self.model, elapsed)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._recogniser is not None:
            return self._recogniser.answer(request)
        assert self._worker is not None
        try:
            return self._worker.request(request, self.request_timeout)
        except WorkerTimeout as error:
            raise self._failure(
                f"The transcription took longer than {self.request_timeout:g} seconds and was stopped.",
                "timeout",
                error,
            ) from error
        except WorkerEnded as error:
            raise self._failure(
                "The speech recogniser ended unexpectedly; it is started again at the next question.", "crash", error
            ) from error

    def _failure(self, message: str, kind: str, error: WorkerEnded) -> TranscriptionError:
        """The error for a worker that has ended; the next request starts another."""
        self._worker, self._ready_message = None, {}
        if self._closed:
            return TranscriptionError("The transcriber was closed.", "closed")
        logger.warning("%s %s", message, error)
        return TranscriptionError(message, kind, error.last_output)

    # ------------------------------------------------------------------ starting the worker

    def _ensure_started(self) -> None:
        if self.ready:
            return
        if self._worker is not None:
            self._worker.kill()
            self._worker = None
        if self.python is None and self.worker_script == WORKER_SCRIPT and importlib.util.find_spec("whisperx"):
            self._recogniser = self._in_process()
            return
        check_platform()
        command = [*self._interpreter(), str(self.worker_script), *self._arguments()]
        logger.info("Starting the speech recogniser (%s) ...", self.model)
        begin = time.monotonic()
        deadline = begin + self.start_timeout
        started = False
        try:
            self._worker = worker = WorkerProcess(command, _environment())
            if self._closed:
                worker.kill()
            while True:
                message = worker.receive(deadline - time.monotonic(), "a message that it is ready")
                if message.get("event") == "ready":
                    break
                if message.get("event") == "fatal":
                    worker.kill()
                    self._worker = None
                    details = f"{message.get('details', '')}\n{worker.last_output}"
                    raise TranscriptionError(str(message.get("message")), str(message.get("kind")), details)
                started = started or message.get("event") == "started"
        except WorkerTimeout as error:
            doing = "loading" if started else "being installed"
            raise self._failure(
                f"The speech recogniser was still {doing} after {self.start_timeout:g} seconds and was stopped. Try "
                "again: completed downloads are kept. start_timeout allows a longer time.",
                "timeout",
                error,
            ) from error
        except WorkerEnded as error:
            raise self._failure(*_start_error(error, started), error) from error
        worker.log_level = logging.DEBUG  # its output matters from now on only if it fails
        self._ready_message = message
        logger.info("Speech recogniser ready after %.1f s: %s", time.monotonic() - begin, message)

    def _in_process(self) -> Any:
        from . import worker

        logger.info("whisperx can be imported: the speech recogniser (%s) is loaded in this process.", self.model)
        try:
            return worker.Recogniser(self.model, **self.options)
        except worker.WorkerError as error:
            raise TranscriptionError(str(error), error.kind) from error

    def _interpreter(self) -> list[str]:
        """The command that runs the worker's script."""
        if self.python is not None:
            python = shutil.which(self.python)
            if python is None:
                raise TranscriptionError(
                    f"The python of the speech recogniser, {str(self.python)!r}, is not a program. Set "
                    f"{PYTHON_VARIABLE} to one that has whisperx, or leave it unset.",
                    "environment",
                )
            return [python, "-u"]
        # `pip install jnana[audio]` installs uv in the directory of our interpreter, which need not be on the PATH
        directories = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        uv = shutil.which("uv", path=directories)
        if uv is None:
            raise TranscriptionError(
                "Spoken questions need uv, which installs the speech recogniser: `pip install uv`, or set "
                f"{PYTHON_VARIABLE} to a python that has whisperx.",
                "environment",
            )
        return [uv, "run", "--script"]

    def _arguments(self) -> list[str]:
        given = {"model": self.model, **self.options}
        return [f"--{name}={value}" for name, value in given.items() if value is not None]


def check_platform() -> None:
    """
    Raises:
        TranscriptionError: if the operating system lacks the functions that a worker process needs.
    """
    missing = [name for name in ("killpg", "waitid") if not hasattr(os, name)]
    if missing:
        raise TranscriptionError(
            f"Spoken questions need Linux or macOS: on {sys.platform} python has no os.{' and no os.'.join(missing)}, "
            "with which the speech recogniser is ended. On Windows, use WSL.",
            "environment",
        )


def _environment() -> dict[str, str]:
    """Our environment variables, without those that make another python import our packages or skip its bytecode
    cache."""
    ours = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {**kept, "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1"}


def _start_error(error: WorkerEnded, started: bool) -> tuple[str, str]:
    """Message and kind of the error for a worker that ended before it was ready."""
    output = error.last_output.lower()
    if not started:
        for pattern, (kind, message) in UV_ERRORS.items():
            if re.search(pattern, output):
                return message, kind
    last = error.last_output.splitlines()[-1:] or ["no output"]
    return f"The speech recogniser could not be started: {error} ({last[0]:.300}).", "crash"
