"""Attention in packed rows: from two integers a token to the mask that a language model takes.

A row of a packed batch holds *segments*, none of which sees another. A segment is one conversation, or a tree: several
conversations that begin with the same tokens (an image, most of all), the shared prefix followed by a branch for each.

    token          <image> <image> caption : | : a cat </s> | : two dogs </s> | ...
    segment_ids       0       0      0     0 | 0 0  0   0   | 0  0   0    0   | 1      -1 where a row is padded
    branch_ids        0       0      0     0 | 1 1  1   1   | 2  2   2    2   | 0      0 is the prefix
    position_ids      0       1      2     3 | 3 4  5   6   | 3  4   5    6   | 0

A token sees what stands before it in its own branch and in the prefix, so its hidden state, loss and gradients are
those of the conversation alone. The masks are made by transformers' own mask functions and given to the language model
ready made: 4D masks, `BlockMask`s and, for models with several kinds of layers, dicts of them are taken as they are.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.masking_utils import create_causal_mask


# Attention implementations that can follow any mask. Flash attention knows lengths only, not trees.
MASKED_ATTENTION = ("sdpa", "flex_attention", "eager")


def packed_mask_function(
    segment_ids: torch.Tensor,
    branch_ids: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    sliding_window: int | None = None,
) -> Callable:
    """
    What a token of a packed row sees among the tokens before it, as transformers' mask functions say it.

    Args:
        segment_ids (`torch.LongTensor` of shape `(num_rows, sequence_length)`): The segment of each token, -1 at
            padding.
        branch_ids (`torch.LongTensor` of shape `(num_rows, sequence_length)`): 0 in the prefix, 1 and up in branches.
        position_ids (`torch.LongTensor` of shape `(num_rows, sequence_length)`, *optional*): Needed for a window.
        sliding_window (`int`, *optional*): How many tokens a token sees, itself included, counted in positions: places
            of the row would count other branches too.

    Returns:
        `Callable`: `(batch_idx, head_idx, q_idx, kv_idx)` to bool. A padding token sees itself, so that no row of the
        softmax is empty (an empty one is NaN).
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
    The attention mask of packed rows, in the form that the language model and its attention implementation take.

    Args:
        config (`PreTrainedConfig`): The language model's config; it names the attention implementation, the sliding
            window and, in families such as Qwen, the kind of each layer.
        inputs_embeds (`torch.FloatTensor` of shape `(num_rows, sequence_length, hidden_size)`): For its shape, dtype
            and device.
        segment_ids, branch_ids, position_ids (`torch.LongTensor` of shape `(num_rows, sequence_length)`): As in
            [`packed_mask_function`].

    Returns:
        `torch.Tensor` of shape `(num_rows, 1, sequence_length, sequence_length)` (bool for sdpa, additive for eager),
        a `BlockMask` (flex attention), or a `dict` of them by kind of layer.

    Raises:
        ValueError: If the attention implementation can't follow such a mask.
    """
    if config._attn_implementation not in MASKED_ATTENTION:
        raise ValueError(
            f"`attn_implementation` {config._attn_implementation!r} cannot follow the mask of packed rows; load the "
            f"model with one of {', '.join(MASKED_ATTENTION)}, or train with `packing: none`."
        )
    device = inputs_embeds.device
    segment_ids, branch_ids, position_ids = (ids.to(device) for ids in (segment_ids, branch_ids, position_ids))

    def create(window: int | None) -> Any:
        # No `position_ids`: transformers would look for packed rows in them by itself, and find other ones.
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
    past_key_values: Any | None,
    shape: tuple[int, int],
) -> None:
    """
    Check that the inputs of packed rows come together, and without what contradicts them.

    Args:
        segment_ids, branch_ids, position_ids, attention_mask, past_key_values: As given to the model.
        shape (`tuple[int, int]`): `(num_rows, sequence_length)`.

    Raises:
        ValueError: Naming what is missing, of another shape, or too much.
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
    if past_key_values is not None:
        raise ValueError("Packed rows are for training: leave out `past_key_values`, or `segment_ids`.")


__all__ = ["check_packed_inputs", "create_packed_mask", "packed_mask_function"]
