"""The attention of packed rows as one operation of torch, for torch.compile.

A compiled graph with the calls of each piece would be another graph for each layout, and torch stops compiling after a
few. The operation takes the pieces as a tensor on the host and plans its calls when it runs, so a new layout neither
breaks the graph nor compiles it again.
"""

from functools import lru_cache

import torch

from .packed_kernels_jnana import add_to_ranges, attend_pieces
from .packed_layout_jnana import PackedLayout
from .packed_plan_jnana import Call


BLOCK = 512  # queries at once in the backward pass


@lru_cache(maxsize=8)
def _layout_of(table: tuple[tuple[int, ...], ...], shape: tuple[int, int]) -> PackedLayout:
    return PackedLayout.from_table(torch.tensor(table), shape)


def _layout_from(table: torch.Tensor, query: torch.Tensor) -> PackedLayout:
    return _layout_of(tuple(map(tuple, table.tolist())), (query.shape[0], query.shape[2]))


def _attend_op(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor, scaling: float, window: int
) -> torch.Tensor:
    layout = _layout_from(table, query)
    return attend_pieces(layout, query, key, value, 0.0, scaling, window or None).contiguous()


def _gradients_op(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    table: torch.Tensor,
    scaling: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients, by the formulas: an operation may not use autograd inside."""
    layout = _layout_from(table, query)
    groups = query.shape[1] // key.shape[1]
    totals = tuple(torch.zeros_like(states, memory_format=torch.contiguous_format) for states in (query, key, value))
    for row, calls in enumerate(layout.plan(query.device.type)):
        start = 0
        for call in calls:
            for begin in range(0, call.num_queries if call.keys else 0, BLOCK):
                end = min(begin + BLOCK, call.num_queries)
                at = (slice(row, row + 1), slice(None), slice(start + begin, start + end))
                mask = layout.mask(call, window or None, query.device)
                if mask is None:
                    mask = torch.ones(call.num_queries, call.num_queries, dtype=torch.bool, device=query.device).tril()
                keys, values = (_ranges(states[row : row + 1], call, groups) for states in (key, value))
                found = _block_gradients(gradient[at], query[at], keys, values, mask[begin:end], scaling)
                totals[0][at] = found[0]
                for total, added in zip(totals[1:], found[1:], strict=True):
                    add_to_ranges(total[row : row + 1], call, added.unflatten(1, (-1, groups)).sum(2))
            start += call.num_queries
    return totals  # type: ignore[return-value]


def _ranges(states: torch.Tensor, call: Call, groups: int) -> torch.Tensor:
    return torch.cat([states[:, :, start:end] for start, end in call.keys], dim=2).repeat_interleave(groups, dim=1)


def _block_gradients(gradient, query, key, value, mask, scaling) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    gradient, query, key, value = (states.to(wide) for states in (gradient, query, key, value))
    scores = (query @ key.transpose(-1, -2)) * scaling
    weights = scores.masked_fill_(~mask, float("-inf")).softmax(-1)
    of_weights = gradient @ value.transpose(-1, -2)
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * scaling
    found = of_scores @ key, of_scores.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ gradient
    return tuple(states.to(dtype) for states in found)  # type: ignore[return-value]


def register_operation() -> None:
    """Define `jnana::packed_attention`, once in a process, which may hold the code of several checkpoints."""
    if hasattr(torch.ops.jnana, "packed_attention"):
        return
    attend = torch.library.custom_op("jnana::packed_attention", _attend_op, mutates_args=())
    gradients = torch.library.custom_op("jnana::packed_attention_gradients", _gradients_op, mutates_args=())
    attend.register_fake(lambda query, key, value, *rest: query.new_empty((*query.shape[:-1], value.shape[-1])))
    gradients.register_fake(lambda gradient, *states_and_rest: tuple(map(_empty, states_and_rest[:3])))

    def setup_context(ctx, inputs, output):
        *tensors, ctx.scaling, ctx.window = inputs
        ctx.save_for_backward(*tensors)

    def backward(ctx, gradient):
        found = torch.ops.jnana.packed_attention_gradients(gradient, *ctx.saved_tensors, ctx.scaling, ctx.window)
        return *found, None, None, None

    attend.register_autograd(backward, setup_context=setup_context)


def _empty(states: torch.Tensor) -> torch.Tensor:
    return states.new_empty(states.shape)


__all__ = ["register_operation"]
