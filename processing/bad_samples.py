"""What happens to a row that can't be used: one error that names it, and one file that lists the rows left out."""

import json
import os
from pathlib import Path


class BadSampleError(ValueError):
    """
    A row of data that can't become a training or test sample.

    Args:
        message (`str`): the row (file and record), what is wrong with it, and the remedy.
    """


def bad_sample(source: str, problem: str, remedy: str = "") -> BadSampleError:
    """
    The error for one row.

    Args:
        source (`str`): file and record, as in the row's `source` column.
        problem (`str`): what is wrong, with the value.
        remedy (`str`, *optional*): what to do about it.
    """
    return BadSampleError(f"{source}: {problem}" + (f" {remedy}" if remedy else ""))


def append_bad_samples(path: str | Path, messages: list[str]) -> None:
    """
    Append rows that were left out to a JSON Lines file.

    Several dataloader workers and processes may write to one file: each call is a single write in append mode, which
    the operating system keeps in one piece.

    Args:
        path (`str` or `Path`): the file; its folder is made when missing.
        messages (`list[str]`): one text a row, as `str(BadSampleError)`.
    """
    if not messages:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"problem": message}, ensure_ascii=False) + "\n" for message in messages)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, lines.encode("utf-8"))
    finally:
        os.close(descriptor)


def read_bad_samples(path: str | Path) -> list[str]:
    """
    The rows listed in a file, each once, in the order of their first appearance.

    Args:
        path (`str` or `Path`): a file written by `append_bad_samples`; need not exist.

    Returns:
        `list[str]`: the problems. A row met again in a later epoch is listed once.
    """
    if not Path(path).is_file():
        return []
    with open(path, encoding="utf-8") as file:
        return list(dict.fromkeys(json.loads(line)["problem"] for line in file if line.strip()))
