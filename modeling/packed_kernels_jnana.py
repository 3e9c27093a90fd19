"""Computes the attention of packed rows piece by piece, on any device, or by one kernel that takes all pieces.

- `sdpa`: the calls that `packed_layout_jnana.py` planned, each one `scaled_dot_product_attention`. Runs everywhere.
- `varlen`: torch's `varlen_attn` for GPUs of compute capability 8.0 and higher, in 16 bits; used after a trial.
- `flash_attention_2`, `flash_attention_3`: those of the packages `flash_attn` and `flash_attn_3`.

The last three take the keys of each piece gathered one after the other, and align the causal triangle at the end.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from .packed_layout_jnana import Call, PackedLayout, Piece


try:  # not in older releases of torch
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

FLASH_FUNCTIONS: dict[int, Callable[..., Any]] = {}  # by version, of the packages that are installed
# A build for another torch is found and can't be imported. It must stop only those who ask for it.
if is_flash_attn_2_available():
    try:
        from flash_attn import flash_attn_varlen_func

        FLASH_FUNCTIONS[2] = flash_attn_varlen_func
    except ImportError:
        pass
if is_flash_attn_3_available():
    try:
        from flash_attn_interface import flash_attn_varlen_func as flash_attn_3_varlen_func

        FLASH_FUNCTIONS[3] = flash_attn_3_varlen_func
    except ImportError:
        pass

TOLERANCE = 0.02  # relative, in bfloat16, which rounds to 0.4 %; a causal triangle at the wrong end differs by about 1
BLOCK = 512  # queries at once in the backward pass of the operation


def attend_packed(
    layout: PackedLayout,
    kernel: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """
    The attention of packed rows.

    Args:
        layout ([`PackedLayout`]): Of the rows.
        kernel (`str`): `sdpa`, or one of [`VARLEN_KERNELS`]; `sdpa` replaces one that does not take these tensors, or
            dropout.
        query (`torch.FloatTensor` of shape `(num_rows, num_heads, sequence_length, head_dim)`): Queries.
        key, value (`torch.FloatTensor` of shape `(num_rows, num_kv_heads, sequence_length, head_dim)`): Theirs.
        dropout (`float`): Of the attention weights.
        scaling (`float`, *optional*): Of the scores; by default `head_dim ** -0.5`.
        window (`int`, *optional*): As for [`PackedLayout.mask`].

    Returns:
        `torch.FloatTensor` of shape `(num_rows, sequence_length, num_heads, head_dim)`, 0 or of no meaning at
        padding.

    Raises:
        ValueError: If the layout is that of another batch.
    """
    if (query.shape[0], query.shape[2]) != layout.shape:
        raise ValueError(
            f"`packed_layout` is of shape {layout.shape}, but the rows are of shape "
            f"{(query.shape[0], query.shape[2])}; give the layout of this batch, or none."
        )
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings leave queries and keys in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if kernel != "sdpa" and dropout == 0.0 and takes(query):
        return attend_varlen(layout, VARLEN_KERNELS[kernel], query, key, value, scaling, window)
    if torch.compiler.is_compiling() and dropout == 0.0:
        output = torch.ops.jnana.packed_attention(query, key, value, layout.table, scaling, window or 0)
    else:
        output = attend_pieces(layout, query, key, value, dropout, scaling, window)
    return output.transpose(1, 2)


# ---------------------------------------------------------------------- one call for all pieces


def takes(query: torch.Tensor) -> bool:
    """Whether the kernels for all pieces take such tensors: on a GPU, in 16 bits."""
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)


def attend_varlen(
    layout: PackedLayout,
    attend: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """[`attend_packed`] by a kernel of [`VARLEN_KERNELS`]; the layout must be on the device of the tensors."""
    rows, _, width, _ = query.shape
    tokens, keys, values = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    if layout.key_indices is not None:
        keys, values = (states.index_select(0, layout.key_indices) for states in (keys, values))
    lengths = (layout.cu_seq_lens_q, layout.cu_seq_lens_k, layout.max_length_q, layout.max_length_k)
    output = attend(tokens, keys, values, *lengths, scaling, window)
    return output.unflatten(0, (rows, width))


def attend_torch(query, key, value, starts_q, starts_k, longest_q, longest_k, scaling, window) -> torch.Tensor:
    # (-1, 0) is torch's way to say causal, (n, 0) a window of n tokens before the token itself
    size = (-1 if window is None else window - 1, 0)
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    starts = starts_q, starts_k
    return varlen_attn(query, key, value, *starts, longest_q, longest_k, scale=scaling, window_size=size, **grouped)


def _attend_flash(
    version: int, query, key, value, starts_q, starts_k, longest_q, longest_k, scaling, window
) -> torch.Tensor:
    if version not in FLASH_FUNCTIONS:
        raise ValueError(
            f"`attn_implementation` is 'flash_attention_{version}', whose package is not installed. Leave it out, or "
            "install the package; the kernels of the Hub do not take packed rows."
        )
    output = FLASH_FUNCTIONS[version](
        query,
        key,
        value,
        cu_seqlens_q=starts_q,
        cu_seqlens_k=starts_k,
        max_seqlen_q=longest_q,
        max_seqlen_k=longest_k,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )
    return output[0] if isinstance(output, tuple) else output


VARLEN_KERNELS: dict[str, Callable[..., torch.Tensor]] = {
    "varlen": attend_torch,
    "flash_attention_2": partial(_attend_flash, 2),
    "flash_attention_3": partial(_attend_flash, 3),
}


# ---------------------------------------------------------------------- pieces


class _KeyRanges(torch.autograd.Function):
    """The keys and the values of each call. As slices and concatenations each would get a gradient as long as the
    row, most of it 0, to be added up; here all gradients are added into one."""

    @staticmethod
    def forward(ctx, key, value, calls):
        ctx.calls, ctx.shapes = calls, (key.shape, value.shape)
        found = []
        for states in (key, value):
            for call in calls:
                parts = [states[:, :, start:end] for start, end in call.keys]
                found.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=2))
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        totals = []
        for index, shape in enumerate(ctx.shapes):
            of_calls = gradients[index * len(ctx.calls) : (index + 1) * len(ctx.calls)]
            totals.append(of_calls[0].new_zeros(shape))
            for call, gradient in zip(ctx.calls, of_calls, strict=True):
                add_to_ranges(totals[-1], call, gradient)
        return *totals, None


def add_to_ranges(total: torch.Tensor, call: Call, gradient: torch.Tensor) -> None:
    """Add the gradient of a call's keys to that of the row."""
    offset = 0
    for start, end in call.keys:
        total[:, :, start:end] += gradient[:, :, offset : offset + end - start]
        offset += end - start


