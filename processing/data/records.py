"""Reads `.json`, `.jsonl` and `.csv` files into plain records; every error names the file, the line and the column.

Plain records, not Arrow tables: Arrow takes the columns of the first record for all of them, turns `007` into 7, and
rejects a chat whose messages hold strings and lists of parts.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal


RECORD_FILES = (".csv", ".json", ".jsonl")


def parse_json(path: Path) -> Any:
    """
    The content of a `.json` file, or the list of a `.jsonl` file's records.

    Args:
        path (`Path`): the file.

    Raises:
        FileNotFoundError, ValueError: if it is missing, is not UTF-8, or does not parse (file, line, column).
    """
    return list(read_json_lines(path)) if path.suffix.lower() == ".jsonl" else _parse(_read_text(path), path, 1)


def read_json_lines(path: str | Path, torn: Literal["raise", "skip", "skip_last"] = "raise") -> Iterator[Any]:
    """
    The records of a JSON Lines file, one by one. Blank lines are skipped.

    Args:
        path (`str` or `Path`): the file.
        torn (`str`, *optional*, defaults to `"raise"`): how to treat a line that does not parse.

            - `raise`: for files that users write.
            - `skip`: for files that a run appends to. A killed process leaves an incomplete line, and the next process
              appends behind it. A missing file has no records.
            - `skip_last`: skip only an incomplete last line, one without a line break.

    Raises:
        FileNotFoundError: if the file is missing, unless `torn` is `skip`.
        ValueError: if a line is not UTF-8 or not JSON (file, line, column).
    """
    path = Path(path)
    if torn == "skip" and not path.is_file():
        return
    _check_exists(path)
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = parse_line(line, path, number)
            except ValueError:
                if torn == "skip" or (torn == "skip_last" and not line.endswith(b"\n")):
                    continue
                raise
            yield record


def parse_line(line: bytes, path: Path, number: int) -> Any:
    """
    The record of a line of a JSON Lines file.

    Raises:
        ValueError: if it is not UTF-8 or not JSON (file, line, column).
    """
    return _parse(_decode(line.rstrip(b"\n"), path), path, number)


def read_records(path: Path, keep_others: bool = False) -> list[Any]:
    """
    The records of a file; those of a `.csv` have strings only.

    Args:
        path (`Path`): a file with an ending in `RECORD_FILES`.
        keep_others (`bool`, *optional*, defaults to `False`): keep records that are no objects if some are, for the
            reader to report them.

    Raises:
        FileNotFoundError, ValueError: as [`parse_json`], and if the file is not a list of records.
    """
    records = _read_csv(path) if path.suffix.lower() == ".csv" else parse_json(path)
    if not isinstance(records, list):
        raise ValueError(f"{path}: a list of records is needed, not {type(records).__name__}.")
    if keep_others and any(isinstance(record, dict) for record in records):
        return records
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{path}, record {index}: an object with named fields is needed, not {record!r:.80}.")
    return records


def column_names(records: list[dict]) -> list[str]:
    """The fields of all records, in the order of first appearance."""
    return list(dict.fromkeys(name for record in records for name in record))


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}.") from error


def _read_text(path: Path) -> str:
    _check_exists(path)
    return _decode(path.read_bytes(), path)


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise ValueError(f"{path}, line {line}, column {error.colno}: not valid JSON: {error.msg}.") from error
    except (ValueError, RecursionError) as error:  # a number of more than 4,300 digits; lists in lists in lists
        raise ValueError(f"{path}, line {line}: not read: {error}.") from error


def _read_csv(path: Path) -> list[dict]:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    records = []
    try:
        for record in reader:
            if None in record:
                raise ValueError(
                    f"{path}, line {reader.line_num}: more cells than the header has columns. Put a text that holds "
                    "commas in quotes."
                )
            records.append(record)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.reader.line_num}: not valid CSV: {error}.") from error
    return records
