"""The log of the scripts: plain lines on stdout."""

import logging
import sys


# Libraries that log each request, file or font
TALKATIVE = ("httpx", "httpx2", "fsspec", "datasets", "matplotlib", "PIL")


def log_to_stdout(level: int = logging.INFO) -> None:
    """
    Write the log to stdout, a line for each message; of other libraries' requests and files nothing.

    Args:
        level (`int`, *optional*, defaults to `logging.INFO`): Messages below it are left out.
    """
    logging.basicConfig(stream=sys.stdout, level=level, format="%(message)s", force=True)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
