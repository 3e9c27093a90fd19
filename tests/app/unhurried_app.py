"""The app, with a model that takes its time while a certain file is there: long enough for a visitor to press Stop.

A tiny model's answer is complete before a hand, or a browser, has moved. Nothing else differs from `python app.py`.

    python -m tests.app.unhurried_app FILE [options of app.py]
"""

import sys
import time
from pathlib import Path

import app
from chat.session import Stopped


SECONDS_A_TOKEN = 0.3


def slow_down_beside(file: Path) -> None:
    at_once = Stopped.__call__

    def unhurried(self, *args, **kwargs):
        time.sleep(SECONDS_A_TOKEN if file.exists() else 0)
        return at_once(self, *args, **kwargs)

    Stopped.__call__ = unhurried  # type: ignore[method-assign]


if __name__ == "__main__":
    slow_down_beside(Path(sys.argv[1]))
    app.main(sys.argv[2:])
