"""Reads a local `.json`, `.jsonl` or `.csv` file into plain records, with file, line and column in every error.

Plain records, not Arrow tables: those would take the columns of the first record for all of them, turn `007` into 7,
and refuse a chat whose messages hold strings and lists of parts.
"""

import csv
import io
import json
from pathlib import Path
from typing import Any


RECORD_FILES = (".csv", ".json", ".jsonl")


def parse_json(path: Path) -> Any:
    """The content of a `.json` file, or the list of a `.jsonl` file's records.

    Raises:
        FileNotFoundError, ValueError: if it is missing, is not UTF-8, or does not parse (file, line, column).
    """
    text = _read_text(path)
    return parse_lines(text, path) if path.suffix.lower() == ".jsonl" else _parse(text, path, 1)


def parse_lines(text: str, path: Path) -> list:
    """The records of a `.jsonl` file whose text has been read; errors as [`parse_json`]."""
    return [_parse(line, path, number) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def read_records(path: Path) -> list[dict]:
    """The records of a file; those of a `.csv` have strings only.

    Raises:
        FileNotFoundError, ValueError: as [`parse_json`], and if the file is not a list of records.
    """
    records = _read_csv(path) if path.suffix.lower() == ".csv" else parse_json(path)
    if not isinstance(records, list):
        raise ValueError(f"{path}: a list of records is needed, not {type(records).__name__}.")
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{path}, record {index}: an object with named fields is needed, not {record!r:.80}.")
    return records


def column_names(records: list[dict]) -> list[str]:
    """Every field that some record has, in the order of first appearance."""
    return list(dict.fromkeys(name for record in records for name in record))


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}.") from error


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise ValueError(f"{path}, line {line}, column {error.colno}: not valid JSON: {error.msg}.") from error


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
