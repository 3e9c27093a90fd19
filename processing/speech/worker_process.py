"""A program that runs beside us and answers JSON lines: one process, from its start to its end.

Requests go to its standard input and replies come from its standard output, one JSON object a line; standard error is
for people and goes to `logging`. Whatever happens to the process becomes one of two exceptions with its last words,
and however we end, it ends too, with everything it started (see `worker_guard.py`). POSIX only.
"""

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)

GUARD_SCRIPT = Path(__file__).with_name("worker_guard.py")
# A pipe holds this much unread: a request that fits can be written without waiting for the worker
MAX_REQUEST_BYTES = 32_768
MAX_REPLY_BYTES = 16_777_216


class WorkerEnded(RuntimeError):
    """The process ended, or its output did; `last_words` are its last lines of standard error."""

    def __init__(self, message: str, last_words: str = "", status: int | None = None):
        super().__init__(message)
        self.last_words = last_words
        self.status = status


class WorkerTimeout(WorkerEnded):
    """No reply came in time; the process has been killed."""


class WorkerProcess:
    """
    One running worker. Not to be shared between threads, but for [`~WorkerProcess.kill`].

    Args:
        command (`list[str]`): the program and its arguments.
        environment (`dict[str, str]`, *optional*): its environment variables; ours when not given.
        log_level (`int`, *optional*, defaults to `logging.INFO`): at which its lines of standard error are logged.

    Attributes:
        log_level (`int`): may be changed while it runs.

    Raises:
        WorkerEnded: if the program can't be started.
    """

    def __init__(self, command: list[str], environment: dict[str, str] | None = None, log_level: int = logging.INFO):
        self.log_level = log_level
        self._messages: queue.Queue[dict | None] = queue.Queue()
        self._last_words: deque[str] = deque(maxlen=40)
        self._next_id = 0
        self._ended = threading.Lock()
        self._status: int | None = None
        lifeline, self._lifeline = os.pipe()
        guard = [sys.executable, "-I", "-S", str(GUARD_SCRIPT), str(lifeline), str(os.getpid())]
        try:
            self._process = subprocess.Popen(
                [*guard, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                pass_fds=[lifeline],
                start_new_session=True,  # a process group of its own: killed as one, and deaf to our Ctrl-C
            )
        except OSError as error:
            os.close(self._lifeline)
            raise WorkerEnded(f"{command[0]} could not be started: {error}") from error
        finally:
            os.close(lifeline)
        self._readers = [
            threading.Thread(target=target, daemon=True, name=f"{target.__name__} of worker {self._process.pid}")
            for target in (self._read_messages, self._read_log)
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        """Process id of the guard, which is the number of the process group."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it has not ended, as far as its output shows."""
        return self._status is None and self._readers[0].is_alive()

    def receive(self, timeout: float, waiting_for: str = "a reply") -> dict[str, Any]:
        """
        The next JSON object that it writes; lines that are none are logged and passed over.

        Args:
            timeout (`float`): seconds to wait.
            waiting_for (`str`, *optional*): what, for the message of the error.

        Raises:
            WorkerTimeout: if none comes; the process is killed.
            WorkerEnded: if the process has ended.
        """
        try:
            message = self._messages.get(timeout=max(timeout, 0.0))
        except queue.Empty:
            self.kill()
            raise WorkerTimeout(f"no {waiting_for.removeprefix('a ')} in time", self.last_words) from None
        if message is None:
            self._messages.put(None)  # for whoever asks again
            self._readers[0].join()  # which has read its last line: the end of the process may be waited for
            status = self.kill()
            how = "was killed" if status is None else f"ended with exit status {status}"
            raise WorkerEnded(f"the worker {how}", self.last_words, status)
        return message

    def request(self, message: dict[str, Any], timeout: float) -> dict[str, Any]:
        """
        Ask, and wait for the reply with the same `id`.

        Args:
            message (`dict[str, Any]`): the request, without an `id`.
            timeout (`float`): seconds to wait for the reply.

        Raises:
            ValueError: if the request is longer than `MAX_REQUEST_BYTES`.
            WorkerTimeout, WorkerEnded: as [`~WorkerProcess.receive`].
        """
        self._next_id += 1
        line = json.dumps({**message, "id": self._next_id}).encode() + b"\n"
        if len(line) > MAX_REQUEST_BYTES:
            raise ValueError(f"a request of {len(line)} bytes; at most {MAX_REQUEST_BYTES} are sent.")
        deadline = time.monotonic() + timeout
        assert self._process.stdin is not None
        # a broken pipe: its output has ended as well, and says more
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(line)
            self._process.stdin.flush()
        while True:
            reply = self.receive(deadline - time.monotonic())
            if reply.get("id") == self._next_id:
                return reply
            logger.debug("passed over a reply to another request: %.200r", reply)

    def close(self, grace: float = 3.0) -> None:
        """
        End its input, which asks it to finish, and kill it if it has not after `grace` seconds.
        """
        if self._process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                self._process.stdin.close()
        self._readers[0].join(grace)
        self.kill()

    def kill(self) -> int | None:
        """
        Kill the whole process group and wait for its end; may be called from any thread, any number of times.

        Returns:
            `int` or `None`: the exit status it had ended with by itself, `None` if it was killed here.
        """
        with self._ended:
            if self._status is None:
                self._status = self._end()
        return self._status if self._status != -signal.SIGKILL else None

    def _end(self) -> int:
        if not self._readers[0].is_alive():  # its output has ended: let it say how
            with contextlib.suppress(ChildProcessError):
                deadline = time.monotonic() + 3.0
                while os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.005)
        # Before the guard is reaped, so that its number can't have passed to another group
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        status = self._process.wait()
        os.close(self._lifeline)
        for reader in self._readers:
            if reader is not threading.current_thread():
                reader.join(1.0)
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.close()  # type: ignore[union-attr]
        return status

    @property
    def last_words(self) -> str:
        """Its last lines of standard error (`str`)."""
        return "\n".join(self._last_words)

    def _read_messages(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        with contextlib.suppress(OSError, ValueError):
            while line := stream.readline(MAX_REPLY_BYTES):
                try:
                    message = json.loads(line)
                except (ValueError, RecursionError):
                    message = None
                if isinstance(message, dict):
                    self._messages.put(message)
                else:
                    logger.debug("not a JSON object, passed over: %.200r", line)
        self._messages.put(None)
        stream.close()

    def _read_log(self) -> None:
        stream = self._process.stderr
        assert stream is not None
        with contextlib.suppress(OSError, ValueError):
            while line := stream.readline(65_536):
                text = line.decode("utf-8", "replace").rstrip()
                if text:
                    self._last_words.append(text)
                    logger.log(self.log_level, "%s", text)
        stream.close()
