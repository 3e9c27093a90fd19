"""Several sources in one run: how many rows of each an epoch has, and which.

A draw depends on the numbers of rows, the shares and the seed alone, so that every process draws the same rows and a
resumed run goes on with them. Each source is read, prepared and kept by itself (`prepared_rows.py`).
"""

import logging
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets

from .checks import CheckReport
from .packing import RowPlan, plan_rows
from .paths import is_hub_id
from .prepared_rows import PrepareOptions
from .rows import Origins


logger = logging.getLogger(__name__)

MIXES = ("row", "batch")
NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass
class DataSource:
    """
    One of several sources.

    Args:
        data (`str`, `Path`, `Dataset` or `IterableDataset`): as the source of [`load_rows`].
        name (`str`, *optional*): in the log and the card; by default the file's or directory's.
        image_folder, format, split, text_column, prompt, independent_turns (*optional*): as in [`PrepareOptions`],
            which has the defaults.
        weight (`float`, *optional*): its share of an epoch's rows, relative to the weights of the others.
        samples (`int`, *optional*): rows of it in an epoch; by default all.
        repeat (`int`, *optional*, defaults to 1): how often an epoch may have a row.
    """

    data: str | Path | Dataset | IterableDataset
    name: str | None = None
    image_folder: str | Path | None = None
    format: str | None = None
    split: str | None = None
    weight: float | None = None
    samples: int | None = None
    repeat: int = 1
    text_column: str | None = None
    prompt: str | None = None
    independent_turns: bool | None = None

    def options(self, options: PrepareOptions) -> PrepareOptions:
        """The options of a run with those of this source."""
        names = ("image_folder", "format", "split", "text_column", "prompt", "independent_turns")
        own = {name: getattr(self, name) for name in names}
        return replace(options, **{name: value for name, value in own.items() if value is not None})


@dataclass
class SourceRows:
    """
    The usable rows of one source.

    Args:
        name (`str`): of the source.
        rows (`Dataset`): of `ROW_FEATURES`, in the order of the report.
        report (`CheckReport`): with all lengths.
    """

    name: str
    rows: Dataset
    report: CheckReport


@dataclass
class Mixture:
    """
    The rows of an epoch.

    Args:
        rows (`Dataset`): of `ROW_FEATURES`, one source after the other; those of a source in its own order.
        counts (`dict[str, int]`): rows of each source, by its name.
        lengths (`list[list[int]]`): tokens of each conversation of each row, before it is cut.
        shared (`list[int]`): tokens in the prefix that the conversations of each row share.
    """

    rows: Dataset
    counts: dict[str, int]
    lengths: list[list[int]]
    shared: list[int]

    @property
    def origins(self) -> Origins | None:
        """The source of each row; `None` if there is one source only."""
        return Origins(self.counts) if len(self.counts) > 1 else None

    def of_source(self, name: str) -> slice:
        """The rows of a source."""
        start = 0
        for other, count in self.counts.items():
            if other == name:
                return slice(start, start + count)
            start += count
        raise KeyError(name)


def check_mix(mix: str) -> None:
    """Raise `ValueError` for an unknown value."""
    if mix not in MIXES:
        raise ValueError(f"mix={mix!r} must be one of {', '.join(MIXES)}.")


def source_names(sources: Sequence[DataSource]) -> list[str]:
    """
    The names of sources.

    Raises:
        ValueError: if there are none, two have one name, or a name is not made of letters, digits, `_`, `.` and `-`.
    """
    if not sources:
        raise ValueError("the list of sources is empty; give at least one")
    names = [source.name or _name_of(source.data, number) for number, source in enumerate(sources)]
    for number, name in enumerate(names):
        if not NAME.fullmatch(name):
            raise ValueError(f"source {number} is named {name!r}; give it a name of letters, digits, `_`, `.`, `-`")
        if name in names[:number]:
            raise ValueError(
                f"sources {names.index(name)} and {number} are both named {name!r}; give one of them another `name`"
            )
    return names


