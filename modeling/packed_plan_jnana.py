"""Plans the calls of `scaled_dot_product_attention` that compute the attention of packed rows at the least cost.

Long pieces are cut, so that little of what the causal rule hides is computed, and short ones joined, whose calls would
cost more than what a small mask hides.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch


# What a call of `scaled_dot_product_attention` costs beside its work, forward and backward, as a number of pairs of a
# query and a key. On a CPU about 0.5 ms of one thread, at 9,500 pairs a ms (8 heads of 64, float32, two-core Xeon): of
# 1,500, 3,000 and 5,000 the last was fastest over the shapes of benchmarks/packed_attention.py. A GPU computes more
# pairs in the time that it takes to launch a call; its number is an estimate, for GPUs without a kernel for pieces.
CALL_COST = {"cpu": 5_000, "cuda": 200_000}
# Long pieces may be cut at multiples of this number of tokens.
GRID = {"cpu": 128, "cuda": 512}
COPY_COST = 16  # of copying keys and values of one token, in pairs


class Piece(NamedTuple):
    """
    A run of tokens of one row.

    Args:
        row, start, length (`int`): Which tokens.
        prefix_start, prefix_length (`int`): The prefix that a branch attends to; length 0 if there is none.
        is_padding (`bool`): Padding, whose attention has no meaning.
    """

    row: int
    start: int
    length: int
    prefix_start: int
    prefix_length: int
    is_padding: bool


def pieces_in(table: torch.Tensor) -> list[Piece]:
    """The pieces in a tensor of one row for each, with a column for each field."""
    return [
        Piece(row, start, length, prefix_start, prefix_length, bool(is_padding))
        for row, start, length, prefix_start, prefix_length, is_padding in table.tolist()
    ]


class Call(NamedTuple):
    """
    One call of `scaled_dot_product_attention`. The queries are the last `num_queries` of the keys.

    Args:
        num_queries (`int`): Tokens of the row, from where the call before has ended.
        keys (`tuple[tuple[int, int], ...]`): Ranges of the row, as (start, end); empty for padding.
        hidden (`tuple[tuple[int, int, int, int], ...]`): What is hidden beside later tokens, as (first query, last
            query + 1, first key, last key + 1), counted within the call.
        positions (`tuple[tuple[int, int], ...]`): Positions of the keys within their segment, as runs (first, number).
    """

    num_queries: int
    keys: tuple[tuple[int, int], ...]
    hidden: tuple[tuple[int, int, int, int], ...] = ()
    positions: tuple[tuple[int, int], ...] = ()

    @property
    def num_keys(self) -> int:
        return sum(end - start for start, end in self.keys)


def make_mask(call: Call, window: int | None, device: torch.device) -> torch.Tensor:
    """See [`PackedLayout.mask`]."""
    queries, keys = call.num_queries, call.num_keys
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(keys - queries)
    for top, bottom, left, right in call.hidden:
        mask[top:bottom, left:right] = False
    if window is not None:
        runs = [torch.arange(first, first + number, device=device) for first, number in call.positions]
        positions = torch.cat(runs)
        mask &= positions[keys - queries :, None] - positions[None, :] < window
    return mask


@dataclass(frozen=True)
class _Segment:
    """A piece of a row or, of a long piece, a part: tokens that one call computes together."""

    start: int
    end: int
    piece_start: int
    group_start: int  # of the prefix, or of the piece where there is none
    prefix_end: int  # `group_start` where there is none

    @property
    def from_group_start(self) -> bool:
        """Whether the keys are all tokens from the beginning of the group."""
        return self.piece_start <= self.prefix_end

    @property
    def needed(self) -> int:
        """Pairs of queries and keys, if this were a call."""
        prefix = 0 if self.from_group_start else self.prefix_end - self.group_start
        keys_start = self.group_start if self.from_group_start else self.piece_start
        return (self.end - self.start) * (prefix + self.end - keys_start)


def plan_calls(pieces: list[Piece], shape: tuple[int, int], device_type: str) -> list[list[Call]]:
    """
    The calls of `scaled_dot_product_attention` that compute the attention of packed rows at the least cost.

    A call may be a part of a piece, a piece, several branches of a segment, or several whole segments. Each pair of a
    query and a key that it computes counts, hidden or not, and each call counts `CALL_COST` pairs.

    Args:
        pieces (`list[Piece]`): All pieces, row by row, without gaps.
        shape (`tuple[int, int]`): `(num_rows, sequence_length)`.
        device_type (`str`): `cpu` or `cuda`, for the cost of a call.

    Returns:
        `list[list[Call]]`: For each row, calls whose queries are the tokens of the row one after the other.
    """
    planned: list[list[Call]] = [[] for _ in range(shape[0])]
    for (row, is_padding), run in groupby(pieces, key=lambda piece: (piece.row, piece.is_padding)):
        if is_padding:
            planned[row].append(Call(sum(piece.length for piece in run), ()))
            continue
        segments = [segment for piece in run for segment in _cut(piece, GRID[device_type])]
        planned[row] += [_make_call(chosen) for chosen in _cheapest(segments, device_type)]
    return planned


def _cut(piece: Piece, grid: int) -> list[_Segment]:
    """A piece in parts that end at multiples of `grid`."""
    start, end = piece.start, piece.start + piece.length
    group_start = piece.prefix_start if piece.prefix_length else start
    prefix_end = group_start + piece.prefix_length
    # Where a prefix is followed by its first branch, both are cut at the same multiples.
    origin = group_start if start <= prefix_end else start
    inner = range(origin + ((start - origin) // grid + 1) * grid, end, grid)
    cuts = [start, *inner, end]
    return [
        _Segment(begin, stop, start, group_start, prefix_end) for begin, stop in zip(cuts[:-1], cuts[1:], strict=True)
    ]


def _cheapest(segments: list[_Segment], device_type: str) -> list[list[_Segment]]:
    """Consecutive segments joined into calls at the least total cost, by dynamic programming."""
    price = CALL_COST[device_type]
    best: list[float] = [0.0] * (len(segments) + 1)  # of the segments from here on
    choice = [0] * len(segments)
    for first in range(len(segments) - 1, -1, -1):
        head, needed, best[first] = segments[first], 0, float("inf")
        for last in range(first, len(segments)):
            tail = segments[last]
            one_group = tail.group_start == head.group_start
            if not one_group and head.start != head.group_start:
                break
            needed += tail.needed
            cost = _pairs_computed(head, tail, device_type)
            if last > first and cost - needed > 2 * price * (last - first + 1):  # and more so with further segments
                break
            if price + cost + best[last + 1] < best[first]:
                best[first], choice[first] = price + cost + best[last + 1], last + 1
    joined, first = [], 0
    while first < len(segments):
        joined.append(segments[first : choice[first]])
        first = choice[first]
    return joined


def _pairs_computed(head: _Segment, tail: _Segment, device_type: str) -> float:
    """The cost of a call from one segment to another, without that of calling."""
    queries = tail.end - head.start
    if head.from_group_start:
        keys = tail.end - head.group_start
        # Kernels of GPUs skip what the causal rule hides, if nothing else is hidden.
        one_piece = tail.group_start == head.group_start and tail.from_group_start
        causal = device_type != "cpu" and head.start == head.group_start and one_piece
        return queries * keys / 2 if causal else queries * keys
    keys = head.prefix_end - head.group_start + tail.end - head.piece_start
    return queries * keys + COPY_COST * keys


def _make_call(segments: list[_Segment]) -> Call:
    head, end = segments[0], segments[-1].end
    keys_start = head.group_start if head.from_group_start else head.piece_start
    keys: tuple[tuple[int, int], ...] = ((keys_start, end),)
    prefix = 0
    if not head.from_group_start:
        prefix = head.prefix_end - head.group_start
        keys = ((head.group_start, head.prefix_end), *keys)
    offset = prefix - keys_start  # from an index in the row to one among the keys
    hidden, positions = [], []
    if prefix:
        positions.append((0, prefix))
    # keys before the first query: of the piece that the call continues, and of the prefix before a first branch
    if keys_start < head.start:
        positions.append((prefix, head.start - keys_start))
    for segment in segments:
        top, bottom = segment.start - head.start, segment.end - head.start
        before = segment.group_start if head.from_group_start else head.prefix_end
        for left, right in ((keys_start, before), (max(segment.prefix_end, keys_start), segment.piece_start)):
            if left < right:
                hidden.append((top, bottom, left + offset, right + offset))
        within = segment.start - segment.piece_start
        positions.append((segment.prefix_end - segment.group_start + within, bottom - top))
    return Call(end - head.start, keys, tuple(hidden), tuple(positions))


__all__ = ["Call", "Piece", "make_mask", "pieces_in", "plan_calls"]