def attend_pieces(
    layout: PackedLayout,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """The planned calls of `scaled_dot_product_attention`; shaped like `query`, 0 at padding."""
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda:  # no fast kernel of a GPU takes grouped heads with a mask
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
        grouped = False
    # a split of one part would be copied in the backward pass
    by_row = zip(*(states.split(1) if len(states) > 1 else [states] for states in (query, key, value)), strict=True)
    outputs: list[torch.Tensor] = []
    for calls, (row_query, row_key, row_value) in zip(layout.plan(query.device.type), by_row, strict=True):
        if len(calls) == 1 and calls[0].keys == ((0, query.shape[2]),):
            outputs.append(_attend(layout, calls[0], row_query, row_key, row_value, dropout, scaling, window, grouped))
            continue
        attending = [call for call in calls if call.keys]
        queries = row_query.split([call.num_queries for call in calls], dim=2)
        found = _KeyRanges.apply(row_key, row_value, attending)
        keys, values = found[: len(attending)], found[len(attending) :]
        states = zip(keys, values, strict=True)
        of_row = [
            _attend(layout, call, of_call, *next(states), dropout, scaling, window, grouped)
            if call.keys
            else of_call.new_zeros((*of_call.shape[:-1], value.shape[-1]))  # padding
            for call, of_call in zip(calls, queries, strict=True)
        ]
        outputs.append(torch.cat(of_row, dim=2))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend(layout, call, query, key, value, dropout, scaling, window, grouped) -> torch.Tensor:
    mask = layout.mask(call, window, query.device)
    return functional.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )


# ---------------------------------------------------------------------- pieces as one operation, for torch.compile
#
# A compiled graph with the calls of each piece would be another graph for each layout, and torch stops compiling after
# a few. The operation takes the pieces as a tensor on the host and plans its calls when it runs, so a new layout
# neither breaks the graph nor compiles it again.


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


# ---------------------------------------------------------------------- whether `varlen_attn` may be used


@lru_cache
def varlen_problem(
    device: torch.device, num_heads: int, num_kv_heads: int, head_dim: int, has_window: bool
) -> str | None:
    """Why `varlen_attn` of torch can't be used on a device for layers of this shape; `None` if it can. Tried once."""
    if device.type != "cuda":
        return f"varlen_attn of torch does not run on {device.type}"
    if varlen_attn is None:
        return f"torch {torch.__version__} has no varlen_attn"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"varlen_attn of torch needs compute capability 8.0 and this GPU has {capability[0]}.{capability[1]}"
    return probe_varlen(device, num_heads, num_kv_heads, head_dim, has_window)


def probe_varlen(
    device: torch.device,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    has_window: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> str | None:
    """Compare outputs and gradients of `varlen_attn` with those of pieces on a CPU, for random tensors of small rows
    with a prefix, branches, a single token and padding. Returns what is wrong, or `None`."""
    sizes = [(0, 37, 0), (37, 5, 37), (42, 70, 37), (112, 1, 37)]  # start, length, prefix
    pieces = [Piece(0, start, length, 0, prefix, False) for start, length, prefix in sizes]
    pieces += [Piece(1, 0, 60, 0, 0, False), Piece(1, 60, 53, 60, 0, True)]
    layout = PackedLayout(pieces, (2, 113))
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(2, heads, 113, head_dim, generator=generator).to(dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    ]
    states[3][1, :, 60:] = 0.0  # no gradient at padding
    window, scaling = (16 if has_window else None), head_dim**-0.5

    def run(attend: Callable[..., torch.Tensor], where: torch.device, kind: torch.dtype) -> list[torch.Tensor]:
        *inputs, gradient = (values.to(where, kind) for values in states)
        inputs = [values.requires_grad_() for values in inputs]
        output = attend(layout.to(where), *inputs)
        gradient = gradient.transpose(1, 2)
        found = [output * (gradient != 0), *torch.autograd.grad(output, inputs, gradient)]
        return [values.detach().cpu().float() for values in found]

    def by_pieces(of: PackedLayout, query, key, value) -> torch.Tensor:
        return attend_pieces(of, query, key, value, 0.0, scaling, window).transpose(1, 2)

    def by_varlen(of: PackedLayout, query, key, value) -> torch.Tensor:
        return attend_varlen(of, attend_torch, query, key, value, scaling, window)

    with torch.inference_mode(False), torch.enable_grad():
        expected = run(by_pieces, torch.device("cpu"), torch.float32)
        try:
            found = run(by_varlen, device, dtype)
        except Exception as error:  # of many classes, by what an older torch lacks or the build does
            return f"varlen_attn of torch fails here for heads of {head_dim}: {str(error)[:200]}"
    worst = max(((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in zip(found, expected, strict=True))
    if not worst <= TOLERANCE:  # also if it is NaN
        return f"varlen_attn of torch gives other results here (relative difference {worst:.1e})"
    return None


__all__ = [
    "FLASH_FUNCTIONS",
    "VARLEN_KERNELS",
    "attend_packed",
    "probe_varlen",
    "register_operation",
    "varlen_problem",
]
