"""JSON Lines files as streams: one record in memory at a time, whatever the size of the file.

The file is read once at the start, to count its records, to find its columns, and to know where each part of it
begins. The parts, at most `PARTS`, are dealt out to processes and dataloader workers. Rows, their names and their
order are those of the same file read as a whole.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from .dataset_readers import (
    CAPTION_COLUMNS,
    CHAT_COLUMNS,
    IMAGE_COLUMNS,
    INFERRED_SAMPLES,
    QUESTION_COLUMNS,
    ReadOptions,
    RecordConverter,
)
from .records import column_names, parse_line, read_json_lines
from .rows import ROW_FEATURES
from .values import UnusableValue, plain_columns, problem_row, record_name


PARTS = 64
MARKED = 1024  # of so many records one has its place kept, from which the part of a file is found
# What decides how records are read, if any record of the file has it
COLUMNS = (*IMAGE_COLUMNS, *CHAT_COLUMNS, *CAPTION_COLUMNS, *QUESTION_COLUMNS, "category")


@dataclass
class Part:
    """
    Consecutive records of a file.

    Args:
        path (`str`): the file.
        offset, line (`int`): of a record, at most `MARKED` records before the first one.
        skipped (`int`): records between these two.
        first, count (`int`): number of the first record in the file, and of the records of the part.
    """

    path: str
    offset: int
    line: int
    skipped: int
    first: int
    count: int


def stream_lines(
    path: Path,
    name: str,
    options: ReadOptions,
    max_rows: int | None = None,
    source_of: Callable[[dict, int], str] | None = None,
) -> datasets.IterableDataset:
    """
    The rows of a JSON Lines file, as a stream. The columns are those of all records that are read, as of the file read
    as a whole; whether a column of numbers is read as texts follows from the first records that have it.

    Args:
        path (`Path`): the file.
        name (`str`): the file, for errors.
        options (`ReadOptions`): how records are read.
        max_rows (`int`, *optional*): read the first rows only.
        source_of (`Callable`, *optional*): names a record, from the record and its index; must be picklable.

    Returns:
        `IterableDataset`: of `ROW_FEATURES`. A line that does not parse is a row that `check_row` raises for.

    Raises:
        FileNotFoundError, ValueError: if the file is missing, holds no record, or its first lines do not parse.
    """
    first = [record for record in first_records(path, max_rows) if isinstance(record, dict)]
    asked = (options.image_column, options.text_column, options.question_column, options.category_column)
    missing = dict.fromkeys(column for column in (*COLUMNS, *asked) if column and column not in column_names(first))
    parts, later = scan(path, max_rows, missing)
    if not parts:
        raise ValueError(f"source={name!r} holds no records.")
    known = first + later
    convert = RecordConverter(name, column_names(known), options, streamed=True, source_of=source_of)
    convert.read_as_texts(plain_columns(known, convert.text_columns))
    return datasets.IterableDataset.from_generator(
        _rows, features=ROW_FEATURES, gen_kwargs={"parts": parts, "convert": convert}
    )


def first_records(path: Path, max_rows: int | None = None) -> list[Any]:
    """The first records of a file."""
    most = INFERRED_SAMPLES if max_rows is None else min(INFERRED_SAMPLES, max_rows)
    return list(itertools.islice(read_json_lines(path), most))


def scan(path: Path, max_rows: int | None = None, columns: Iterable[str] = ()) -> tuple[list[Part], list[dict]]:
    """
    Read a file once, up to the last record that is needed.

    Args:
        path (`Path`): the file.
        max_rows (`int`, *optional*): the first records only.
        columns (`Iterable[str]`, *optional*): to be looked for.

    Returns:
        `tuple[list[Part], list[dict]]`: the parts of the file, of equal numbers of records, none if it has no records;
            and for each of the columns the first record that has it.
    """
    missing = {json.dumps(column).encode(): column for column in columns}
    found: list[dict] = []
    marks: list[tuple[int, int]] = []
    number = offset = 0
    with open(path, "rb") as file:
        for line_number, line in enumerate(file, start=1):
            if number == max_rows:
                break
            if not line.isspace():
                if number % MARKED == 0:
                    marks.append((offset, line_number))
                number += 1
                if any(quoted in line for quoted in missing):  # only such lines are parsed here
                    record = _record(line, path, line_number)
                    new = [quoted for quoted, column in missing.items() if column in record]
                    found += [record] if new else []
                    missing = {quoted: column for quoted, column in missing.items() if quoted not in new}
            offset += len(line)
    return _parts(path, number, marks), found


def _record(line: bytes, path: Path, number: int) -> dict:
    """The record of a line; empty if it does not parse, or is no object: it becomes a bad sample when it is read."""
    try:
        record = parse_line(line, path, number)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _parts(path: Path, number: int, marks: list[tuple[int, int]]) -> list[Part]:
    """The parts of a file with so many records; `marks` has the offset and the line of one in `MARKED` records."""
    parts = []
    share, rest = divmod(number, PARTS)
    first = 0
    for index in range(min(number, PARTS)):
        count = share + (index < rest)
        parts.append(Part(str(path), *marks[first // MARKED], first % MARKED, first, count))
        first += count
    return parts


def _rows(parts: list[Part], convert: RecordConverter) -> Iterator[dict]:
    for part in parts:
        for index, (number, line) in enumerate(_lines(part), start=part.first):
            try:
                record = parse_line(line, Path(part.path), number)
            except ValueError as error:
                problem = UnusableValue(str(error), "Correct the line, or remove it.")
                yield problem_row(record_name(convert.name, index, None), problem)
                continue
            yield convert(record, index)


def _lines(part: Part) -> Iterator[tuple[int, bytes]]:
    """The lines of the records of a part, each with its number in the file."""
    with open(part.path, "rb") as file:
        file.seek(part.offset)
        numbered = ((number, line) for number, line in enumerate(file, start=part.line) if not line.isspace())
        yield from itertools.islice(numbered, part.skipped, part.skipped + part.count)
