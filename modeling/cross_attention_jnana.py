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

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_jnana import JnanaConfig
from .image_slots_jnana import CrossAttentionInputs, prepare_inputs


# The keyword argument by which the layers of the language model hand the images on to the hooks.
INPUTS_NAME = "cross_attention_inputs"
# In older releases (5.20) a checkpointed layer computes its hooks again in the backward pass, and so the blocks, which
# must then not be checkpointed by themselves. Newer releases leave the hooks out.
HOOKS_ARE_CHECKPOINTED = "__call__" in vars(GradientCheckpointingLayer)
CheckpointedBlock: type[nn.Module] = nn.Module if HOOKS_ARE_CHECKPOINTED else GradientCheckpointingLayer


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
    get_input_embeddings: Callable[[], nn.Module]
    _find_tokens: Callable[..., torch.Tensor]
    _check_indices: Callable[..., None]
    _check_images: Callable[..., None]

    def connect_cross_attention(self) -> None:
        """Register the hooks on the layers of `language_model`. Call it again when that is replaced."""
        for index, layer in enumerate(self.language_model.layers):
            layer.register_forward_pre_hook(_LayerHook(self, index), with_kwargs=True)

    def build_cross_attention(self) -> None:
        """Add the blocks, with random weights and closed gates, and connect them."""
        self.cross_attention = JnanaCrossAttention(self.config)
        self.connect_cross_attention()

    def attend_to_images(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        images: list[torch.Tensor] | None,
        blank: torch.Tensor | None,
        image_indices: torch.Tensor | Sequence[int] | None,
        cache: Cache | None,
        segment_ids: torch.Tensor | None,
        branch_ids: torch.Tensor | None,
        image_positions: torch.Tensor | None = None,
        max_row_image_tokens: int | None = None,
    ) -> tuple[torch.Tensor, CrossAttentionInputs]:
        """
        The ordinary embeddings, and what the blocks need of the images.

        Args:
            images (`list[torch.FloatTensor]`, *optional*): One tensor of shape `(1, num_latents * width)` an image.
            blank (`torch.FloatTensor` of shape `(1, num_latents * width)`, *optional*): The image that a batch without
                images encodes because other processes wait for it.
            input_ids, inputs_embeds, image_indices, cache, segment_ids, branch_ids, image_positions,
                max_row_image_tokens: As in [`JnanaModel.forward`].

        Returns:
            `tuple`: Embeddings of shape `(batch_size, sequence_length, hidden_size)`, and [`CrossAttentionInputs`].

        Raises:
            ValueError: If the numbers of images and image tokens differ, or the image token has no embedding.
        """
        config = self.config
        if config.image_token_id >= config.text_config.vocab_size:
            raise ValueError(
                f"`image_token_id` is {config.image_token_id}, but the embedding has {config.text_config.vocab_size} "
                "rows; with `fusion: cross_attention` the image token needs one. Call `resize_token_embeddings`."
            )
        if input_ids is not None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        assert inputs_embeds is not None  # for mypy; checked by the caller
        image_mask = self._find_tokens(config.image_token_id, input_ids, inputs_embeds)
        if images is not None:  # a chunk of a prompt (`prefill_chunk_size`) gets all its images in one tensor
            images = [vector for image in images for vector in image.split(1)]
        if images is not None or inputs_embeds.shape[1] > 1:  # a single new token is never an image
            num_images = 0 if images is None else len(images)
            if image_indices is not None:
                self._check_indices(image_indices, num_images)
            shown = num_images if image_indices is None else len(image_indices)
            self._check_images(image_mask, shown, image_positions, image_indices, num_images)
        end_mask = None
        if config.image_end_token_id is not None:
            end_mask = self._find_tokens(config.image_end_token_id, input_ids, inputs_embeds)
        vectors = blank if images is None else torch.cat(images)
        if vectors is not None:
            vectors = vectors.to(inputs_embeds.device).unflatten(-1, (config.projector_num_latents, -1))
        inputs = prepare_inputs(
            vectors, image_indices, image_mask, end_mask, cache, segment_ids, branch_ids, max_row_image_tokens
        )
        return inputs_embeds, inputs


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


__all__ = ["JnanaCrossAttention", "JnanaCrossAttentionLayer", "JnanaCrossAttentionMixin"]
