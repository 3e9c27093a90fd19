"""Which conversations share a row of a batch: planned before training, from their lengths alone.

A plan is a list of rows, each a list of trees, each tree some conversations of one data row. Rows are filled like
bins: of some thousand trees in random order the longest first, each into the row in which it leaves the least room.
The plan depends on the lengths and the seed and on nothing else, so every process has the same one and a resumed run
goes on with it; the stock sampler then shuffles its rows anew in every epoch.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import datasets
import numpy as np
from datasets import Features, List

from jnana.processing.processing_jnana import JnanaProcessor

from .checks import check_row, check_size, measure_rows
from .rows import ROW_FEATURES, BadSampleError, RowView, rows_at, select_conversations


PACKED_FEATURES = Features({"trees": List(dict(ROW_FEATURES))})

# Data rows of a stream that are packed together: enough to fill rows well, few enough to hold
STREAM_BUFFER = 256

# Trees that are put in order of length together: enough to fill rows to the brim
WINDOW = 2048


@dataclass
class RowPlan:
    """
    Rows to be packed.

    Args:
        rows (`list[list[tuple[int, list[int]]]]`): for each row its trees, as the number of a data row and the numbers
            of some of its conversations.
        sizes (`list[int]`): tokens of each row.
        num_unpacked (`int`): tokens of all conversations, one by one.
    """

    rows: list[list[tuple[int, list[int]]]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    num_unpacked: int = 0

    def __str__(self) -> str:
        tokens, longest = sum(self.sizes), max(self.sizes, default=0)
        padded = 1 - tokens / max(longest * len(self.rows), 1)
        saved = 1 - tokens / max(self.num_unpacked, 1)
        trees = sum(len(row) for row in self.rows) / max(len(self.rows), 1)
        return (
            f"{len(self.rows):,} packed rows of up to {longest} tokens with {trees:.1f} trees each, at most "
            f"{padded:.1%} of them padding; {tokens:,} tokens instead of {self.num_unpacked:,} ({saved:.0%} saved)"
        )


def plan_rows(
    lengths: Sequence[Sequence[int]],
    shared: Sequence[int] | None,
    max_row_tokens: int,
    *,
    max_length: int | None = None,
    seed: int | None = None,
) -> RowPlan:
    """
    Fill rows with trees.

    Args:
        lengths (`Sequence[Sequence[int]]`): tokens of every conversation of every data row.
        shared (`Sequence[int]`, *optional*): tokens that the conversations of each data row share
            ([`shared_length`]); a data row is then one tree, or as few trees as fit into rows, each with the shared
            tokens again. Not given: every conversation is a tree of its own.
        max_row_tokens (`int`): tokens a row may have.
        max_length (`int`, *optional*): conversations are cut to it.
        seed (`int`, *optional*): of the order in which trees are taken; not given: that of the data.

    Returns:
        `RowPlan`: the rows.

    Raises:
        ValueError: if a conversation is longer than a row.
    """
    trees, costs, plan = [], [], RowPlan()
    for row, whole in enumerate(lengths):
        sizes = [length if max_length is None else min(length, max_length) for length in whole]
        plan.num_unpacked += sum(sizes)
        if max(sizes) > max_row_tokens:
            raise ValueError(
                f"max_row_tokens is {max_row_tokens}, but a conversation has {max(sizes)} tokens; raise it, or lower "
                "max_length, which cuts long answers"
            )
        for conversations, cost in _split(sizes, 0 if shared is None else shared[row], max_row_tokens, shared is None):
            trees.append((row, conversations))
            costs.append(cost)
    order: Iterable[int] = range(len(trees))
    if seed is not None:
        shuffled = np.random.default_rng(seed).permutation(len(trees)).tolist()
        windows = (shuffled[i : i + WINDOW] for i in range(0, len(shuffled), WINDOW))
        order = [tree for window in windows for tree in longest_first(costs, window)]
    for members, size in fill_rows(costs, order, max_row_tokens):
        plan.rows.append([trees[index] for index in members])
        plan.sizes.append(size)
    return plan


def longest_first(costs: Sequence[int], trees: Iterable[int]) -> list[int]:
    """Short trees fill what long ones leave; among equals the order stays."""
    return sorted(trees, key=lambda tree: -costs[tree])


def _split(sizes: list[int], shared: int, most: int, apart: bool) -> list[tuple[list[int], int]]:
    """One data row as trees of at most `most` tokens: their conversations, and the tokens of each tree."""
    found: list[tuple[list[int], int]] = []
    members: list[int] = []
    cost = 0
    for index, size in enumerate(sizes):
        added = size - shared if members else size
        if members and (apart or cost + added > most):
            found.append((members, cost))
            members, cost, added = [], 0, size
        members.append(index)
        cost += added
    return [*found, (members, cost)]


def fill_rows(costs: Sequence[int], order: Iterable[int], most: int) -> list[tuple[list[int], int]]:
    """
    Best fit: each tree into the fullest row that has room for it.

    Args:
        costs (`Sequence[int]`): tokens of each tree.
        order (`Iterable[int]`): the trees, in the order in which they are taken.
        most (`int`): tokens a row may have.

    Returns:
        `list[tuple[list[int], int]]`: for each row its trees, and its tokens.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    open_rows: list[tuple[int, int]] = []  # (room left, row), sorted
    for index in order:
        place = bisect_left(open_rows, (costs[index], -1))
        if place < len(open_rows):
            left, row = open_rows.pop(place)
        else:
            left, row = most, len(rows)
            rows.append([])
            room.append(most)
        rows[row].append(index)
        room[row] = left - costs[index]
        if room[row] > 0:
            insort(open_rows, (room[row], row))
    return [(members, most - left) for members, left in zip(rows, room, strict=True)]


