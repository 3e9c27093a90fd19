"""Spoken questions: recordings to text, by WhisperX running beside us.

WhisperX can't be installed where transformers 5 is, so it lives in a process and an environment of its own
(`worker.py`), provisioned by `uv` the first time, loaded once, and asked by JSON lines (`worker_process.py`).
Nothing here imports torch, and no model or checkpoint imports this file.
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
# What uv says when a download fails, and what to say of it
UV_COMPLAINTS = {
    r"dns error|failed to lookup|network is unreachable|connect|timed? ?out|error sending request|failed to fetch"
    r"|network was disabled": (
        "network",
        "The speech recogniser is not installed yet and could not be downloaded. Connect to the network and try "
        f"again, or name a python that has whisperx in {PYTHON_VARIABLE}.",
    ),
    r"no space left": (
        "environment",
        "The speech recogniser could not be installed: the disk is full. It needs about 8 GB; UV_CACHE_DIR names "
        "another place for it.",
    ),
    r"no interpreter found|no python": (
        "environment",
        "The speech recogniser could not be installed: uv finds no python from 3.10 to 3.13. Install one.",
    ),
}


class Transcriber:
    """
    Turns recordings into text by WhisperX, which it starts once and keeps.

    The worker is, in this order: the python named by `python` or the environment variable `JNANA_WHISPERX_PYTHON`;
    this very process, if whisperx can be imported here; else `uv`, which provisions an environment the first time
    (about 4 GB to download). A worker that crashed or hung is started anew by the next request.

    Threads may share one: requests are answered one after the other. A forked process may not.

        with Transcriber() as transcriber:          # loads in the background
            question = transcriber.transcribe("question.wav").text

    Args:
        model (`str`, *optional*): a size (`small`, `large-v3-turbo` ...), OpenAI's name of it
            (`openai/whisper-small`), the Hub id of a CTranslate2 Whisper checkpoint, or the folder of one; the
            environment variable `JNANA_WHISPERX_MODEL`, else `small`, when not given.
        language (`str`, *optional*): code of the language spoken; detected in every recording when not given.
        device (`str`, *optional*, defaults to `"auto"`): `cpu`, `cuda`, or `auto`: the GPU if there is one.
        compute_type (`str`, *optional*, defaults to `"default"`): `float32`, `float16`, `int8` ...; by default float16
            on a GPU and float32 on a CPU.
        beam_size (`int`, *optional*, defaults to 5): hypotheses kept while decoding.
        threads (`int`, *optional*): CPU threads; at most 4 when not given.
        max_seconds (`float`, *optional*, defaults to 300): longer recordings are refused.
        start_timeout (`float`, *optional*, defaults to 1800): seconds in which the worker must be ready, the first
            download included.
        request_timeout (`float`, *optional*, defaults to 120): seconds in which it must answer.
        python (`str` or `Path`, *optional*): an interpreter that has whisperx.
        worker_script (`str` or `Path`, *optional*): another program that speaks the worker's protocol.

    Raises:
        ValueError: if `model` is a folder that lacks files, or looks like one that does not exist.
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
        self._turn = threading.Lock()  # who holds it may use the worker
        self._worker: WorkerProcess | None = None
        self._recogniser: Any = None  # of `worker.py`, when it runs in this process
        self._about: dict[str, Any] = {}
        self._closed = False

    # ------------------------------------------------------------------ life

    def __enter__(self) -> "Transcriber":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def ready(self) -> bool:
        """Whether a request would be answered at once (`bool`)."""
        return self._recogniser is not None or (bool(self._about) and self._worker is not None and self._worker.alive)

    def start(self, wait: bool = False) -> None:
        """
        Start the worker; the first `transcribe` does it too.

        Args:
            wait (`bool`, *optional*, defaults to `False`): return when it is ready. Else it starts in the background
                and what goes wrong is logged; the next request then tries again.

        Raises:
            TranscriptionError: with `wait`, if it can't be started.
        """
        self._closed = False
        if wait:
            with self._turn:
                self._ensure_started()
        else:
            threading.Thread(target=self._start_quietly, daemon=True, name="Transcriber.start").start()

    def close(self) -> None:
        """End the worker, whatever it is doing; `start` makes a closed transcriber work again."""
        self._closed = True
        worker = self._worker
        if worker is not None:
            if self._turn.acquire(blocking=False):  # idle: it may end by itself
                try:
                    worker.close()
                finally:
                    self._turn.release()
            else:
                worker.kill()
        self._worker, self._recogniser, self._about = None, None, {}

    def _start_quietly(self) -> None:
        try:
            with self._turn:
                if not self._closed:
                    self._ensure_started()
        except TranscriptionError as error:
            if error.kind != "closed":
                logger.warning("%s", error)

    # ------------------------------------------------------------------ work

    def transcribe(self, audio: str | Path | np.ndarray, sampling_rate: int = 16_000) -> Transcript:
        """
        What is said in a recording.

        Args:
            audio (`str`, `Path` or `numpy.ndarray`): a file (WAV, FLAC, MP3, M4A, OGG, WebM, a video's sound ...), or
                samples `(num_samples,)` or `(num_samples, num_channels)`: floats from -1 to 1, or integers of their
                type's full range.
            sampling_rate (`int`, *optional*, defaults to 16,000): of an array, in Hz.

        Returns:
            `Transcript`: its text is empty if no speech was heard.

        Raises:
            TranscriptionError: if the recording can't be used, or WhisperX can't be started or does not answer.
        """
        if isinstance(audio, np.ndarray):
            seconds, limit = len(np.atleast_1d(audio)) / max(sampling_rate, 1), self.options["max_seconds"]
            if seconds > limit:
                raise TranscriptionError(
                    f"The recording of {seconds:.0f} seconds is longer than {limit:g}, the most that is transcribed.",
                    "too_long",
                )
            with tempfile.NamedTemporaryFile(suffix=".wav", prefix="recording-") as file:
                file.write(wav_bytes(audio, sampling_rate))
                file.flush()
                return self._transcribe_file(Path(file.name))
        path = Path(audio)
        if "://" in str(audio):
            raise TranscriptionError("An address is no recording: only local files are transcribed.", "audio")
        if not path.is_file():
            raise TranscriptionError(f"{path.name} does not exist or is no file.", "audio")
        return self._transcribe_file(path.resolve())

    def _transcribe_file(self, path: Path) -> Transcript:
        with self._turn:
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
            raise TranscriptionError("The speech recogniser gave an answer that is none.", "internal") from error
        return Transcript(text, language, seconds, self.model, elapsed)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._recogniser is not None:
            return self._recogniser.answer(request)
        assert self._worker is not None
        try:
            return self._worker.request(request, self.request_timeout)
        except WorkerTimeout as error:
            raise self._lost(
                f"The transcription took longer than {self.request_timeout:g} seconds and was ended.", "timeout", error
            ) from error
        except WorkerEnded as error:
            raise self._lost(
                "The speech recogniser ended unexpectedly; it is started again at the next question.", "crash", error
            ) from error

    def _lost(self, message: str, kind: str, error: WorkerEnded) -> TranscriptionError:
        """Forget a worker that is gone."""
        self._worker, self._about = None, {}
        if self._closed:
            return TranscriptionError("The transcriber was closed.", "closed")
        logger.warning("%s %s", message, error)
        return TranscriptionError(message, kind, error.last_words)

    # ------------------------------------------------------------------ start

    def _ensure_started(self) -> None:
        if self.ready:
            return
        if self._worker is not None:
            self._worker.kill()
            self._worker = None
        if self.python is None and self.worker_script == WORKER_SCRIPT and importlib.util.find_spec("whisperx"):
            self._recogniser = self._in_process()
            return
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
                message = worker.receive(deadline - time.monotonic(), "a sign that it is ready")
                if message.get("event") == "ready":
                    break
                if message.get("event") == "fatal":
                    worker.kill()
                    self._worker = None
                    details = f"{message.get('details', '')}\n{worker.last_words}"
                    raise TranscriptionError(str(message.get("message")), str(message.get("kind")), details)
                started = started or message.get("event") == "started"
        except WorkerTimeout as error:
            doing = "loading" if started else "being installed"
            raise self._lost(
                f"The speech recogniser was still {doing} after {self.start_timeout:g} seconds and was ended. Try "
                "again: what has been downloaded is kept. A longer time can be given by start_timeout.",
                "timeout",
                error,
            ) from error
        except WorkerEnded as error:
            raise self._lost(*_why_not_started(error, started), error) from error
        worker.log_level = logging.DEBUG  # what it says from now on is of interest when it fails
        self._about = message
        logger.info("Speech recogniser ready after %.1f s: %s", time.monotonic() - begin, message)

    def _in_process(self) -> Any:
        from . import worker

        logger.info("whisperx is importable: the speech recogniser (%s) is loaded in this process.", self.model)
        try:
            return worker.Recogniser(self.model, **self.options)
        except worker.Refused as refusal:
            raise TranscriptionError(str(refusal), refusal.kind) from refusal

    def _interpreter(self) -> list[str]:
        """What runs the worker's script."""
        if self.python is not None:
            python = shutil.which(self.python)
            if python is None:
                raise TranscriptionError(
                    f"The python named for the speech recogniser, {str(self.python)!r}, is no program. Name one that "
                    f"has whisperx in {PYTHON_VARIABLE}, or leave it out.",
                    "environment",
                )
            return [python, "-u"]
        # `pip install jnana[audio]` puts it beside our own interpreter, which need not be on the PATH
        places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        uv = shutil.which("uv", path=places)
        if uv is None:
            raise TranscriptionError(
                "Spoken questions need uv, which installs the speech recogniser: `pip install uv`, or name a python "
                f"that has whisperx in {PYTHON_VARIABLE}.",
                "environment",
            )
        return [uv, "run", "--script"]

    def _arguments(self) -> list[str]:
        given = {"model": self.model, **self.options}
        return [f"--{name}={value}" for name, value in given.items() if value is not None]


def _environment() -> dict[str, str]:
    """Our environment without what would lead another python to our packages, or to compile its own every time."""
    ours = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {**kept, "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1"}


def _why_not_started(error: WorkerEnded, started: bool) -> tuple[str, str]:
    """Message and kind for a worker that ended before it was ready."""
    words = error.last_words.lower()
    if not started:
        for pattern, (kind, message) in UV_COMPLAINTS.items():
            if re.search(pattern, words):
                return message, kind
    last = error.last_words.splitlines()[-1:] or ["it said nothing"]
    return f"The speech recogniser could not be started: {error} ({last[0]:.300}).", "crash"
