"""Attention in packed rows: computes the attention mask from two integers per token.

A row of a packed batch holds *segments* that do not attend to one another. A segment is one conversation, or several
conversations that begin with the same tokens (usually those of an image): the shared prefix, then a branch for each.

    token          <image> <image> caption : | : a cat </s> | : two dogs </s> | ...
    segment_ids       0       0      0     0 | 0 0  0   0   | 0  0   0    0   | 1      -1 where a row is padded
    branch_ids        0       0      0     0 | 1 1  1   1   | 2  2   2    2   | 0      0 is the prefix
    position_ids      0       1      2     3 | 3 4  5   6   | 3  4   5    6   | 0

A token attends to the earlier tokens of its own branch and of the prefix. Its hidden state, loss and gradients equal
those of the conversation alone. The masks are built by transformers' own mask functions. The language model takes them
unchanged: 4D masks, `BlockMask`s and, for models with several kinds of layers, dicts of them.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.masking_utils import create_causal_mask


# Attention implementations that support any mask. Flash attention supports sequence lengths only.
MASKED_ATTENTION = ("sdpa", "flex_attention", "eager")


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
    The attention mask of packed rows, in the form that the attention implementation of the language model takes.

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

    Raises:
        ValueError: If the attention implementation does not support such a mask.
    """
    # Not public, but the name by which transformers documents that custom models look up their registered attention.
    if config._attn_implementation not in MASKED_ATTENTION:
        raise ValueError(
            f"`attn_implementation` {config._attn_implementation!r} does not support the mask of packed rows; load "
            f"the model with one of {', '.join(MASKED_ATTENTION)}, or train with `packing: none`."
        )
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


__all__ = ["check_packed_inputs", "create_packed_mask", "packed_mask_function"]
