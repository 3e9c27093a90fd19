"""Computes the attention of packed rows piece by piece, on any device, or by one kernel that takes all pieces.

- `sdpa`: the calls that `packed_layout_jnana.py` planned, each one `scaled_dot_product_attention`. Runs everywhere.
  Under torch.compile it is one operation (`packed_operation_jnana.py`).
- `varlen`: torch's `varlen_attn` for GPUs of compute capability 8.0 and higher, in 16 bits.
- `flash_attention_2`, `flash_attention_3`: those of the packages `flash_attn` and `flash_attn_3`.

The last three take the keys of each piece gathered one after the other, and align the causal triangle at the end.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available


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


def attend_packed(
    layout: Any,
    kernel: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """See [`PackedLayout.attend`]. A kernel that does not take these tensors, or dropout, is replaced by `sdpa`."""
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
    layout: Any,
    attend: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """[`PackedLayout.attend`] by a kernel of [`VARLEN_KERNELS`]; the layout must be on the device of the tensors."""
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


def add_to_ranges(total: torch.Tensor, call: Any, gradient: torch.Tensor) -> None:
    """Add the gradient of a call's keys to that of the row."""
    offset = 0
    for start, end in call.keys:
        total[:, :, start:end] += gradient[:, :, offset : offset + end - start]
        offset += end - start


def attend_pieces(
    layout: Any,
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


__all__ = ["VARLEN_KERNELS", "add_to_ranges", "attend_packed", "attend_pieces", "attend_varlen", "attend_torch"]
__all__ += ["varlen_attn"]
