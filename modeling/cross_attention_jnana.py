"""Gated cross-attention to images: `fusion: cross_attention`, the form of Flamingo and IDEFICS.

An image takes one token of the text. Its vectors do not enter the row. Before every n-th layer of the language model
stands a gated block, by which each token attends to the vectors of *one* image: the last one whose image token stands
before it, or is it. A token before the first image, or behind an end token (`image_end_token_id`) with no image after
that, attends to no image.

    token      a   <image>   cat  </s>   dog   <image>   two
    image      -      0       0     0     -       1       1

The gates start at tanh(0) = 0, so that a fresh model computes exactly what its language model computes. The blocks run
in forward pre-hooks of the language model's layers, whose names, and so whose weights, LoRA targets and FSDP units,
stay as they are.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_jnana import JnanaConfig


# The keyword argument by which the layers of the language model hand the images on to the hooks.
INPUTS_NAME = "cross_attention_inputs"
# The attribute of a `Cache` that holds the keys and values of images beside those of tokens.
STATES_NAME = "cross_attention_states"
# The position of an image token that is not there: behind every token.
NOWHERE = torch.iinfo(torch.int64).max
# In older releases (5.20) a checkpointed layer computes its hooks again in the backward pass, and so the blocks, which
# must then not be checkpointed by themselves. Newer releases leave the hooks out.
HOOKS_ARE_CHECKPOINTED = "__call__" in vars(GradientCheckpointingLayer)
CheckpointedBlock: type[nn.Module] = nn.Module if HOOKS_ARE_CHECKPOINTED else GradientCheckpointingLayer


@dataclass
class CrossAttentionStates:
    """
    The images of the text so far, kept with the cache of keys and values.

    Args:
        image_positions (`torch.LongTensor` of shape `(batch_size, num_slots)`): The index in the row of each image
            token; `NOWHERE` in the slots of rows with fewer images.
        end_positions (`torch.LongTensor` of shape `(batch_size, num_ends)`): The same of end tokens.
        keys, values (`list[torch.FloatTensor]`): For each block, `(batch_size, num_heads, num_slots, num_latents,
            head_dim)`.
    """

    image_positions: torch.Tensor
    end_positions: torch.Tensor
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    def hide(self, length: int | torch.Tensor) -> "CrossAttentionStates":
        """The same with no image and no end token behind the first `length` tokens; its shapes do not change."""
        images, ends = (
            torch.where(positions < length, positions, NOWHERE)
            for positions in (self.image_positions, self.end_positions)
        )
        return CrossAttentionStates(images, ends, self.keys, self.values)

    def crop(self, length: int) -> "CrossAttentionStates":
        """The images and end tokens within the first `length` tokens."""
        kept = (self.image_positions < length).any(0)
        return CrossAttentionStates(
            self.image_positions[:, kept],
            self.end_positions[:, (self.end_positions < length).any(0)],
            [keys[:, :, kept] for keys in self.keys],
            [values[:, :, kept] for values in self.values],
        ).hide(length)


@dataclass
class CrossAttentionInputs:
    """
    What the blocks need of one call of the model.

    Args:
        image_vectors (`torch.FloatTensor` of shape `(num_images, num_latents, width)`, *optional*): New images.
        image_slots (`torch.LongTensor` of shape `(batch_size, num_new_slots)`, *optional*): For each row, the indices
            of its images in `image_vectors`, in reading order; any index in the slots of rows with fewer.
        attention_mask (`torch.BoolTensor` of shape `(batch_size, 1, sequence_length, num_slots * num_latents)`,
            *optional*): Which vectors a token attends to; `None` if there is one slot only.
        sees_image (`torch.BoolTensor` of shape `(batch_size, sequence_length, 1)`): Whether it attends to any.
        past ([`CrossAttentionStates`], *optional*): Images of earlier calls; their slots come first.
        states ([`CrossAttentionStates`]): Old and new images; the blocks add their keys and values.
    """

    image_vectors: torch.Tensor | None
    image_slots: torch.Tensor | None
    attention_mask: torch.Tensor | None
    sees_image: torch.Tensor
    past: CrossAttentionStates | None
    states: CrossAttentionStates


class JnanaRMSNorm(nn.Module):
    """RMSNorm as in Llama and IDEFICS: computed in float32, in the dtype of its weight afterwards."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(self.weight.dtype)


