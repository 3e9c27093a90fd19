"""The app, with a model that waits while a certain file exists, so that a test can press Stop in time, and that says
what another file holds while it exists.

A tiny model completes its answer before a browser can act. Therefore each token except the first waits until the file
is removed or touched, or the answer is stopped. Otherwise it is the same as `python app.py`.

    python -m tests.app.slow_app FILE_TO_WAIT_BESIDE FILE_TO_SAY [options of app.py]
"""

import sys
import time
from pathlib import Path

from jnana import app
from jnana.chat.session import ChatSession, StopOnEvent


SECONDS_A_TOKEN = 120  # limit, so that a failed test does not block the next one


def wait_beside(file: Path) -> None:
    at_once = StopOnEvent.__call__

    def touched() -> int | None:
        return file.stat().st_mtime_ns if file.exists() else None

    def slow(self, *args, **kwargs):
        first, self.begun = not getattr(self, "begun", False), True
        before, deadline = None if first else touched(), time.monotonic() + SECONDS_A_TOKEN
        while before is not None and touched() == before and not self.event.is_set() and time.monotonic() < deadline:
            time.sleep(0.02)
        return at_once(self, *args, **kwargs)

    StopOnEvent.__call__ = slow  # type: ignore[method-assign]


def say(file: Path) -> None:
    answer = ChatSession.answer

    def replaced(session, stream):
        try:
            for text in stream:
                yield file.read_text() if file.exists() else text
        finally:
            stream.close()
            if file.exists():
                session.messages[-1]["content"][0]["text"] = file.read_text()

    def said(self, *args, **options):
        return replaced(self, answer(self, *args, **options))

    ChatSession.answer = said  # type: ignore[method-assign]


if __name__ == "__main__":
    wait_beside(Path(sys.argv[1]))
    say(Path(sys.argv[2]))
    app.main(sys.argv[3:])
