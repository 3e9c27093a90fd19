"""What Jnana's model classes stand on: their outputs, how they are saved, how they generate.

A file of its own only to keep `modeling_jnana.py` readable in one sitting.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput

from .adapters_jnana import HUB_ARGUMENTS, load_adapted, read_base_reference
from .configuration_jnana import JnanaConfig


@dataclass
class JnanaModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    Outputs of [`JnanaModel`]: those of a language model, and

    image_hidden_states (`torch.FloatTensor` of shape `(num_images * num_image_tokens, hidden_size)`, *optional*):
        The projected image features that took the places of the image tokens.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class JnanaCausalLMOutputWithPast(ModelOutput):
    r"""
    Outputs of [`JnanaForConditionalGeneration`].

    loss (`torch.FloatTensor` of shape `(1,)`, *optional*): Next-token cross-entropy, when labels are given.
    logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`): Scores before the softmax.
    past_key_values (`Cache`, *optional*): Keys and values of what has been read.
    hidden_states, attentions (`tuple`, *optional*): The language model's, when asked for.
    image_hidden_states (`torch.FloatTensor` of shape `(num_images * num_image_tokens, hidden_size)`, *optional*):
        Projected image features.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None


class JnanaPreTrainedModel(PreTrainedModel):
    """What [`JnanaModel`] and [`JnanaForConditionalGeneration`] share."""

    config: JnanaConfig
    config_class = JnanaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def is_custom_code(cls) -> bool:
        # For custom code transformers skips the `_init_weights` of every module without parameters of its own, so that
        # weights of CLIP's attention and MLP that a checkpoint lacks would silently start from torch's defaults.
        return False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        As `PreTrainedModel.from_pretrained`, and an adapter's folder as run_sft writes it gives the whole model: its
        base, held as it was in training (`quantization_config=None`: in full precision), with the adapter on it.
        """
        path = pretrained_model_name_or_path
        if path is not None and cls.can_generate():
            hub_arguments = {
                name: kwargs[name] for name in (*HUB_ARGUMENTS, "revision", "subfolder") if name in kwargs
            }
            reference = read_base_reference(path, **hub_arguments)
            if reference is not None:
                return load_adapted(cls, str(path), reference, kwargs)
        return super().from_pretrained(path, *model_args, **kwargs)

    def __init_subclass__(cls, **kwargs):
        """
        FSDP2 makes a model an instance of a class that it derives on the spot, in a module of torch. It keeps our name
        and module here: by them transformers finds the code and the `auto_map` that a checkpoint is saved with.
        """
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("torch."):
            ours = next(base for base in cls.__mro__[1:] if issubclass(base, JnanaPreTrainedModel))
            cls.__module__, cls.__name__, cls.__qualname__ = ours.__module__, ours.__name__, ours.__qualname__

    def post_init(self):
        """As `PreTrainedModel.post_init`; `_no_split_modules` then names only classes that this model holds."""
        super().post_init()
        # CLIP's list names its text half too, and accelerate's FSDP refuses a class it does not find
        held = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = held.intersection(self._no_split_modules or ())

    def save_pretrained(  # type: ignore[override]
        self, save_directory, is_main_process: bool = True, *, save_original_format=False, **kwargs
    ):
        """
        As `PreTrainedModel.save_pretrained`, but weights keep the names they have in memory: transformers would
        otherwise write the towers under their legacy names, which the Trainer's resume
        (`load_state_dict(strict=False)`) misses.
        """
        super().save_pretrained(save_directory, is_main_process, save_original_format=save_original_format, **kwargs)


class JnanaGenerationMixin(GenerationMixin):
    """transformers' generation, with precomputed image features and Phi-3's change of rotary embedding."""

    config: JnanaConfig
    model: Any

    def generate(self, inputs: torch.Tensor | None = None, *args, **kwargs):
        """
        As `GenerationMixin.generate`; images are encoded once, before the first token. Takes `image_features` as
        [`JnanaModel.forward`] does.
        """
        kwargs.pop("mm_token_type_ids", None)  # some processors add them; image tokens are known by their id
        if kwargs.get("pixel_values") is None:
            kwargs.pop("pixel_values", None)
        image_features = kwargs.pop("image_features", None)
        if image_features is not None:
            # `mm_encoder_outputs` is what generation repeats for beams and leaves out once the cache is filled.
            with torch.no_grad():
                projected = self.model.project_vision_features(image_features)
            kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=projected)}
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ) -> dict[str, Any]:
        """
        As `GenerationMixin.prepare_inputs_for_generation`, which passes images with the first step only. Phi-3 reads
        all anew when it passes the length at which its rotary embedding changes (LongRoPE), images included.
        """
        text_config = self.config.text_config
        if text_config.model_type == "phi3" and past_key_values and inputs_embeds is None:
            limit = text_config.original_max_position_embeddings
            if input_ids.shape[1] > limit and 0 < past_key_values.get_seq_length() <= limit:
                next_sequence_length, past_key_values, is_first_iteration = None, None, True
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
