"""How much work a batch is: its tokens, conversations and images, counted where the batch is made.

The numbers are plain integers that the collator has anyway. They travel beside the tensors, so that no part of a
training step reads a tensor back from the GPU to count.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .packing import IGNORED, PackedRow


@dataclass(frozen=True)
class SourceCounts:
    """
    The share that one source of a mixture has in a batch.

    Args:
        name (`str`): of the source.
        conversations, tokens, supervised (`int`): as in [`BatchCounts`].
    """

    name: str
    conversations: int
    tokens: int
    supervised: int


@dataclass(frozen=True)
class BatchCounts:
    """
    The size of a batch.

    Args:
        slots (`int`): positions of all rows, padding included.
        runs (`tuple[tuple[int, int], ...]`): the tokens without padding, as `(first position, number)` of each run of
            consecutive positions. A token at position `p` attends to `p + 1` tokens, itself among them, however the
            row is packed: positions restart with every conversation, and a branch goes on from its prefix.
        supervised (`int`): tokens with a label.
        conversations (`int`): conversations (text corpora: documents, or blocks).
        images (`int`): images, each once.
        encoded_views (`int`): views of images that go through the vision tower; none if features are given.
        projected_views (`int`): views whose features go through the projector.
        sources (`tuple[SourceCounts, ...]`): in a mixture, the counts of each source in the batch.
        label_sources (`tuple[tuple[int, int], ...]`): the sources of the labels in the order of their positions, as
            `(index in sources, number)` of each run of labels; the index of a row without a source is that of none.
    """

    slots: int
    runs: tuple[tuple[int, int], ...]
    supervised: int
    conversations: int
    images: int = 0
    encoded_views: int = 0
    projected_views: int = 0
    sources: tuple[SourceCounts, ...] = ()
    label_sources: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens without padding; those of a shared prefix, and so of its image, count once."""
        return sum(number for _, number in self.runs)

    def attention_pairs(self, window: int | None = None) -> int:
        """The pairs of a token and a token that it attends to, in one layer.

        Args:
            window (`int`, *optional*): a sliding window: a token attends to that many tokens at most.
        """
        return sum(_pairs_before(start + number, window) - _pairs_before(start, window) for start, number in self.runs)


def _pairs_before(position: int, window: int | None) -> int:
    """The pairs of all tokens before a position, with positions from 0."""
    if window is None or position <= window:
        return position * (position + 1) // 2
    return window * (window + 1) // 2 + (position - window) * window


class CountedBatch(dict[str, Any]):
    """
    A batch of tensors with its counts as the attribute `counts`. `model(**batch)` passes the tensors only.

    Args:
        batch (`Mapping[str, torch.Tensor]`): the tensors.
        counts (`BatchCounts`, *optional*): of the batch; a copy made by accelerate, on another device, has none.
    """

    def __init__(self, batch: Mapping[str, Any], counts: BatchCounts | None = None):
        super().__init__(batch)
        self.counts = counts

    def __reduce__(self):  # workers of a dataloader send it to the process that trains
        return type(self), (dict(self), self.counts)


def position_runs(positions: Iterable[int]) -> list[tuple[int, int]]:
    """Positions of a row, without padding, as `(first position, number)` of each run of consecutive ones."""
    runs: list[tuple[int, int]] = []
    start = number = 0
    for position in positions:
        if number and position == start + number:
            number += 1
            continue
        if number:
            runs.append((start, number))
        start, number = position, 1
    return [*runs, (start, number)] if number else runs


def count_rows(
    rows: Sequence[PackedRow], conversations: int, batch: Mapping[str, torch.Tensor], sources: Sequence[str] = ()
) -> BatchCounts:
    """
    The counts of a collator's batch.

    Args:
        rows (`Sequence[PackedRow]`): the rows of the batch before padding.
        conversations (`int`): conversations in them.
        batch (`Mapping[str, torch.Tensor]`): the tensors made of them; only their shapes are read.
        sources (`Sequence[str]`, *optional*): the names of the sources of a mixture.
    """
    return BatchCounts(
        slots=batch["input_ids"].numel(),
        runs=tuple(run for row in rows for run in position_runs(row.positions)),
        supervised=sum(len(row.labels) - row.labels.count(IGNORED) for row in rows),
        conversations=conversations,
        **count_images(batch),
        **count_sources(rows, sources),
    )


def count_sources(rows: Sequence[PackedRow], sources: Sequence[str]) -> dict[str, Any]:
    """The fields of [`BatchCounts`] about sources; none if no row comes from one of them."""
    if not any(name in sources for row in rows for name, _ in row.origins):
        return {}
    found = {name: [0, 0, 0] for name in (*sources, None)}  # None: a row that stands in for skipped ones
    place = {name: index for index, name in enumerate(found)}
    runs: list[tuple[int, int]] = []
    for row in rows:
        end = 0
        for segment, (name, conversations) in enumerate(row.origins):
            start, end = end, bisect_right(row.segments, segment, lo=end)  # segments follow one another
            supervised = end - start - row.labels[start:end].count(IGNORED)
            for index, number in enumerate((conversations, end - start, supervised)):
                found[name][index] += number
            before = runs.pop()[1] if runs and runs[-1][0] == place[name] else 0
            runs.append((place[name], before + supervised))
    counts = tuple(SourceCounts(name, *found[name]) for name in sources)
    return {"sources": counts, "label_sources": tuple(runs)}


def count_tensors(batch: Mapping[str, Any]) -> BatchCounts:
    """
    The counts of a batch of a text corpus, from its tensors, which must be on the CPU.

    Args:
        batch (`Mapping[str, torch.Tensor]`): `input_ids` and `labels` `(batch_size, sequence_length)`; padding is
            where `attention_mask` is 0, or where `position_ids` has a single 0, as [`pack_documents`] pads rows.
    """
    ids, labels = batch["input_ids"], batch.get("labels")
    rows = [list(range(ids.shape[1]))] * ids.shape[0]
    if "position_ids" in batch:
        rows = batch["position_ids"].tolist()
    elif isinstance(batch.get("attention_mask"), torch.Tensor) and batch["attention_mask"].ndim == 2:
        rows = [list(range(number)) for number in batch["attention_mask"].sum(1).tolist()]
    runs = [run for row in rows for run in position_runs(row)]
    if "position_ids" in batch:
        runs = [(start, number) for start, number in runs if number > 1]
    return BatchCounts(
        slots=ids.numel(),
        runs=tuple(runs),
        supervised=0 if labels is None else int((labels[:, 1:] != IGNORED).sum()),
        conversations=len(runs),
        **count_images(batch),
    )


def count_images(batch: Mapping[str, Any]) -> dict[str, int]:
    """The fields of [`BatchCounts`] about images, from the shapes of a batch's tensors."""
    pixels, features = batch.get("pixel_values"), batch.get("image_features")
    given = pixels if features is None else features
    if given is None:
        return {}
    views = given.shape[0] * given.shape[1] if given is pixels and given.ndim == 5 else given.shape[0]
    sizes = batch.get("image_sizes")
    return {
        "images": views if sizes is None else len(sizes),
        "encoded_views": 0 if pixels is None else views,
        "projected_views": views,
    }