def packed_rows(rows: datasets.Dataset, plan: RowPlan) -> datasets.Dataset:
    """
    The planned rows as a data set, for [`JnanaCollator`] with the same `packing`.

    Args:
        rows (`Dataset`): the data rows that the plan is about, of `ROW_FEATURES`.
        plan (`RowPlan`): of their lengths.

    Returns:
        `Dataset`: one column `trees`, a list of rows of `ROW_FEATURES`, taken from `rows` when asked for. To select
            from, or to shuffle.
    """
    trees = [[{"row": row, "conversations": chosen} for row, chosen in trees] for trees in plan.rows]
    return datasets.Dataset.from_dict({"trees": trees}).with_transform(_TreesOf(rows))


class _TreesOf(RowView):
    """Looks trees up."""

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        if "trees" not in batch:  # some other column was asked for by itself
            return batch
        needed = sorted({tree["row"] for trees in batch["trees"] for tree in trees})
        taken = dict(zip(needed, rows_at(self.rows, needed), strict=True))
        found = [
            [select_conversations(taken[tree["row"]], tree["conversations"]) for tree in trees]
            for trees in batch["trees"]
        ]
        return {**batch, "trees": found}


def packed_stream(
    rows: datasets.IterableDataset,
    processor: JnanaProcessor,
    *,
    share: bool,
    max_row_tokens: int,
    max_length: int | None = None,
) -> datasets.IterableDataset:
    """
    Pack a stream while it is read, from a buffer of a few hundred data rows: no other length need be known. Each
    buffer is packed by itself, so the same stream gives the same rows, after a resume too.

    Args:
        rows (`IterableDataset`): data rows of `ROW_FEATURES`.
        processor (`JnanaProcessor`): measures them.
        share (`bool`): whether conversations of a data row share their beginning (`packing: shared_image`).
        max_row_tokens (`int`): tokens a row may have.
        max_length (`int`, *optional*): conversations are cut to it.

    Returns:
        `IterableDataset`: one column `trees`. Data rows that can't be used are rows by themselves, for the collator to
            refuse or leave out.
    """
    return rows.map(
        _StreamPacker(processor, share, max_row_tokens, max_length),
        batched=True,
        batch_size=STREAM_BUFFER,
        remove_columns=list(ROW_FEATURES),
        features=PACKED_FEATURES,
    )


class _StreamPacker:
    """Packs one buffer of rows; a class, so that it can be sent to dataloader workers."""

    def __init__(self, processor: JnanaProcessor, share: bool, max_row_tokens: int, max_length: int | None):
        self.processor = processor
        self.share, self.max_row_tokens, self.max_length = share, max_row_tokens, max_length

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        rows = [{name: batch[name][i] for name in ROW_FEATURES} for i in range(len(batch["source"]))]
        good, bad = [], []
        for row in rows:
            try:
                check_row(row)
                good.append(row)
            except BadSampleError:
                bad.append(row)
        fitting = []
        for row, measured in zip(good, measure_rows(good, self.processor), strict=True):
            try:
                for size in measured.sizes:
                    check_size(*size, self.max_length, row["source"])
                fitting.append((row, measured))
            except BadSampleError:
                bad.append(row)
        plan = plan_rows(
            [measured.lengths for _, measured in fitting],
            [measured.shared for _, measured in fitting] if self.share else None,
            self.max_row_tokens,
            max_length=self.max_length,
        )
        packed = [[select_conversations(fitting[row][0], chosen) for row, chosen in trees] for trees in plan.rows]
        return {"trees": [*packed, *([row] for row in bad)]}
