"""Checks, renders and tokenises all rows of a data set once, in worker processes.

A worker has the processor from its start, and compiles the chat template once. It is sent the rows of a block, and
returns them with their tokens as an Arrow table. Rows of a data set, which may hold the images themselves, are not
sent: the worker has the data set from its start too, gets their numbers, and returns the tokens.
"""

import gc
import itertools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, List, Value

from jnana.processing.processing_jnana import JnanaProcessor

from .checks import BadRow, ImageChecker, check_block
from .files import file_stamp
from .images import MAX_IMAGE_PIXELS
from .rows import ROW_FEATURES, TOKEN_FEATURES, RecordRows, rows_at, rows_to_table


# What `prepare` adds to a row: its tokens; the tokens of each conversation with all image tokens, before it is cut to
# `max_length`; those of the shared prefix; (height, width) of each image in pixels, where it was read.
ENCODED_FEATURES = Features(
    {
        **TOKEN_FEATURES,
        "lengths": List(Value("int32")),
        "shared": Value("int32"),
        "image_sizes": List(List(Value("int32"))),
    }
)
PREPARED_FEATURES = Features({**ROW_FEATURES, **ENCODED_FEATURES})
BLOCK_ROWS = 500
# Fewer rows for each process are not worth starting it.
ROWS_A_PROCESS = 2000
MOST_PROCESSES = 32  # by default: more would wait for the one that reads the rows
CPU_SHARE = Path("/sys/fs/cgroup/cpu.max")  # of a container, as microseconds in a period
WATCH_SECONDS = 0.5


@dataclass
class EncodedBlock:
    """
    Some rows, checked and tokenised.

    Args:
        num_rows (`int`): of the block.
        columns (`pa.Table`): of `ENCODED_FEATURES`, one row for each of the block, nulls in those that can't be used.
            If the rows were sent, only the usable ones, with all columns of `PREPARED_FEATURES`.
        bad (`dict[int, BadRow]`): the rows that can't be used, by their number in the block.
        num_truncated (`int`): conversations longer than `max_length`.
        stamps (`dict[str, tuple[int, int] | None]`): size and modification time of each image file, taken before it
            was read.
    """

    num_rows: int
    columns: pa.Table
    bad: dict[int, BadRow] = field(default_factory=dict)
    num_truncated: int = 0
    stamps: dict[str, tuple[int, int] | None] = field(default_factory=dict)


class RowEncoder:
    """
    Checks and tokenises blocks of a data set's rows. Can be pickled and sent to a worker.

    Args:
        rows (`Dataset` or `RecordRows`): of `ROW_FEATURES`; the latter are not kept.
        processor (`JnanaProcessor`): renders and tokenises.
        max_length, image_check, max_image_pixels, needs_images: as in [`check_rows`].
    """

    def __init__(
        self,
        rows: Dataset | RecordRows,
        processor: JnanaProcessor,
        max_length: int | None = None,
        image_check: str = "header",
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        needs_images: bool = False,
    ):
        self.rows = rows if isinstance(rows, Dataset) else None
        self.processor = processor
        self.max_length, self.needs_images = max_length, needs_images
        self.images = ImageChecker(processor, image_check, max_image_pixels)

    def __call__(self, block: list[dict] | range) -> EncodedBlock:
        """Rows, or the numbers of rows of the data set."""
        rows = block if isinstance(block, list) else rows_at(self.rows, block)
        stamps = {}
        if self.images.how != "none":
            paths = (image["path"] for row in rows for image in row["images"] if image["bytes"] is None)
            stamps = {path: file_stamp(path) for path in dict.fromkeys(paths) if path}
        columns: dict[str, list[Any]] = {name: [] for name in ENCODED_FEATURES}
        bad: dict[int, BadRow] = {}
        num_truncated = 0
        outcomes = check_block(rows, self.processor, self.images, self.max_length, self.needs_images)
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, BadRow):
                bad[number] = outcome
                for values in columns.values():
                    values.append(None)
                continue
            num_truncated += outcome.count_longer(self.max_length)
            columns["token_ids"].append(outcome.ids)
            columns["answer_mask"].append(outcome.masks)
            columns["lengths"].append(outcome.lengths)
            columns["shared"].append(outcome.shared)
            columns["image_sizes"].append(outcome.image_sizes)
        table = pa.Table.from_pydict(columns, schema=ENCODED_FEATURES.arrow_schema)
        if isinstance(block, list):
            columns_of_both = [*rows_to_table(rows).columns, *table.columns]
            table = pa.Table.from_arrays(columns_of_both, schema=PREPARED_FEATURES.arrow_schema)
            table = table.filter([number not in bad for number in range(len(rows))]) if bad else table
        return EncodedBlock(len(rows), table, bad, num_truncated, stamps)


def encode_blocks(
    encoder: RowEncoder, rows: Dataset | RecordRows, num_proc: int | None = None
) -> Iterator[EncodedBlock]:
    """
    All rows, block by block in their order; in worker processes if there are enough rows.

    Args:
        encoder (`RowEncoder`): of the rows.
        rows (`Dataset` or `RecordRows`): all of them.
        num_proc (`int`, *optional*): processes at most; by default one for each core that this process may use.

    Raises:
        RuntimeError: if a worker was killed.
    """
    number = len(rows)
    numbers = range(number)
    blocks: Iterator[Any] = (numbers[start : start + BLOCK_ROWS] for start in range(0, number, BLOCK_ROWS))
    if isinstance(rows, RecordRows):
        waiting_rows = iter(rows)
        blocks = iter(lambda: list(itertools.islice(waiting_rows, BLOCK_ROWS)), [])
    processes = min(usable_cores() if num_proc is None else num_proc, number // ROWS_A_PROCESS)
    # Forked workers share the imports, and a data set; elsewhere each would get a copy of it, images and all.
    forks = sys.platform == "linux"
    if processes < 2 or not (forks or isinstance(rows, RecordRows)):
        yield from map(encoder, blocks)
        return
    context = get_context("fork" if forks else None)
    collects = gc.isenabled()
    gc.disable()  # this process only makes rows, whose garbage has no cycles; collections would visit all of them
    pool = ProcessPoolExecutor(processes, context, _start_worker, (encoder, os.getpid()))
    try:
        waiting: deque = deque()
        for block in blocks:
            waiting.append(pool.submit(_encode, block))
            if len(waiting) > 4 * processes:  # more finished blocks would only take memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"one of the {processes} processes that prepare the data was killed, most often for want of memory. Start "
            "again with fewer: dataset_num_proc: 1"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
        if collects:
            gc.enable()


_encoder: RowEncoder | None = None  # of a worker


def _start_worker(encoder: RowEncoder, parent: int) -> None:
    global _encoder
    _encoder = encoder
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    gc.enable()
    gc.freeze()  # each full collection would visit all that the imports made


def _end_with(parent: int) -> None:
    """End this worker when its parent was killed: it would wait for ever for work, and hold what it has inherited."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


def _encode(block: list[dict] | range) -> EncodedBlock:
    assert _encoder is not None
    return _encoder(block)


def usable_cores(most: int | None = MOST_PROCESSES) -> int:
    """Cores that this process may use, within the share of its container; at most `most`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_SHARE.read_text(encoding="ascii").split()
        cores = min(cores, max(1, int(quota) // int(period)))  # ValueError: "max", there is no limit
    except (OSError, ValueError):
        pass
    return cores if most is None else min(cores, most)
