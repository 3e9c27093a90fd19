"""The layout of packed rows: which pieces a row consists of, and how their attention is computed without a mask.

A *piece* is a run of tokens that are attended to in the same way: the shared prefix of a segment, or one branch
(`packed_attention_jnana.py` explains segments, branches and positions). A prefix attends to itself, a branch to the
prefix of its segment and to itself, both causally. So the keys of a piece are one or two ranges of the row, and
nothing of the size sequence_length x sequence_length is needed.

The collator builds the layout on the host, in its own process where there are dataloader workers. It holds

- integer vectors for kernels that take all pieces in one call (`varlen_attn` of torch, flash attention), and
- for `scaled_dot_product_attention`, a list of calls (`packed_plan_jnana.py`).
"""

import torch

from .packed_kernels_jnana import attend_packed
from .packed_plan_jnana import Call, Piece, make_mask, pieces_in, plan_calls


# Padding attends to nothing that matters. Kernels that take every token get it in pieces of at most this length.
PADDING_PIECE = 128


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

    def _with(self, change) -> "PackedLayout":
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

    def attend(
        self,
        kernel: str,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        """
        The attention of packed rows.

        Args:
            kernel (`str`): `sdpa`, or one of `packed_kernels_jnana.py` that takes all pieces in one call.
            query (`torch.FloatTensor` of shape `(num_rows, num_heads, sequence_length, head_dim)`): Queries.
            key, value (`torch.FloatTensor` of shape `(num_rows, num_kv_heads, sequence_length, head_dim)`): Theirs.
            dropout (`float`): Of the attention weights.
            scaling (`float`, *optional*): Of the scores; by default `head_dim ** -0.5`.
            sliding_window (`int`, *optional*): As for [`PackedLayout.mask`].

        Returns:
            `torch.FloatTensor` of shape `(num_rows, sequence_length, num_heads, head_dim)`, 0 or of no meaning at
            padding.

        Raises:
            ValueError: If the layout is that of another batch.
        """
        if (query.shape[0], query.shape[2]) != self.shape:
            raise ValueError(
                f"`packed_layout` is of shape {self.shape}, but the rows are of shape "
                f"{(query.shape[0], query.shape[2])}; give the layout of this batch, or none."
            )
        return attend_packed(self, kernel, query, key, value, dropout, scaling, sliding_window)


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


__all__ = ["PackedLayout"]
