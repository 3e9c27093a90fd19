"""Progress of long work: one bar on a terminal, a line of the log every 30 seconds elsewhere."""

import logging
import sys
import time
from collections.abc import Callable

from tqdm.auto import tqdm


logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """
    Shows how much of some work is done, how fast, and the time that is left. A context manager.

    Args:
        total (`int`, *optional*): rows in all, if known.
        name (`str`): the work, as in "Preparing rows".
        shown (`bool`, *optional*, defaults to `True`): `False` shows nothing.
        clock (`Callable`, *optional*, defaults to `time.monotonic`): seconds.
    """

    def __init__(self, total: int | None, name: str, shown: bool = True, clock: Callable[[], float] = time.monotonic):
        self.total, self.name, self.clock = total, name, clock
        self.in_lines = shown and not sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=name, unit="row", disable=not shown or self.in_lines)
        self.done = 0
        self.begun = self.last_line = clock()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def update(self, rows: int) -> None:
        """Count further rows."""
        self.done += rows
        self.bar.update(rows)
        now = self.clock()
        if self.in_lines and now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            logger.info(self.line(now - self.begun))

    def line(self, seconds: float) -> str:
        """What is done after so many seconds."""
        rate = self.done / max(seconds, 1e-9)
        text = f"{self.name}: {self.done:,}"
        if self.total is None:
            return f"{text} at {rate:,.0f} rows/s"
        left = (self.total - self.done) / rate if rate else 0.0
        return f"{text} of {self.total:,} at {rate:,.0f} rows/s, {duration(left)} left"


def duration(seconds: float) -> str:
    """A time span in its largest unit: `40 seconds`, `1 minute`, `3 hours`, `12 days`."""
    units = ((86_400, "day"), (3_600, "hour"), (60, "minute"))
    size, unit = next(((size, unit) for size, unit in units if seconds >= size), (1, "second"))
    count = int(seconds // size)
    return f"{count} {unit}{'s' * (count != 1)}"