def _name_of(data: Any, number: int) -> str:
    if not isinstance(data, (str, Path)):
        return f"source_{number}"
    text = str(data)
    stem = text.split("/")[-1] if is_hub_id(text) else Path(text).stem
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", stem).strip("_.") or f"source_{number}"


# ---------------------------------------------------------------------- an epoch's rows


def rows_an_epoch(sources: Sequence[DataSource], sizes: Sequence[int]) -> list[int]:
    """
    The rows of each source in an epoch, which ends when the first source has no more.

    Args:
        sources (`Sequence[DataSource]`): all of them with a `weight`, or none.
        sizes (`Sequence[int]`): usable rows of each.

    Raises:
        ValueError: if some sources have a weight and others have none, a source has fewer rows than `samples`, or a
            share is less than one row.
    """
    names = source_names(sources)
    weighted = weights(sources)
    most = [size * source.repeat for size, source in zip(sizes, sources, strict=True)]
    if weighted is None:
        for source, name, size, limit in zip(sources, names, sizes, most, strict=True):
            if source.samples is not None and source.samples > limit:
                raise ValueError(
                    f"source {name!r} has {size:,} usable rows, but samples is {source.samples:,}; lower it, or let "
                    f"rows repeat: `repeat: {-(-source.samples // size)}`"
                )
        return [
            limit if source.samples is None else source.samples for source, limit in zip(sources, most, strict=True)
        ]
    total = min(limit / weight for limit, weight in zip(most, weighted, strict=True))
    numbers = [min(limit, int(weight * total + 1e-6)) for limit, weight in zip(most, weighted, strict=True)]
    for name, number, weight in zip(names, numbers, weighted, strict=True):
        if number == 0:
            raise ValueError(
                f"source {name!r} has a share of {weight:.2g}, which is less than one of the {total:,.0f} rows of an "
                "epoch; raise its weight, or let the rows of the smallest source repeat"
            )
    return numbers


def weights(sources: Sequence[DataSource]) -> list[float] | None:
    """
    The shares of sources with weights, of 1; `None` if no source has one.

    Raises:
        ValueError: if only some have a weight.
    """
    given = [source.weight for source in sources if source.weight is not None]
    if not given:
        return None
    if len(given) < len(sources):
        missing = next(
            name for name, source in zip(source_names(sources), sources, strict=True) if source.weight is None
        )
        raise ValueError(f"source {missing!r} has no weight, but others have; give all of them one, or `samples` each")
    return [weight / sum(given) for weight in given]


def draw(size: int, number: int, name: str, seed: int) -> np.ndarray:
    """
    Rows drawn without replacement; no row is drawn again before all rows were drawn equally often.

    Args:
        size (`int`): rows of the source.
        number (`int`): rows to draw.
        name (`str`): of the source: another source does not change the draw of this one.
        seed (`int`): of the run.

    Returns:
        `np.ndarray` of shape `(number,)`: indices, in increasing order.
    """
    passes, rest = divmod(number, size)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    some = np.sort(rng.permutation(size)[:rest])
    return np.sort(np.concatenate([*[np.arange(size)] * passes, some]), kind="stable")


def draws(sources: Sequence[DataSource], sizes: Sequence[int], seed: int | None) -> list[np.ndarray | None]:
    """
    The rows of each source in an epoch, as indices; `None` where they are all, each once.

    Args:
        sources (`Sequence[DataSource]`): with their shares.
        sizes (`Sequence[int]`): usable rows of each.
        seed (`int`, *optional*, defaults to 0): of the draw.

    Raises:
        ValueError: as [`rows_an_epoch`].
    """
    wanted = zip(source_names(sources), sizes, rows_an_epoch(sources, sizes), strict=True)
    return [None if number == size else draw(size, number, name, seed or 0) for name, size, number in wanted]


def mixed_rows(tables: Sequence[Dataset], drawn: Sequence[np.ndarray | None]) -> Dataset:
    """The drawn rows of all sources, one source after the other; those of one source without a draw as they are."""
    chosen = [rows if of is None else rows.select(of) for rows, of in zip(tables, drawn, strict=True)]
    return chosen[0] if len(chosen) == 1 else concatenate_datasets(chosen)


