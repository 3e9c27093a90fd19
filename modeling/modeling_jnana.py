"""Jnana: an image encoder, a projector and a causal language model behind one `forward`.

The ladder is transformers' own (config -> PreTrainedModel -> Model -> ForConditionalGeneration) and names are those of
its LLaVA, so that Trainer, pipelines, TRL and servers find what they look for. No class here inherits from LLaVA:
transformers renames weights by class name and model type, and a checkpoint must hold the names the model has in
memory.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .backbones_jnana import (
    build_head,
    build_vision_tower,
    check_text_family,
    join_pretrained,
)
from .configuration_jnana import JnanaConfig
from .image_reading_jnana import JnanaImageMixin
from .packed_attention_jnana import check_packed_inputs, create_packed_mask
from .pretrained_jnana import (
    JnanaCausalLMOutputWithPast,
    JnanaGenerationMixin,
    JnanaModelOutputWithPast,
    JnanaPreTrainedModel,
)
from .projector_jnana import build_projector


class JnanaModel(JnanaPreTrainedModel, JnanaImageMixin):
    """
    The pair without a language modeling head. `image_reading_jnana.py` has what is about images alone.

    Args:
        config ([`JnanaConfig`]): The configuration.
    """

    def __init__(self, config: JnanaConfig):
        super().__init__(config)
        config.check_image_seq_length()
        self.vision_tower = build_vision_tower(config)
        self.multi_modal_projector = build_projector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def forward(  # type: ignore[misc]
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_indices: torch.LongTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        branch_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | JnanaModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Token ids, with
                `config.num_image_tokens` image tokens for each image.
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`, *optional*): The images
                of all rows one after the other. Rows may have none, one or many.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Instead of `input_ids`.
            image_features (`torch.FloatTensor` of shape `(num_images, num_image_tokens, vision_feature_size)`,
                *optional*): Instead of `pixel_values`: features before the projector, computed earlier. Of a batch
                without images: none (`num_images` 0), where other processes may have some.
            mm_encoder_outputs (`dict`, *optional*): Instead of `pixel_values`: `{"image": output}`, what
                [`~JnanaModel.get_image_features`] returned.
            image_indices (`torch.LongTensor` of shape `(num_image_places,)`, *optional*): The image that each place
                shows, a place being `config.num_image_tokens` image tokens, in reading order. An image may be shown
                many times and is encoded once. By default one image after the other.
            segment_ids, branch_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): For
                packed rows, with `position_ids` and without `attention_mask`: see `packed_attention_jnana.py`.

        Raises:
            ValueError: If images are given in two ways, or their number doesn't fit that of the image tokens; if the
                inputs of packed rows are incomplete, or the attention implementation can't follow their mask.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        # No images, and those of other processes are stored features: what `FeatureCache` gives a batch of text alone.
        stored = image_features is not None and image_features.shape[0] == 0
        image_hidden_states = self._read_images(
            pixel_values,
            None if stored else image_features,
            mm_encoder_outputs,
            vision_feature_layer,
            vision_feature_select_strategy,
        )
        if image_indices is not None:
            image_hidden_states = self._show_images(image_hidden_states, image_indices)
        nothing = None
        if image_hidden_states is None and self._others_may_read_images(past_key_values):
            given = inputs_embeds if input_ids is None else input_ids
            nothing = self._touch_image_path(given.device, stored)  # type: ignore[union-attr]  # one of them is given
        if input_ids is not None:
            image_mask = input_ids == self.config.image_token_id
            if image_hidden_states is None and input_ids.shape[1] > 1:  # a single new token is never an image
                self._check_counts(image_mask, 0)
            # The image token needs no row in the embedding: its vector is never used.
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(image_mask, 0))
        assert inputs_embeds is not None  # for mypy; the first check has seen to it
        if image_hidden_states is not None:
            image_hidden_states = image_hidden_states.to(inputs_embeds.device, inputs_embeds.dtype)
            image_mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_hidden_states)
            inputs_embeds = inputs_embeds.masked_scatter(image_mask, image_hidden_states)
        elif nothing is not None:
            inputs_embeds = inputs_embeds + nothing.to(inputs_embeds.dtype)

        if segment_ids is not None or branch_ids is not None:
            shape = (inputs_embeds.shape[0], inputs_embeds.shape[1])
            check_packed_inputs(segment_ids, branch_ids, position_ids, attention_mask, past_key_values, shape)
            attention_mask = create_packed_mask(
                self.language_model.config,
                inputs_embeds,
                segment_ids,  # type: ignore[arg-type]  # checked
                branch_ids,  # type: ignore[arg-type]
                position_ids,  # type: ignore[arg-type]
            )
            kwargs["use_cache"] = False  # type: ignore[typeddict-unknown-key]
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return JnanaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_hidden_states,
        )


class JnanaForConditionalGeneration(JnanaPreTrainedModel, JnanaGenerationMixin):
    """
    The pair with the language model's own head.

    Args:
        config ([`JnanaConfig`]): The configuration.

    Raises:
        ValueError: If the language model is of a family whose head can't be held exactly.
    """

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: JnanaConfig):
        check_text_family(config.text_config)
        super().__init__(config)
        self.model = JnanaModel(config)
        self.lm_head = build_head(config.text_config)
        # GPT-NeoX calls its embedding `embed_in`, the others `embed_tokens`.
        embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        # An image token in an answer would ask for an image in the next turn.
        self.generation_config.suppress_tokens = [config.image_token_id]
        self.post_init()

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str,
        text: str,
        *,
        dtype: str | torch.dtype = "auto",
        attn_implementation: str | dict[str, str] | None = None,
        vision_kwargs: dict[str, Any] | None = None,
        text_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> "JnanaForConditionalGeneration":
        """
        Join two checkpoints by a fresh projector.

        Args:
            vision (`str`): Hub id or folder of an image encoder, alone or inside a full CLIP or SigLIP.
            text (`str`): Hub id or folder of a causal language model.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): Of the whole model; `"auto"` is the
                language model's.
            attn_implementation (`str` or `dict`, *optional*): For both, or a dict with `vision_config`, `text_config`.
            vision_kwargs, text_kwargs (`dict`, *optional*): `from_pretrained` arguments for one of the two only.
            **kwargs: Fields of [`JnanaConfig`] (`image_token_id`, `projector_type`, ...); any other goes to both
                `from_pretrained` (`cache_dir`, `token`, `trust_remote_code`, ...).

        Returns:
            [`JnanaForConditionalGeneration`]: In evaluation mode, with exactly the two checkpoints' weights.

        Raises:
            ValueError: If the language model's family is refused, or a checkpoint lacks weights.
        """
        return join_pretrained(
            cls, vision, text, dtype, attn_implementation, vision_kwargs or {}, text_kwargs or {}, kwargs
        )

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """See [`JnanaModel.get_image_features`]."""
        return self.model.get_image_features(
            pixel_values, vision_feature_layer, vision_feature_select_strategy, **kwargs
        )

    @can_return_tuple
    def forward(  # type: ignore[misc]
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.LongTensor | None = None,
        shift_labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_indices: torch.LongTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        branch_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | JnanaCausalLMOutputWithPast:
        """
        Inputs as in [`JnanaModel.forward`], and

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): The tokens to predict,
                -100 where nothing is; position i holds the token of position i.
            shift_labels (`torch.LongTensor`, *optional*): Instead of `labels`: position i holds the token that
                position i must predict. Shaped as the logits without their last dimension.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): Positions to compute logits for: the
                last n (0 for all), or indices, or a boolean mask `(batch_size, sequence_length)`. With a mask the
                logits are `(num_kept, vocab_size)`, and `labels` and `shift_labels` are of the whole rows as always:
                with the mask of the places that have a label, loss and gradients are those of all logits.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_features=image_features,
            mm_encoder_outputs=mm_encoder_outputs,
            image_indices=image_indices,
            segment_ids=segment_ids,
            branch_ids=branch_ids,
            **kwargs,
        )
        if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.dtype == torch.bool:
            if shift_labels is None and labels is not None:
                shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=-100)  # type: ignore[assignment]
            if shift_labels is not None and shift_labels.shape == logits_to_keep.shape:
                shift_labels = shift_labels[logits_to_keep]  # type: ignore[assignment]
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.text_config.vocab_size,
                shift_labels=shift_labels,
                **kwargs,
            )
        return JnanaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


JnanaModel.register_for_auto_class("AutoModel")
JnanaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["JnanaForConditionalGeneration", "JnanaModel", "JnanaPreTrainedModel"]
