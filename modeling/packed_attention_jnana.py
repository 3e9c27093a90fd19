"""Attention in packed rows, described by two integers and a position for each token.

A row of a packed batch holds *segments* that do not attend to one another. A segment is one conversation, or several
conversations that begin with the same tokens (usually those of an image): the shared prefix, then a branch for each.

    token          <image> <image> caption : | : a cat </s> | : two dogs </s> | ...
    segment_ids       0       0      0     0 | 0 0  0   0   | 0  0   0    0   | 1      -1 where a row is padded
    branch_ids        0       0      0     0 | 1 1  1   1   | 2  2   2    2   | 0      0 is the prefix
    position_ids      0       1      2     3 | 3 4  5   6   | 3  4   5    6   | 0

A token attends to the earlier tokens of its own branch and of the prefix. Its hidden state, loss and gradients equal
those of the conversation alone.

There are two ways to compute this, chosen by the attention implementation of the language model:

- `sdpa` (the default): without a mask, piece by piece (`packed_layout_jnana.py`). The model switches to
  `jnana_packed_varlen` where torch's `varlen_attn` runs (GPUs of compute capability 8.0, in 16 bits), and to
  `jnana_packed` elsewhere: as many calls of `scaled_dot_product_attention` as cost least (`packed_layout_jnana.py`).
- `jnana_packed`: only the latter. `flash_attention_2`, `flash_attention_3`: without a mask, by these packages.
- `eager`, `flex_attention`: with a mask of every query and key, made by transformers' own mask functions.

The two `jnana_packed*` are registered with transformers, and are sdpa for all other rows. The layout reaches them as
the keyword argument `packed_layout`, past the language model, which gets a mask of one element: transformers passes
masks of four dimensions on as they are, and would build one of its own if there were none.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, sdpa_mask
from transformers.utils import logging

from .packed_kernels_jnana import attend_packed, register_operation, varlen_problem
from .packed_layout_jnana import PackedLayout


logger = logging.get_logger(__name__)

# Registered here, with the kernel that each uses.
PACKED_ATTENTION = {"jnana_packed": "sdpa", "jnana_packed_varlen": "varlen"}
FLASH_ATTENTION = ("flash_attention_2", "flash_attention_3")
# Attention implementations that support any mask.
MASKED_ATTENTION = ("eager", "flex_attention")
SUPPORTED_ATTENTION = ("sdpa", *PACKED_ATTENTION, *FLASH_ATTENTION, *MASKED_ATTENTION)
# Keyword arguments by which a family asks for more than attention with a window: none of those supported does.
UNSUPPORTED = ("softcap", "s_aux", "position_bias")


# ---------------------------------------------------------------------- registered with transformers


def packed_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packed_layout: PackedLayout | None = None,
    *,
    kernel: str,
    otherwise: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    An attention function of transformers: packed rows by their layout, all others as before.

    Args:
        module, query, key, value, attention_mask, dropout, scaling, sliding_window: As in every such function.
        packed_layout ([`PackedLayout`], *optional*): Of packed rows.
        kernel (`str`): See [`attend_packed`].
        otherwise (`Callable`): Computes the attention of other rows.

    Returns:
        `tuple`: The output of shape `(batch_size, sequence_length, num_heads, head_dim)`, and `None`.

    Raises:
        ValueError: If the layer asks for something that packed rows don't support, such as capped scores.
    """
    if packed_layout is None:
        if attention_mask is not None and attention_mask.shape[-1] == 1 < key.shape[2]:
            raise ValueError(
                f"{type(module).__name__} does not hand `packed_layout` on to its attention, so packed rows need "
                "`attn_implementation='eager'`, or `packing: none`."
            )
        return otherwise(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} gives its attention `{name}`, which packed rows do not support; train with "
                "`packing: none`."
            )
    return attend_packed(packed_layout, kernel, query, key, value, dropout, scaling, sliding_window), None


for _name, _kernel in PACKED_ATTENTION.items():
    AttentionInterface.register(
        _name, partial(packed_attention_forward, kernel=_kernel, otherwise=AttentionInterface()["sdpa"])
    )
    AttentionMaskInterface.register(_name, sdpa_mask)
register_operation()


@lru_cache
def extend_flash_attention(name: str) -> None:
    """Let flash attention take packed rows too; called when a model that uses it gets some."""
    function = partial(packed_attention_forward, kernel=name, otherwise=AttentionInterface()[name])
    AttentionInterface.register(name, function)


