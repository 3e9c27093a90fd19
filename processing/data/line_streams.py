"""JSON Lines files as streams: one record in memory at a time, whatever the size of the file.

The file is read once at the start, to count its records and to know where each part of it begins. The parts, at most
`PARTS`, are dealt out to processes and dataloader workers. Rows, their names and their order are those of the same
file read as a whole.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from .dataset_readers import INFERRED_SAMPLES, ReadOptions, RecordConverter
from .records import column_names, parse_line, read_json_lines
from .rows import ROW_FEATURES
from .values import UnusableValue, plain_columns, problem_row, record_name


PARTS = 64
MARKED = 1024  # of so many records one has its place kept, from which the part of a file is found


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
    The rows of a JSON Lines file, as a stream. The columns are those of the first records.

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
    first = [record for record in first_records(path) if isinstance(record, dict)]
    parts = parts_of(path, max_rows)
    if not parts:
        raise ValueError(f"source={name!r} holds no records.")
    convert = RecordConverter(name, column_names(first), options, streamed=True, source_of=source_of)
    convert.read_as_texts(plain_columns(first, convert.text_columns))
    return datasets.IterableDataset.from_generator(
        _rows, features=ROW_FEATURES, gen_kwargs={"parts": parts, "convert": convert}
    )


def first_records(path: Path) -> list[Any]:
    """The first records of a file, from which its columns are taken."""
    return list(itertools.islice(read_json_lines(path), INFERRED_SAMPLES))


def parts_of(path: Path, max_rows: int | None = None) -> list[Part]:
    """The parts of a file, of equal numbers of records; none if it has no records."""
    marks: list[tuple[int, int]] = []
    number = offset = 0
    with open(path, "rb") as file:
        for line_number, line in enumerate(file, start=1):
            if not line.isspace():
                if number % MARKED == 0:
                    marks.append((offset, line_number))
                number += 1
            offset += len(line)
    number = number if max_rows is None else min(number, max_rows)
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
