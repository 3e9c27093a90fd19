"""`WorkerProcess`: a child process that answers JSON requests.

Requests are written to its standard input and replies read from its standard output, one JSON object per line. Its
standard error is logged. A worker that ends or does not reply raises an exception with the last lines of standard
error. When the current process ends, for whatever reason, the worker ends too, with all processes that it started (see
`worker_guard.py`). POSIX only; `transcriber.check_platform` raises elsewhere.
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
# A pipe buffers this much, so a request of this size can be written without waiting for the worker.
MAX_REQUEST_BYTES = 32_768
MAX_REPLY_BYTES = 16_777_216


class WorkerEnded(RuntimeError):
    """
    The process ended or closed its output.

    Args:
        message (`str`): the problem.
        last_output (`str`, *optional*): the last lines of its standard error.
        status (`int`, *optional*): its exit status; `None` if it was killed here.
    """

    def __init__(self, message: str, last_output: str = "", status: int | None = None):
        super().__init__(message)
        self.last_output = last_output
        self.status = status


class WorkerTimeout(WorkerEnded):
    """No reply came in time. The process was killed."""


class WorkerProcess:
    """
    A running worker. Threads must not share it, except for [`~WorkerProcess.kill`].

    Args:
        command (`list[str]`): the program and its arguments.
        environment (`dict[str, str]`, *optional*): its environment variables; by default ours.
        log_level (`int`, *optional*, defaults to `logging.INFO`): level at which its standard error is logged.

    Attributes:
        log_level (`int`): may be changed while the worker runs.

    Raises:
        WorkerEnded: if the program can't be started.
    """

    def __init__(self, command: list[str], environment: dict[str, str] | None = None, log_level: int = logging.INFO):
        self.log_level = log_level
        self._messages: queue.Queue[dict | None] = queue.Queue()
        self._last_lines: deque[str] = deque(maxlen=40)
        self._next_id = 0
        self._end_lock = threading.Lock()
        self._status: int | None = None
        parent_pipe, self._parent_pipe = os.pipe()  # see worker_guard.py
        guard = [sys.executable, "-I", "-S", str(GUARD_SCRIPT), str(parent_pipe), str(os.getpid())]
        try:
            self._process = subprocess.Popen(
                [*guard, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                pass_fds=[parent_pipe],
                start_new_session=True,  # a process group that can be killed as one and does not receive our Ctrl-C
            )
        except OSError as error:
            os.close(self._parent_pipe)
            raise WorkerEnded(f"{command[0]} could not be started: {error}") from error
        finally:
            os.close(parent_pipe)
        self._readers = [
            threading.Thread(target=target, daemon=True, name=f"{target.__name__} of worker {self._process.pid}")
            for target in (self._read_messages, self._read_log)
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        """Process id of the guard, which is also the id of the process group."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether its standard output is still open."""
        return self._status is None and self._readers[0].is_alive()

    def receive(self, timeout: float, waiting_for: str = "a reply") -> dict[str, Any]:
        """
        The next JSON object that it writes. Other lines are logged and skipped.

        Args:
            timeout (`float`): seconds to wait.
            waiting_for (`str`, *optional*): the expected message, for the error.

        Raises:
            WorkerTimeout: if none comes in time; the process is killed.
            WorkerEnded: if the process has ended.
        """
        try:
            message = self._messages.get(timeout=max(timeout, 0.0))
        except queue.Empty:
            self.kill()
            raise WorkerTimeout(f"no {waiting_for.removeprefix('a ')} in time", self.last_output) from None
        if message is None:
            self._messages.put(None)  # for the next call
            self._readers[0].join()  # it has read the last line, so the process is ending
            status = self.kill()
            how = "was killed" if status is None else f"ended with exit status {status}"
            raise WorkerEnded(f"the worker {how}", self.last_output, status)
        return message

    def request(self, message: dict[str, Any], timeout: float) -> dict[str, Any]:
        """
        Send a request and wait for the reply with the same `id`.

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
            raise ValueError(f"the request has {len(line)} bytes; at most {MAX_REQUEST_BYTES} can be sent.")
        deadline = time.monotonic() + timeout
        assert self._process.stdin is not None
        # After a broken pipe `receive` raises the more specific error.
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(line)
            self._process.stdin.flush()
        while True:
            reply = self.receive(deadline - time.monotonic())
            if reply.get("id") == self._next_id:
                return reply
            logger.debug("skipped a reply to another request: %.200r", reply)

    def close(self, grace: float = 3.0) -> None:
        """
        Close its standard input, so that it ends, and kill it if it has not ended after `grace` seconds.

        Args:
            grace (`float`, *optional*, defaults to 3): seconds.
        """
        if self._process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                self._process.stdin.close()
        self._readers[0].join(grace)
        self.kill()

    def kill(self) -> int | None:
        """
        Kill the process group and wait for its end. May be called from any thread and repeatedly.

        Returns:
            `int` or `None`: the exit status if it ended by itself, `None` if it was killed here.
        """
        with self._end_lock:
            if self._status is None:
                self._status = self._end()
        return self._status if self._status != -signal.SIGKILL else None

    def _end(self) -> int:
        if not self._readers[0].is_alive():  # its output is closed: wait for its exit status
            with contextlib.suppress(ChildProcessError):
                deadline = time.monotonic() + 3.0
                while os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.005)
        # Kill before the guard is reaped, while its id can't belong to another process group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        status = self._process.wait()
        os.close(self._parent_pipe)
        for reader in self._readers:
            if reader is not threading.current_thread():
                reader.join(1.0)
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.close()  # type: ignore[union-attr]
        return status

    @property
    def last_output(self) -> str:
        """The last lines of its standard error (`str`)."""
        return "\n".join(self._last_lines)

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
                    logger.debug("skipped a line that is not a JSON object: %.200r", line)
        self._messages.put(None)
        stream.close()

    def _read_log(self) -> None:
        stream = self._process.stderr
        assert stream is not None
        with contextlib.suppress(OSError, ValueError):
            while line := stream.readline(65_536):
                text = line.decode("utf-8", "replace").rstrip()
                if text:
                    self._last_lines.append(text)
                    logger.log(self.log_level, "%s", text)
        stream.close()