# ---------------------------------------------------------------------- what a model does with packed rows


def prepare_packed_attention(
    language_model: PreTrainedModel,
    inputs_embeds: torch.Tensor,
    segment_ids: torch.Tensor,
    branch_ids: torch.Tensor,
    position_ids: torch.Tensor,
    packed_layout: PackedLayout | None,
) -> tuple[Any, PackedLayout | None]:
    """
    What the language model needs to attend within packed rows.

    Args:
        language_model (`PreTrainedModel`): Its attention implementation decides, and is set where it is `sdpa`.
        inputs_embeds (`torch.FloatTensor` of shape `(num_rows, sequence_length, hidden_size)`): For dtype and device.
        segment_ids, branch_ids, position_ids (`torch.LongTensor` of shape `(num_rows, sequence_length)`): As in
            [`packed_mask_function`].
        packed_layout ([`PackedLayout`], *optional*): Their layout, as the collator makes it. Without it, it is derived
            on the host, which a GPU has to wait for.

    Returns:
        `tuple`: The attention mask, and the layout to pass on (`None` if the mask is all).

    Raises:
        ValueError: If the attention implementation does not support packed rows, or these tokens.
    """
    name = set_packed_attention(language_model)
    if name in MASKED_ATTENTION:
        mask = create_packed_mask(language_model.config, inputs_embeds, segment_ids, branch_ids, position_ids)
        return mask, None
    if packed_layout is None:
        packed_layout = PackedLayout.from_ids(segment_ids, branch_ids, position_ids)
    if packed_layout is not None:
        if packed_layout.device != inputs_embeds.device:
            packed_layout = packed_layout.to(inputs_embeds.device)
        return inputs_embeds.new_zeros(1, 1, 1, 1), packed_layout
    problem = "Tokens of a segment or branch that are scattered over the row, or whose positions do not go on by one"
    if name in FLASH_ATTENTION:
        raise ValueError(f"{problem}, need a mask, which {name!r} does not take; load the model with 'sdpa'.")
    logger.warning_once(f"{problem}, need a mask of every query and key: attention is slow and takes more memory.")
    return create_packed_mask(language_model.config, inputs_embeds, segment_ids, branch_ids, position_ids), None


def set_packed_attention(language_model: PreTrainedModel, device: torch.device | None = None) -> str:
    """
    Set the attention implementation of a language model that gets packed rows.

    `sdpa` becomes `jnana_packed_varlen` where that runs and gives the right results, else `jnana_packed`. Any other
    stays. The first packed rows do this; call it before if the model is to be compiled.

    Args:
        language_model (`PreTrainedModel`): The language model, without projector and tower.
        device (`torch.device`, *optional*): Where it will be; by default where it is.

    Returns:
        `str`: The name of the attention implementation.

    Raises:
        ValueError: If the attention implementation does not support packed rows.
    """
    # Not public, but the name by which transformers documents that custom models look up their registered attention.
    name = language_model.config._attn_implementation
    if name not in SUPPORTED_ATTENTION:
        raise ValueError(
            f"`attn_implementation` {name!r} does not support packed rows; load the model with one of "
            f"{', '.join(SUPPORTED_ATTENTION)}, or train with `packing: none`."
        )
    if name in FLASH_ATTENTION:
        extend_flash_attention(name)
    if name != "sdpa":
        return name
    device = device or language_model.device
    problem = varlen_problem(device, *attention_shape(language_model.config))
    if device.type == "cuda" and problem is not None:
        logger.warning_once(f"attention of packed rows: one call for each piece, because {problem}")
    name = "jnana_packed_varlen" if problem is None else "jnana_packed"
    language_model.set_attn_implementation(name)
    return name


