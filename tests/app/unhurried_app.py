"""The app, with a model that waits while a certain file is there: long enough for a visitor to press Stop.

A tiny model's answer is complete before a hand, or a browser, has moved. So each token but the first waits until the
file is gone or touched, or the answer is stopped. Nothing else differs from `python app.py`.

    python -m tests.app.unhurried_app FILE [options of app.py]
"""

import sys
import time
from pathlib import Path

from jnana import app
from jnana.chat.session import StopOnEvent


SECONDS_A_TOKEN = 120  # at most: a test that fails leaves the app to the next one


def wait_beside(file: Path) -> None:
    at_once = StopOnEvent.__call__

    def touched() -> int | None:
        return file.stat().st_mtime_ns if file.exists() else None

    def unhurried(self, *args, **kwargs):
        first, self.begun = not getattr(self, "begun", False), True
        before, deadline = None if first else touched(), time.monotonic() + SECONDS_A_TOKEN
        while before is not None and touched() == before and not self.event.is_set() and time.monotonic() < deadline:
            time.sleep(0.02)
        return at_once(self, *args, **kwargs)

    StopOnEvent.__call__ = unhurried  # type: ignore[method-assign]


if __name__ == "__main__":
    wait_beside(Path(sys.argv[1]))
    app.main(sys.argv[2:])