class JnanaCrossAttentionLayer(CheckpointedBlock):  # type: ignore[misc,valid-type]
    """
    One gated block: cross-attention to an image and a gated MLP, each behind a tanh gate that starts at 0.

    Heads and activation are the language model's. IDEFICS's blocks fit exactly.
    """

    def __init__(self, config: JnanaConfig):
        super().__init__()
        text = config.text_config
        width, eps = text.hidden_size, config.cross_attention_norm_eps
        inner = config.cross_attention_intermediate_size or text.intermediate_size
        self.head_dim = width // text.num_attention_heads
        self.attention_norm = JnanaRMSNorm(width, eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(config.vision_feature_size, width, bias=False)
        self.v_proj = nn.Linear(config.vision_feature_size, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        normalised = config.cross_attention_qk_norm
        self.q_norm = JnanaRMSNorm(self.head_dim, eps) if normalised else nn.Identity()
        self.k_norm = JnanaRMSNorm(self.head_dim, eps) if normalised else nn.Identity()
        self.mlp_norm = JnanaRMSNorm(width, eps)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.act = ACT2FN[text.hidden_act]
        gates = width if config.cross_attention_gate == "vector" else 1
        self.attention_gate = nn.Parameter(torch.zeros(gates))
        self.mlp_gate = nn.Parameter(torch.zeros(gates))

    def init_weights(self) -> None:
        """Close the gates. Called by the model's `_init_weights`, as transformers doesn't know these parameters."""
        init.zeros_(self.attention_gate)
        init.zeros_(self.mlp_gate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        image_vectors: torch.Tensor | None,
        image_slots: torch.Tensor | None,
        past_keys: torch.Tensor | None,
        past_values: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        sees_image: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`): Of the text.
            past_keys, past_values (`torch.FloatTensor`, *optional*): This block's in [`CrossAttentionStates`].
            image_vectors, image_slots, attention_mask, sees_image: See [`CrossAttentionInputs`].

        Returns:
            `tuple`: The new hidden states, and the keys and values of all images so far (`None` without images).
        """
        keys, values = past_keys, past_values
        if image_vectors is not None:
            keys, values = self._project(image_vectors, image_slots, past_keys, past_values)
        if keys is not None:
            attended = self._attend(hidden_states, keys, values, attention_mask)
            attended = attended.masked_fill(~sees_image, 0.0)
            hidden_states = hidden_states + (torch.tanh(self.attention_gate) * attended).to(hidden_states.dtype)
        normed = self.mlp_norm(hidden_states)
        inner = self.down_proj(self.act(self.gate_proj(normed)) * self.up_proj(normed))
        return hidden_states + (torch.tanh(self.mlp_gate) * inner).to(hidden_states.dtype), keys, values

    def _project(self, image_vectors, image_slots, past_keys, past_values) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, once for each image, laid out by rows."""
        vectors = image_vectors.to(self.k_proj.weight.dtype)
        keys = self.k_norm(self.k_proj(vectors).unflatten(-1, (-1, self.head_dim)))  # => [images, latents, heads, dim]
        values = self.v_proj(vectors).unflatten(-1, (-1, self.head_dim))
        keys, values = (states[image_slots].permute(0, 3, 1, 2, 4) for states in (keys, values))
        if past_keys is None:
            return keys, values  # => [batch, heads, slots, latents, dim]
        return torch.cat([past_keys, keys], dim=2), torch.cat([past_values, values], dim=2)

    def _attend(self, hidden_states, keys, values, attention_mask) -> torch.Tensor:
        query = self.q_proj(self.attention_norm(hidden_states)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, keys, values = self.q_norm(query), keys.flatten(2, 3), values.flatten(2, 3)
        keys, values = keys.to(query.dtype), values.to(query.dtype)
        attended = nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=attention_mask)
        return self.o_proj(attended.transpose(1, 2).flatten(2).to(self.o_proj.weight.dtype))


class JnanaCrossAttention(nn.Module):
    """
    The gated blocks of a model, one before every `cross_layer_interval`-th layer of the language model.

    Args:
        config ([`JnanaConfig`]): The configuration.
    """

    def __init__(self, config: JnanaConfig):
        super().__init__()
        count = -(-config.text_config.num_hidden_layers // config.cross_layer_interval)
        self.layers = nn.ModuleList([JnanaCrossAttentionLayer(config) for _ in range(count)])

    def forward(self, hidden_states: torch.Tensor, index: int, inputs: CrossAttentionInputs) -> torch.Tensor:
        """Run the block of that index, and keep its keys and values in `inputs.states`."""
        past = inputs.past
        hidden_states, keys, values = self.layers[index](
            hidden_states,
            inputs.image_vectors,
            inputs.image_slots,
            None if past is None else past.keys[index],
            None if past is None else past.values[index],
            inputs.attention_mask,
            inputs.sees_image,
        )
        if keys is not None and len(inputs.states.keys) == index:  # not when checkpointing computes the block again
            inputs.states.keys.append(keys)
            inputs.states.values.append(values)
        return hidden_states


class JnanaCrossAttentionMixin:
    """The part of [`JnanaModel`] that runs the blocks inside the language model."""

    config: JnanaConfig
    language_model: PreTrainedModel
    cross_attention: JnanaCrossAttention

    def connect_cross_attention(self) -> None:
        """Register the hooks on the layers of `language_model`. Call it again when that is replaced."""
        for index, layer in enumerate(self.language_model.layers):
            layer.register_forward_pre_hook(_LayerHook(self, index), with_kwargs=True)

    def build_cross_attention(self) -> None:
        """Add the blocks, with random weights and closed gates, and connect them."""
        self.cross_attention = JnanaCrossAttention(self.config)
        self.connect_cross_attention()


class _LayerHook:
    """Runs before a layer of the language model. An object, because a deep copy of the model copies it along."""

    def __init__(self, model: Any, index: int):
        self.model, self.index = model, index

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if INPUTS_NAME not in kwargs:  # the language model was called by itself
            return None
        kwargs = dict(kwargs)
        inputs = kwargs.pop(INPUTS_NAME)
        _check_reentrant(layer, inputs.image_vectors)
        block, rest = divmod(self.index, self.model.config.cross_layer_interval)
        if rest == 0:
            args = (self.model.cross_attention(args[0], block, inputs), *args[1:])
        return args, kwargs


def _check_reentrant(layer: nn.Module, image_vectors: torch.Tensor | None) -> None:
    """Raise `ValueError` where the gradient of the images would be lost: reentrant checkpointing takes no graph from
    keyword arguments, and in older releases the hooks run inside of it."""
    if not HOOKS_ARE_CHECKPOINTED or image_vectors is None or not image_vectors.requires_grad:
        return
    if layer.training and layer.gradient_checkpointing and not torch.is_grad_enabled():
        raise ValueError(
            "`use_reentrant` is True, but with this release of transformers `fusion: cross_attention` needs it off. "
            "Set `gradient_checkpointing_kwargs` to {'use_reentrant': False}, or install transformers 5.23 or newer."
        )


def find_positions(token_mask: torch.Tensor, start: int | torch.Tensor, most: int) -> torch.Tensor:
    """
    Where in its row each marked token stands.

    Args:
        token_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): The marked tokens.
        start (`int`): The index of the first column in the row.
        most (`int`): No row has more marked tokens. Used where counting them would break a compiled graph.

    Returns:
        `torch.LongTensor` of shape `(batch_size, num_slots)`: Ascending; `NOWHERE` in rows with fewer.
    """
    columns = torch.arange(token_mask.shape[1], device=token_mask.device) + start
    positions = torch.where(token_mask, columns, NOWHERE).sort(dim=1).values
    slots = most if torch.compiler.is_compiling() else int(token_mask.sum(1).max())
    return positions[:, :slots].contiguous()


def find_visible_images(
    columns: torch.Tensor,
    image_positions: torch.Tensor,
    end_positions: torch.Tensor,
    segment_ids: torch.Tensor | None = None,
    branch_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Which image each token attends to: the last one before it or at it, unless an end token stands between.

    Args:
        columns (`torch.LongTensor` of shape `(sequence_length,)`): The indices of the tokens in their rows.
        image_positions (`torch.LongTensor` of shape `(batch_size, num_slots)`): Those of the image tokens.
        end_positions (`torch.LongTensor` of shape `(batch_size, num_ends)`): Those of the end tokens.
        segment_ids, branch_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): For packed
            rows: only images and end tokens of a token's own branch, and of the prefix before it, count.

    Returns:
        `torch.BoolTensor` of shape `(batch_size, sequence_length, num_slots)`: At most one image a token.
    """
    here = columns[None, :, None]

    def in_same_text(positions: torch.Tensor) -> torch.Tensor:
        there = positions.clamp(max=segment_ids.shape[1] - 1)  # type: ignore[union-attr]
        segment, branch = (ids.gather(1, there)[:, None] for ids in (segment_ids, branch_ids))  # type: ignore[union-attr]
        same_branch = (branch == 0) | (branch == branch_ids[:, :, None])  # type: ignore[index]
        return (segment == segment_ids[:, :, None]) & same_branch  # type: ignore[index]

    images, ends = image_positions[:, None], end_positions[:, None]
    image_before, end_before = images <= here, ends < here
    if segment_ids is not None:
        image_before = image_before & in_same_text(image_positions)
        end_before = end_before & in_same_text(end_positions)
    if image_positions.shape[1] == 0:
        return image_before
    last_image = torch.where(image_before, images, -1).amax(-1, keepdim=True)
    visible = image_before & (images == last_image)
    if end_positions.shape[1] == 0:
        return visible
    return visible & (last_image > torch.where(end_before, ends, -1).amax(-1, keepdim=True))


def prepare_inputs(
    image_vectors: torch.Tensor | None,
    image_indices: torch.Tensor | None,
    image_mask: torch.Tensor,
    end_mask: torch.Tensor | None,
    cache: Any | None,
    segment_ids: torch.Tensor | None = None,
    branch_ids: torch.Tensor | None = None,
) -> CrossAttentionInputs:
    """
    Lay the images out for the blocks.

    Args:
        image_vectors (`torch.FloatTensor` of shape `(num_images, num_latents, width)`, *optional*): The images of this
            call, or, with a mask of no image, a blank one whose only purpose is that all weights take part.
        image_indices (`torch.LongTensor` of shape `(num_image_tokens,)`, *optional*): For each image token, in reading
            order, the index of its image; by default one after the other.
        image_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): The image tokens of this call.
        end_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*): Its end tokens.
        cache (`Cache`, *optional*): With the images of earlier calls.
        segment_ids, branch_ids (`torch.LongTensor`, *optional*): Of packed rows.
    """
    rows, length = image_mask.shape
    start = 0 if cache is None else cache.get_seq_length()
    past: CrossAttentionStates | None = getattr(cache, STATES_NAME, None)
    if past is not None:  # the cache may have been cropped, or emptied
        past = past.hide(start) if length == 1 else past.crop(int(start))
    if past is not None and past.image_positions.shape[1] == 0:
        past = None
    columns = torch.arange(length, device=image_mask.device) + start
    empty = image_mask.new_zeros((rows, 0), dtype=torch.long)
    old_ends = empty if past is None else past.end_positions
    new_images, slots = empty, None
    if image_vectors is not None:
        most = len(image_vectors) if image_indices is None else len(image_indices)
        new_images = find_positions(image_mask, start, min(most, length))
        if new_images.shape[1] == 0:  # the blank image needs a slot
            new_images = torch.full((rows, 1), NOWHERE, device=image_mask.device)
        counts = image_mask.sum(1)
        first = counts.cumsum(0) - counts
        slots = first[:, None] + torch.arange(new_images.shape[1], device=first.device)
        slots = slots.clamp(max=most - 1)
        slots = slots if image_indices is None else image_indices.to(slots.device)[slots]
    states = CrossAttentionStates(
        new_images if past is None else torch.cat([past.image_positions, new_images], dim=1),
        old_ends if end_mask is None else _add_ends(old_ends, end_mask, start),
    )
    visible = find_visible_images(columns, states.image_positions, states.end_positions, segment_ids, branch_ids)
    sees_image = visible.any(-1, keepdim=True)
    mask = None
    if visible.shape[-1] > 1:
        num_latents = image_vectors.shape[1] if past is None else past.keys[0].shape[3]  # type: ignore[union-attr]
        # A token without an image attends to all: the softmax of an empty row is NaN. The block discards the result.
        mask = (visible | ~sees_image).repeat_interleave(num_latents, dim=-1)[:, None]
    return CrossAttentionInputs(image_vectors, slots, mask, sees_image, past, states)


def _add_ends(end_positions: torch.Tensor, end_mask: torch.Tensor, start: int | torch.Tensor) -> torch.Tensor:
    """
    The positions of end tokens so far. A last column is for those that are generated later, one token at a time, so
    that the steps of generation keep one shape.
    """
    if end_mask.shape[1] == 1 and end_positions.shape[1] > 0:
        last = torch.where(end_mask, start, end_positions[:, -1:])
        return torch.cat([end_positions[:, :-1], last], dim=1)
    spare = torch.full((end_mask.shape[0], 1), NOWHERE, device=end_mask.device)
    return torch.cat([end_positions, find_positions(end_mask, start, end_mask.shape[1]), spare], dim=1)


__all__ = ["JnanaCrossAttention", "JnanaCrossAttentionLayer", "JnanaCrossAttentionMixin", "prepare_inputs"]