def attention_shape(config: PreTrainedConfig) -> tuple[int, int, int, bool]:
    """Numbers of query heads and of key heads, the size of a head, and whether layers have a window."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, kv_heads, head_dim, getattr(config, "sliding_window", None) is not None


# ---------------------------------------------------------------------- the mask


def packed_mask_function(
    segment_ids: torch.Tensor,
    branch_ids: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    sliding_window: int | None = None,
) -> Callable:
    """
    Which earlier tokens a token of a packed row attends to, as a mask function of transformers.

    Args:
        segment_ids (`torch.LongTensor` of shape `(num_rows, sequence_length)`): The segment of each token, -1 at
            padding.
        branch_ids (`torch.LongTensor` of shape `(num_rows, sequence_length)`): 0 in the prefix, 1 and up in branches.
        position_ids (`torch.LongTensor` of shape `(num_rows, sequence_length)`, *optional*): Needed for a window.
        sliding_window (`int`, *optional*): How many tokens a token attends to, itself included, counted by
            `position_ids`: indices in the row would count the tokens of other branches too.

    Returns:
        `Callable`: `(batch_idx, head_idx, q_idx, kv_idx)` to bool. A padding token attends to itself, because the
        softmax of an empty row is NaN.
    """

    def visible(batch_idx, head_idx, q_idx, kv_idx):
        segment = segment_ids[batch_idx, q_idx]
        branch = branch_ids[batch_idx, kv_idx]
        seen = (segment == segment_ids[batch_idx, kv_idx]) & ((segment >= 0) | (q_idx == kv_idx))
        seen = seen & ((branch == 0) | (branch == branch_ids[batch_idx, q_idx]))
        if sliding_window is not None and position_ids is not None:
            seen = seen & (position_ids[batch_idx, q_idx] - position_ids[batch_idx, kv_idx] < sliding_window)
        return seen

    return visible


def create_packed_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    segment_ids: torch.Tensor,
    branch_ids: torch.Tensor,
    position_ids: torch.Tensor,
) -> Any:
    """
    The attention mask of packed rows, in the form that the attention implementation of the language model takes: of
    every query and key. For `eager` and `flex_attention`, and the reference of the tests.

    Args:
        config (`PreTrainedConfig`): The language model's config, with the attention implementation, the sliding window
            and, in families such as Qwen, the kind of each layer.
        inputs_embeds (`torch.FloatTensor` of shape `(num_rows, sequence_length, hidden_size)`): For its shape, dtype
            and device.
        segment_ids, branch_ids, position_ids (`torch.LongTensor` of shape `(num_rows, sequence_length)`): As in
            [`packed_mask_function`].

    Returns:
        `torch.Tensor` of shape `(num_rows, 1, sequence_length, sequence_length)` (bool for sdpa, additive for eager),
        a `BlockMask` (flex attention), or a `dict` of them by kind of layer.

    """
    device = inputs_embeds.device
    segment_ids, branch_ids, position_ids = (ids.to(device) for ids in (segment_ids, branch_ids, position_ids))

    def create(window: int | None) -> Any:
        # Without `position_ids`: transformers would detect packed sequences in them, and not the same ones.
        visible = packed_mask_function(segment_ids, branch_ids, position_ids, window)
        return create_causal_mask(config, inputs_embeds, None, None, and_mask_function=visible)

    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return create(window)
    return {kind: create(window if kind == "sliding_attention" else None) for kind in set(layer_types)}


def check_packed_inputs(
    segment_ids: torch.Tensor | None,
    branch_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    cache: Any | None,
    shape: tuple[int, int],
) -> None:
    """
    Check that the inputs of packed rows are complete, and that no other input contradicts them.

    Args:
        segment_ids, branch_ids, position_ids, attention_mask, cache: As given to the model.
        shape (`tuple[int, int]`): `(num_rows, sequence_length)`.

    Raises:
        ValueError: If one is missing or has another shape, or one is given that contradicts them.
    """
    given = {"segment_ids": segment_ids, "branch_ids": branch_ids, "position_ids": position_ids}
    missing = [name for name, ids in given.items() if ids is None]
    if missing:
        raise ValueError(
            f"Packed rows need `segment_ids`, `branch_ids` and `position_ids` together; missing: {', '.join(missing)}."
        )
    for name, ids in given.items():
        if tuple(ids.shape) != shape:  # type: ignore[union-attr]  # the check above
            raise ValueError(f"`{name}` has shape {tuple(ids.shape)}; give {shape}, one number a token.")  # type: ignore[union-attr]
    if attention_mask is not None:
        raise ValueError("Give `attention_mask` or `segment_ids`, not both: padding is where `segment_ids` is -1.")
    if cache is not None:
        raise ValueError("Packed rows are for training: leave out the cache (`past_key_values`), or `segment_ids`.")


__all__ = ["check_packed_inputs", "create_packed_mask", "packed_mask_function", "prepare_packed_attention"]
__all__ += ["set_packed_attention"]