def mix(sources: Sequence[DataSource], parts: Sequence[SourceRows], seed: int | None) -> Mixture:
    """
    The rows of an epoch, with their sizes.

    Args:
        sources (`Sequence[DataSource]`): with their shares.
        parts (`Sequence[SourceRows]`): the rows of each.
        seed (`int`, *optional*, defaults to 0): of the draw.

    Raises:
        ValueError: as [`rows_an_epoch`].
    """
    drawn = draws(sources, [len(part.rows) for part in parts], seed)
    counts, lengths, shared = {}, [], []
    for part, of in zip(parts, drawn, strict=True):
        report = part.report
        counts[part.name] = len(part.rows) if of is None else len(of)
        lengths += report.lengths if of is None else [report.lengths[index] for index in of]
        shared += report.shared if of is None else [report.shared[index] for index in of]
    return Mixture(mixed_rows([part.rows for part in parts], drawn), counts, lengths, shared)


def plan_mixture(mixture: Mixture, options: PrepareOptions) -> RowPlan:
    """The packed rows of a mixture, for `packing` other than `none`. With `mix: batch` those of each source alone."""
    whole = slice(0, len(mixture.lengths))
    slices = [mixture.of_source(name) for name in mixture.counts] if options.mix == "batch" else [whole]
    plans = []
    for rows in slices:
        shared = mixture.shared[rows] if options.packing == "shared_image" else None
        plan = plan_rows(
            mixture.lengths[rows], shared, options.max_row_tokens, max_length=options.max_length, seed=options.seed
        )
        if rows.start:
            plan.rows = [[(rows.start + row, chosen) for row, chosen in groups] for groups in plan.rows]
        plans.append(plan)
    return RowPlan(
        [groups for plan in plans for groups in plan.rows],
        [size for plan in plans for size in plan.sizes],
        sum(plan.num_unpacked for plan in plans),
    )


@dataclass
class Share:
    """
    What an epoch has of one source.

    Args:
        name (`str`): of the source.
        rows, usable (`int`): rows in the epoch, and usable rows of the source.
        conversations, tokens (`int`): in the epoch; each conversation's tokens whole, as without packing.
        rows_share, tokens_share (`float`): of those of all sources.
    """

    name: str
    rows: int
    usable: int
    conversations: int
    tokens: int
    rows_share: float
    tokens_share: float

    def __str__(self) -> str:
        return (
            f"{self.name} {self.rows:,} of {self.usable:,} rows ({self.rows_share:.1%}), {self.conversations:,} "
            f"conversations, {self.tokens:,} tokens ({self.tokens_share:.1%})"
        )


def shares(mixture: Mixture, parts: Sequence[SourceRows], max_length: int | None = None) -> list[Share]:
    """What an epoch has of each source."""
    rows = [mixture.lengths[mixture.of_source(part.name)] for part in parts]
    tokens = [sum(min(length, max_length or length) for row in of_source for length in row) for of_source in rows]
    return [
        Share(
            part.name,
            len(of_source),
            len(part.rows),
            sum(map(len, of_source)),
            number,
            len(of_source) / len(mixture.lengths),
            number / max(sum(tokens), 1),
        )
        for part, of_source, number in zip(parts, rows, tokens, strict=True)
    ]


# ---------------------------------------------------------------------- streams


def check_streams(sources: Sequence[DataSource], packing: str, mix: str) -> None:
    """
    Check what a mixture of streams can do.

    Raises:
        ValueError: if a source has no weight, `samples` or `repeat`, or `mix` is `batch` and rows are packed.
    """
    for name, source in zip(source_names(sources), sources, strict=True):
        if source.samples is not None or source.repeat != 1:
            raise ValueError(
                f"source {name!r} has `samples` or `repeat`, but a stream has no epoch to count them in, and starts "
                "over when it ends; give `weight` instead"
            )
        if source.weight is None:
            raise ValueError(f"source {name!r} has no weight, but a mixture of streams is drawn by weights; give one")
    weights(sources)
    if mix == "batch" and packing != "none":
        raise ValueError(
            "mix is 'batch', but rows of a stream are packed as they come; set mix: row, or packing: none, or "
            "streaming: false"
        )
