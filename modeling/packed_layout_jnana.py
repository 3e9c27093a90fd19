"""The layout of packed rows: which pieces a row consists of, and how their attention is computed without a mask.

A *piece* is a run of tokens that are attended to in the same way: the shared prefix of a segment, or one branch
(`packed_attention_jnana.py` explains segments, branches and positions). A prefix attends to itself, a branch to the
prefix of its segment and to itself, both causally. So the keys of a piece are one or two ranges of the row, and
nothing of the size sequence_length x sequence_length is needed.

The collator builds the layout on the host, in its own process where there are dataloader workers. It holds

- integer vectors for kernels that take all pieces in one call (`varlen_attn` of torch, flash attention), and
- for `scaled_dot_product_attention`, the list of calls that costs least: long pieces are cut, so that little of what
  the causal rule hides is computed, and short ones joined, whose calls would cost more than what a small mask hides.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch


# Padding attends to nothing that matters. Kernels that take every token get it in pieces of at most this length.
PADDING_PIECE = 128
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


class PackedLayout:
    """
    The pieces of the packed rows of a batch, made by [`PackedLayout.from_ids`].

    Movers of batches (Trainer, accelerate, `value.to(device)`, `pin_memory`) treat it like a tensor: the integer
    vectors move, the rest stays on the host.

    Args:
        pieces (`list[Piece]`): All pieces, row by row, without gaps.
        shape (`tuple[int, int]`): `(num_rows, sequence_length)`.

    Attributes:
        cu_seq_lens_q, cu_seq_lens_k (`torch.IntTensor` of shape `(num_pieces + 1,)`): Where the queries and the
            gathered keys of each piece begin, in the words of transformers' flash attention.
        max_length_q, max_length_k (`int`): Of the longest piece.
        key_indices (`torch.IntTensor` of shape `(num_keys,)` or `None`): For each piece its keys, as indices into the
            tokens of all rows; `None` where no piece has a prefix, and the keys are the tokens as they stand.
        table (`torch.LongTensor` of shape `(num_pieces, 6)`): The pieces, on the host.
    """

    def __init__(self, pieces: list[Piece], shape: tuple[int, int]):
        self.shape = shape
        self.table = torch.tensor(pieces, dtype=torch.long)
        lengths, prefixes = self.table[:, 2], self.table[:, 4]
        self.max_length_q = int(lengths.max())
        self.max_length_k = int((lengths + prefixes).max())
        self.cu_seq_lens_q, self.cu_seq_lens_k = (
            torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int() for sizes in (lengths, lengths + prefixes)
        )
        self.key_indices = _key_indices(self.table, shape[1]) if bool(prefixes.any()) else None
        self.plans: dict[str, list[list[Call]]] = {"cpu": plan_calls(pieces, shape, "cpu")}
        self.masks: dict[tuple, torch.Tensor] = {}

    @classmethod
    def from_ids(
        cls, segment_ids: torch.Tensor, branch_ids: torch.Tensor, position_ids: torch.Tensor
    ) -> "PackedLayout | None":
        """
        The layout of rows that are described token by token. Tensors on a GPU are read back.

        Args:
            segment_ids, branch_ids, position_ids (`torch.LongTensor` of shape `(num_rows, sequence_length)`): As in
                [`packed_mask_function`].

        Returns:
            [`PackedLayout`], or `None` where the tokens are not laid out in pieces: a segment or branch is in several
            places, a prefix stands behind a branch, or positions do not go on from token to token.
        """
        segments, branches, positions = (ids.cpu() for ids in (segment_ids, branch_ids, position_ids))
        padding = segments < 0
        segments, branches = segments.masked_fill(padding, -1), branches.masked_fill(padding, 0)
        same = (segments[:, 1:] == segments[:, :-1]) & (branches[:, 1:] == branches[:, :-1])
        begins = torch.nn.functional.pad(~same, (1, 0), value=True)
        if not bool((~same | padding[:, 1:] | (positions[:, 1:] == positions[:, :-1] + 1)).all()):
            return None
        num_rows, width = segments.shape
        places = begins.nonzero().tolist()
        first = zip(*(ids[begins].tolist() for ids in (segments, branches, positions)), strict=True)
        pieces: list[Piece] = []
        prefixes: dict[tuple[int, int], tuple[int, int, int | None]] = {}  # start, length, position of the branches
        seen = set()
        for (row, start), (next_row, next_start), (segment, branch, position) in zip(
            places, [*places[1:], [num_rows, 0]], first, strict=True
        ):
            length = (next_start if next_row == row else width) - start
            if segment < 0:
                pieces += _padding(row, start, length)
                continue
            if (row, segment, branch) in seen or (branch == 0 and (row, segment) in prefixes):
                return None
            seen.add((row, segment, branch))
            if branch == 0:
                prefixes[row, segment] = start, length, position + length
                pieces.append(Piece(row, start, length, start, 0, False))
                continue
            prefix_start, prefix_length, expected = prefixes.setdefault((row, segment), (start, 0, None))
            if expected is not None and position != expected:
                return None
            pieces.append(Piece(row, start, length, prefix_start, prefix_length, False))
        return cls(pieces, (num_rows, width))

    @classmethod
    def from_table(cls, table: torch.Tensor, shape: tuple[int, int]) -> "PackedLayout":
        """The layout whose `table` and `shape` are these."""
        return cls(pieces_in(table), shape)

    @property
    def device(self) -> torch.device:
        """`torch.device`: Where the vectors are."""
        return self.cu_seq_lens_q.device

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "PackedLayout":
        """The same with its vectors on `device`."""
        return self._with(lambda vector: vector.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedLayout":
        """The same with its vectors in pinned memory, from which copies to a GPU do not make the host wait."""
        return self._with(lambda vector: vector.pin_memory())

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PackedLayout":
        vectors = {
            name: vector if vector is None else change(vector)
            for name in ("cu_seq_lens_q", "cu_seq_lens_k", "key_indices")
            for vector in (getattr(self, name),)
        }
        if all(vector is getattr(self, name) for name, vector in vectors.items()):
            return self
        changed = object.__new__(PackedLayout)
        changed.__dict__ = {**self.__dict__, **vectors}
        return changed

    def equal(self, other: "PackedLayout") -> bool:
        """As `torch.Tensor.equal`: whether the other one has the same pieces."""
        return self.shape == other.shape and self.table.equal(other.table)

    def plan(self, device_type: str) -> list[list[Call]]:
        """The calls of each row. Those for a CPU were planned when the layout was made."""
        kind = "cpu" if device_type == "cpu" else "cuda"
        if kind not in self.plans:
            self.plans[kind] = plan_calls(pieces_in(self.table), self.shape, kind)
        return self.plans[kind]

    def mask(self, call: Call, window: int | None, device: torch.device) -> torch.Tensor | None:
        """
        Which keys the queries of a call attend to, kept for the other layers and for the backward pass.

        Args:
            call (`Call`): One of the plan.
            window (`int`, *optional*): How many tokens a token attends to, itself included, by position.
            device (`torch.device`): Where it is needed. It is made there, without copies from the host.

        Returns:
            `torch.BoolTensor` of shape `(num_queries, num_keys)`, or `None` if the causal rule is all.
        """
        if window is not None and window >= max(first + number for first, number in call.positions):
            window = None
        if window is None and not call.hidden and call.num_queries == call.num_keys:
            return None
        key = (call.num_queries, call.num_keys, call.hidden, window and call.positions, window, device)
        if key not in self.masks:
            # A mask that is made under `torch.inference_mode` could not be kept for a backward pass.
            with torch.inference_mode(False):
                self.masks[key] = make_mask(call, window, device)
        return self.masks[key]


def _padding(row: int, start: int, length: int) -> list[Piece]:
    """Padding as pieces of at most `PADDING_PIECE` tokens."""
    begins = range(start, start + length, PADDING_PIECE)
    return [Piece(row, at, min(PADDING_PIECE, start + length - at), at, 0, True) for at in begins]


def _key_indices(table: torch.Tensor, width: int) -> torch.Tensor:
    """For each piece the indices of its prefix, then its own, in the tokens of all rows."""
    rows, starts, lengths, prefix_starts, prefix_lengths, _ = table.unbind(1)
    # Each piece is two runs: its prefix, itself.
    firsts = torch.stack([rows * width + prefix_starts, rows * width + starts], dim=1).flatten()
    counts = torch.stack([prefix_lengths, lengths], dim=1).flatten()
    begins = counts.cumsum(0) - counts
    return ((firsts - begins).repeat_interleave(counts) + torch.arange(int(counts.sum()))).int()


# ---------------------------------------------------------------------- planning of calls


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


__all__ = ["Call", "PackedLayout", "Piece", "make_mask", "pieces_in", "plan_calls"]
