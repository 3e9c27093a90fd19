"""Streams that start over: each pass in another order, alone or mixed by weights.

What a stream gives follows from the seed, the parts that are read and the number of the row alone, so that a resumed
run, which skips the rows that were seen, goes on with the next one.
"""

import itertools
import logging
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value, interleave_datasets
from packaging.version import Version

from .mixture import DataSource, check_streams, source_names, weights
from .prepared_rows import PrepareOptions, StreamReaders
from .rows import ORIGIN, ROW_FEATURES


logger = logging.getLogger(__name__)

STREAM_SHARDS = 64  # of a map-style data set in a mixture of streams: most numbers of processes divide it
PLACE = "place"  # a column, for a while: the number of a row in its pass


def shuffled(rows: IterableDataset, options: PrepareOptions) -> IterableDataset:
    """The rows of a stream, in an order that a buffer shuffles, or as they are."""
    if not options.shuffle_buffer:
        return rows
    return rows.shuffle(seed=options.seed or 0, buffer_size=options.shuffle_buffer)


def endless(rows: IterableDataset, name: str, options: PrepareOptions) -> IterableDataset:
    """
    A stream that starts over when it ends.

    With `shuffle_buffer` each pass has another order: so many rows are drawn in a random order, then the next so many.
    No row comes again before all have come.

    Args:
        rows (`IterableDataset`): of `ROW_FEATURES`.
        name (`str`): of the source.
        options (`PrepareOptions`): `seed`, `shuffle_buffer`.

    Raises:
        ValueError: if there are no rows, of which a reader would wait for the first one for ever.
    """
    if next(iter(rows), None) is None:
        raise ValueError(f"source {name!r} has no rows; correct its `data` or `split`, or leave it out")
    if not options.shuffle_buffer:
        return rows.repeat(None)
    seed = options.seed or 0
    rows = rows.shuffle(seed=seed, buffer_size=1)  # the order of the parts
    rows = rows.map(_placed, with_indices=True, features=Features({**ROW_FEATURES, PLACE: Value("int64")}))
    return rows.repeat(None).map(
        _ShuffledPasses(seed),
        batched=True,
        batch_size=options.shuffle_buffer,
        with_indices=True,
        remove_columns=[PLACE],
        features=ROW_FEATURES,
    )


def _placed(row: dict, index: int) -> dict:
    return {PLACE: index}


class _ShuffledPasses:
    """
    Shuffles a buffer of rows, those of each pass by themselves. A class, so that it can be sent to workers.

    Args:
        seed (`int`): of the order, with the number of the first row since the start of the stream.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        places = batch.pop(PLACE)
        starts = [at for at, place in enumerate(places) if at == 0 or place == 0]
        order: list[int] = []
        for start, end in itertools.pairwise([*starts, len(places)]):
            rng = np.random.default_rng([self.seed, indices[start]])
            order += (start + rng.permutation(end - start)).tolist()
        return {name: [values[at] for at in order] for name, values in batch.items()}


# ---------------------------------------------------------------------- mixtures


def mix_streams(
    sources: Sequence[DataSource], streams: Sequence[Dataset | IterableDataset], options: PrepareOptions
) -> IterableDataset:
    """
    One endless stream: the source of each row is drawn by the weights, and each source starts over when it ends.

    Args:
        sources (`Sequence[DataSource]`): with weights.
        streams (`Sequence[IterableDataset]`): rows of each; a map-style data set becomes a stream.
        options (`PrepareOptions`): `seed`, `shuffle_buffer`, `readers`.

    Raises:
        ValueError: as [`check_streams`] and [`endless`].
    """
    check_streams(sources, options.packing, options.mix)
    names, features = source_names(sources), Features({**ROW_FEATURES, ORIGIN: Value("string")})
    named, parts = [], {}
    for name, rows in zip(names, streams, strict=True):
        if isinstance(rows, Dataset):
            rows = rows.to_iterable_dataset(num_shards=max(min(len(rows), STREAM_SHARDS), 1))
        parts[name] = rows.num_shards
        named.append(endless(rows, name, options).map(_Named(name), features=features))
    fewest = describe_fewest(parts, options.readers)
    if fewest:
        logger.warning(fewest)
    seed = draw_seed(options.seed or 0, min(parts.values()), options.readers)
    return interleave_datasets(named, probabilities=weights(sources), seed=seed)


class _Named:
    """Adds the name of the source to a row. A class, so that it can be pickled and sent to dataloader workers."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, row: dict) -> dict:
        return {ORIGIN: self.name}


def parts_are_dealt(num_parts: int, readers: StreamReaders) -> bool:
    """Whether accelerate gives each process parts of its own; otherwise each one reads all and keeps its batches."""
    enough_if_equal = Version(version("accelerate")) >= Version("1.15")  # 1.10 asks for one part more
    return num_parts > readers.processes or (num_parts == readers.processes and enough_if_equal)


def draw_seed(seed: int, num_parts: int, readers: StreamReaders) -> int:
    """
    The seed by which a process draws sources: its own where it reads parts of its own. By one seed the sources of all
    processes would be the same in each step. Processes that read all parts need one sequence to keep their share of.
    """
    if readers.processes == 1 or not parts_are_dealt(num_parts, readers):
        return seed
    return int(np.random.SeedSequence([seed, readers.process]).generate_state(1)[0])


def describe_fewest(parts: dict[str, int], readers: StreamReaders) -> str | None:
    """
    What the source of the fewest parts means for a mixture, which has as many parts: a line for the log, or `None` if
    there are enough.

    Args:
        parts (`dict[str, int]`): of each source, by its name.
        readers (`StreamReaders`): of the mixture.
    """
    name = min(parts, key=lambda each: parts[each])
    number, workers = parts[name], max(readers.workers, 1)
    if number >= readers.processes * workers:
        return None
    dealt = readers.processes == 1 or parts_are_dealt(number, readers)
    found = [] if dealt else [f"each of the {readers.processes} processes reads all rows of all sources"]
    reading = max(number // readers.processes, 1) if dealt else number
    if reading < workers:
        found.append(f"{reading} of the {workers} dataloader workers of a process read")
    if not found:
        return None
    return (
        f"source {name!r} has {number} {'part' if number == 1 else 'parts'} (files), so the mixture has no more, and "
        f"{' and '.join(found)}; write it as at least {readers.processes * workers} files, or as one of JSON Lines, "
        "which has 64 parts"
    )
