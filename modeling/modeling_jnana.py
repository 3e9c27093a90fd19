# Copyright 2026 The Jnana authors. Licensed under the Apache License, Version 2.0.
"""The Jnana model: an image encoder, a projector and a causal language model with one `forward`.

The class hierarchy follows transformers (config -> PreTrainedModel -> Model -> ForConditionalGeneration) and the names
follow its LLaVA, so that Trainer, pipelines, TRL and inference servers find what they expect. No class here inherits
from a LLaVA class: transformers renames weights by class name and model type, and the names in a checkpoint must equal
the names in memory.

Runs unchanged on transformers 5.20 and every later 5.x release. [`CACHE_NAME`] covers the one renaming among them.
"""

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .backbones_jnana import (
    build_head,
    build_vision_tower,
    check_text_family,
    join_pretrained,
)
from .configuration_jnana import JnanaConfig
from .cross_attention_jnana import INPUTS_NAME, JnanaCrossAttentionLayer, JnanaCrossAttentionMixin
from .idefics_jnana import IDEFICS_MODEL_TYPE, load_idefics
from .image_inputs_jnana import ImageIndices, ImageSizes, JnanaImageMixin, normalize_pixels
from .image_slots_jnana import STATES_NAME
from .llava_jnana import LLAVA_MODEL_TYPES, load_llava
from .loading_jnana import (
    HUB_ARGUMENTS,
    REPOSITORY_ARGUMENTS,
    disable_packed_kernel,
    load_adapted,
    model_type_of,
    read_base_reference,
)
from .loss_jnana import IGNORED, head_loss, log_unfused, select_labelled, token_losses, unfused_reason
from .packed_attention_jnana import check_packed_inputs, prepare_packed_attention
from .packed_layout_jnana import PackedLayout
from .projector_jnana import JnanaProjector, build_projector
from .resampler_jnana import JnanaPerceiverResampler


CACHE_NAMES = ("past_key_values", "cache")
# The name that the installed transformers gives the cache of keys and values, in the inputs of `forward` and in every
# output: `past_key_values` up to 5.23, `cache` from 5.24 on. `forward` and `generate` take both names on all versions.
_OUTPUT_FIELDS = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
CACHE_NAME = next(name for name in CACHE_NAMES if name in _OUTPUT_FIELDS)


class _ImageOutputs:
    """The attribute `image_outputs`, which the outputs of multimodal models have from transformers 5.24 on."""

    image_hidden_states: torch.Tensor | None

    @property
    def image_outputs(self) -> BaseModelOutputWithPooling | None:
        """`BaseModelOutputWithPooling` or `None`: `image_hidden_states` as `pooler_output`."""
        if self.image_hidden_states is None:
            return None
        return BaseModelOutputWithPooling(pooler_output=self.image_hidden_states)  # type: ignore[arg-type]


@dataclasses.dataclass
class JnanaModelOutputWithPast(_ImageOutputs, BaseModelOutputWithPast):
    r"""
    Outputs of [`JnanaModel`]: those of a language model (`last_hidden_state`, the cache under [`CACHE_NAME`],
    `hidden_states`, `attentions`), and

    image_hidden_states (`torch.FloatTensor` of shape `(num_image_vectors, hidden_size)`, *optional*):
        The projected image features that replaced the embeddings of the image tokens.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclasses.dataclass
class JnanaCausalLMOutputWithPast(_ImageOutputs, CausalLMOutputWithPast):
    r"""
    Outputs of [`JnanaForConditionalGeneration`]: those of a causal language model (`loss`, `logits`, the cache under
    [`CACHE_NAME`], `hidden_states`, `attentions`), and

    image_hidden_states (`torch.FloatTensor` of shape `(num_image_vectors, hidden_size)`, *optional*):
        The projected image features that replaced the embeddings of the image tokens.
    token_losses (`torch.FloatTensor` of shape `(num_positions,)`, *optional*, returned with `return_token_losses`):
        The loss of each position that logits are computed for, without gradients.
    """

    image_hidden_states: torch.Tensor | None = None
    token_losses: torch.FloatTensor | None = None


class JnanaPreTrainedModel(PreTrainedModel):
    """Loading, saving and weight initialisation of [`JnanaModel`] and [`JnanaForConditionalGeneration`]."""

    config: JnanaConfig
    config_class = JnanaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["JnanaCrossAttentionLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        As `PreTrainedModel.from_pretrained`. A directory in which run_sft saved an adapter gives the whole model: the
        base, in the precision it had in training (`quantization_config=None` asks for full precision), with the
        adapter loaded into it. A LLaVA checkpoint is loaded as `from_llava_pretrained` does, an IDEFICS checkpoint as
        `from_idefics_pretrained` does.
        """
        path = pretrained_model_name_or_path
        if path is not None and cls.can_generate():
            names = (*HUB_ARGUMENTS, *REPOSITORY_ARGUMENTS)
            hub_arguments = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            reference = read_base_reference(path, **hub_arguments)
            if reference is not None:
                return load_adapted(cls, str(path), reference, kwargs)
            model_type = model_type_of(path, **hub_arguments) if kwargs.get("config") is None else None
            if model_type in LLAVA_MODEL_TYPES:
                return load_llava(cls, path, **kwargs)
            if model_type == IDEFICS_MODEL_TYPE:
                return load_idefics(cls, path, **kwargs)
        loaded = super().from_pretrained(path, *model_args, **kwargs)
        disable_packed_kernel(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @property
    def dtype(self) -> torch.dtype:
        """
        `torch.dtype`: As `PreTrainedModel.dtype`, the dtype of the first weight, but of the last frozen one where some
        are frozen: those that train are held in float32 beside them, and with the tower that is the first weight. A
        saved `config.json` names this dtype, and `from_pretrained` then loads all weights in it.
        """
        frozen = [weight for weight in self.parameters() if weight.is_floating_point() and not weight.requires_grad]
        return frozen[-1].dtype if frozen else super().dtype

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, (JnanaProjector, JnanaPerceiverResampler, JnanaCrossAttentionLayer)):
            module.init_weights()

    def post_init(self):
        """As `PreTrainedModel.post_init`; then `_no_split_modules` names only classes that this model contains."""
        super().post_init()
        # CLIP also lists the layer of its text encoder, and accelerate's FSDP raises on a class that it can't find.
        classes = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = classes.intersection(self._no_split_modules or ())

    def initialize_weights(self):
        """
        As `PreTrainedModel.initialize_weights`, each backbone first. Called on a custom model like this one,
        transformers leaves out modules without parameters of their own, and CLIP initialises the weights of its
        attention and MLP in the `_init_weights` of such modules. Called on the backbone itself it leaves out none.
        """
        for child in self.children():
            if isinstance(child, PreTrainedModel):
                child.initialize_weights()
        super().initialize_weights()

    def save_pretrained(  # type: ignore[override]
        self, save_directory, is_main_process: bool = True, *, save_original_format=False, **kwargs
    ):
        """
        As `PreTrainedModel.save_pretrained`, but weights keep the names they have in memory: transformers would
        otherwise write the backbones under their legacy names, which the Trainer's resume
        (`load_state_dict(strict=False)`) does not find.
        """
        # FSDP2 (`fully_shard`) changes the class of a model to one that it derives from it inside torch. transformers
        # copies the file that defines the class of the model, so the model gets its own class back while it is saved.
        current_class = type(self)
        self.__class__ = next(base for base in current_class.__mro__ if not base.__module__.startswith("torch."))
        try:
            super().save_pretrained(
                save_directory, is_main_process, save_original_format=save_original_format, **kwargs
            )
        finally:
            self.__class__ = current_class


_ASSISTANT = "image_of_assistant"  # the key in `mm_encoder_outputs` of what the assistant model of `generate` encoded


class JnanaGenerationMixin(GenerationMixin):
    """transformers' generation, with precomputed image features and the change of Phi-3's rotary embedding."""

    config: JnanaConfig
    model: Any

    def generate(self, inputs: torch.Tensor | None = None, *args, **kwargs):
        """
        As `GenerationMixin.generate`. Images are encoded once, before the first token. Takes `image_features` and
        `pixel_table` as [`JnanaModel.forward`] does, and the cache as `past_key_values` or `cache`.

        Raises:
            ValueError: If the prompt has image tokens, and neither images nor a filled cache are given; if images are
                bytes without a `pixel_table`.
        """
        cache = _one_cache(*(kwargs.pop(name, None) for name in CACHE_NAMES))
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        kwargs.pop("mm_token_type_ids", None)  # some processors add them; image tokens are known by their id
        if kwargs.get("pixel_values") is None:
            kwargs.pop("pixel_values", None)
        pixel_table = kwargs.pop("pixel_table", None)
        if pixel_table is not None and "pixel_values" in kwargs:
            kwargs["pixel_values"] = normalize_pixels(kwargs["pixel_values"], pixel_table)
        image_features = kwargs.pop("image_features", None)
        if image_features is not None:
            # generate() repeats `mm_encoder_outputs` for beams, and drops it once the cache is filled.
            with torch.no_grad():
                projected = self.model.project_vision_features(image_features, kwargs.pop("image_sizes", None))
            kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=projected)}
        self._encode_for_assistant(kwargs)
        ids = kwargs.get("input_ids") if inputs is None else inputs
        given = any(kwargs.get(name) is not None for name in ("mm_encoder_outputs", "pixel_values", "inputs_embeds"))
        if ids is not None and not given and (cache is None or cache.get_seq_length() == 0):
            self.model._check_images(ids == self.config.image_token_id, 0)
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def _encode_for_assistant(self, kwargs: dict[str, Any]) -> None:
        """
        Assisted decoding gives the assistant model the image vectors of this one. They are of another projector, and
        perhaps of another width, so the assistant gets vectors of its own beside them and takes these.
        """
        encoded = kwargs.get("mm_encoder_outputs")
        settings = kwargs.get("generation_config")
        if settings is not None and settings.is_assistant and encoded is not None:
            kwargs["mm_encoder_outputs"] = {name: encoded[_ASSISTANT] for name in ("image",) if _ASSISTANT in encoded}
        assistant = kwargs.get("assistant_model")
        if isinstance(assistant, JnanaGenerationMixin) and kwargs.get("prefill_chunk_size") is not None:
            raise ValueError(
                "`prefill_chunk_size` and an `assistant_model` that sees images can't be combined; leave one "
                "of them out."
            )
        pixel_values, image_sizes = kwargs.get("pixel_values"), kwargs.get("image_sizes")
        if isinstance(assistant, JnanaGenerationMixin) and pixel_values is not None:
            models: dict[str, Any] = {"image": self, _ASSISTANT: assistant}
            names = ("vision_feature_layer", "vision_feature_select_strategy")
            options = {"image": {name: kwargs.pop(name, None) for name in names}, _ASSISTANT: {}}
            with torch.no_grad():
                kwargs["mm_encoder_outputs"] = {
                    name: model.model.get_image_features(
                        pixel_values.to(model.device), image_sizes=image_sizes, return_dict=True, **options[name]
                    )
                    for name, model in models.items()
                }
            del kwargs["pixel_values"]
            kwargs.pop("image_sizes", None)

    def prepare_inputs_for_generation(  # type: ignore[override]  # the other parameters are passed on
        self, input_ids: torch.LongTensor, inputs_embeds: torch.Tensor | None = None, **kwargs
    ) -> dict[str, Any]:
        """
        As `GenerationMixin.prepare_inputs_for_generation`, which passes images with the first step only. Phi-3
        processes the whole sequence again, images included, when it passes the length at which its rotary embedding
        changes (LongRoPE).
        """
        text_config, cache = self.config.text_config, kwargs.get(CACHE_NAME)
        # The step before which nothing is cached is the first, also that of an assistant model, which transformers
        # calls a later one. Only a step of several tokens can be it.
        if kwargs.get("next_sequence_length") != 1 and (cache is None or cache.get_seq_length() == 0):
            if any(kwargs.get(name) is not None for name in ("mm_encoder_outputs", "pixel_values")):
                kwargs["is_first_iteration"] = True
        if text_config.model_type == "phi3" and cache is not None and inputs_embeds is None:
            limit = text_config.original_max_position_embeddings
            if input_ids.shape[1] > limit and 0 < cache.get_seq_length() <= limit:
                kwargs |= {"next_sequence_length": None, CACHE_NAME: None, "is_first_iteration": True}
                if kwargs.get("pixel_values") is None and not kwargs.get("mm_encoder_outputs"):
                    self.model._check_images(input_ids == self.config.image_token_id, 0)
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )


class JnanaModel(JnanaPreTrainedModel, JnanaImageMixin, JnanaCrossAttentionMixin):
    """
    Vision tower, projector and language model without its head, with `fusion: cross_attention` also the blocks that
    let it attend to images. [`JnanaImageMixin`] has the part about images, [`JnanaCrossAttentionMixin`] the blocks.

    Args:
        config ([`JnanaConfig`]): The configuration.
    """

    def __init__(self, config: JnanaConfig):
        super().__init__(config)
        config.check_image_seq_length()
        self.vision_tower = build_vision_tower(config)
        self.multi_modal_projector = build_projector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        if config.fusion == "cross_attention":
            self.build_cross_attention()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def train(self, mode: bool = True):
        """
        As `torch.nn.Module.train`, but a frozen backbone runs without dropout: dropout regularises weights that train,
        and only adds noise to those that don't. A backbone counts as frozen when none of its own weights trains; the
        weights that PEFT adds beside them may, and keep their own dropout (`lora_dropout`). Freeze before the call.
        """
        super().train(mode)
        if mode:
            for backbone in (self.vision_tower, self.language_model):
                _stop_dropout_if_frozen(backbone)
        return self

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
        image_indices: ImageIndices | None = None,
        image_sizes: ImageSizes | None = None,
        image_positions: torch.LongTensor | None = None,
        max_row_image_tokens: int | None = None,
        segment_ids: torch.LongTensor | None = None,
        branch_ids: torch.LongTensor | None = None,
        packed_layout: PackedLayout | None = None,
        pixel_table: torch.Tensor | None = None,
        cache: Cache | None = None,
        has_labels: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | JnanaModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Token ids, with
                `config.num_image_tokens` image tokens for each image, or as many as its size gives (below).
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`, *optional*): The images
                of all rows one after the other. Rows may have none, one or many. With `image_grid_pinpoints` an image
                is several views: [`~JnanaModel.get_vision_features`] has the two shapes.
            image_sizes (`torch.LongTensor` of shape `(num_images, 2)`, *optional*): (height, width) of each image in
                pixels, before it was processed. Used, and then needed, with `image_grid_pinpoints` only.
            past_key_values, cache (`Cache`, *optional*): Keys and values of earlier tokens, under either of the two
                names that transformers 5 has used for them.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Instead of `input_ids`.
            image_features (`torch.FloatTensor` of shape `(num_views, num_view_features, vision_feature_size)`,
                *optional*): Instead of `pixel_values`: features before the projector, computed earlier. A batch
                without images gives 0 of them (`num_views` 0), where other processes may have some.
            mm_encoder_outputs (`dict`, *optional*): Instead of `pixel_values`: `{"image": output}`, what
                [`~JnanaModel.get_image_features`] returned.
            image_indices (`torch.LongTensor` of shape `(num_occurrences,)` or `list`, *optional*): For each occurrence
                of an image in the text, in reading order, the index of the image. An image may be used many times and
                is encoded once. By default one image after the other.
            image_positions (`torch.LongTensor` of shape `(num_image_tokens,)`, *optional*): Where the image tokens
                stand, as indices into the rows laid end to end, from who has compared them with the images:
                `JnanaCollator`. The image tokens are then not counted again, which would make a GPU wait.
            max_row_image_tokens (`int`, *optional*): With `image_positions`: the most image tokens of a row.
            segment_ids, branch_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): For
                packed rows, with `position_ids` and without `attention_mask`: see `packed_attention_jnana.py`.
            packed_layout ([`PackedLayout`], *optional*): The layout that these describe, as `JnanaCollator` makes it;
                derived from them if it is not given.
            pixel_table (`torch.FloatTensor` of shape `(channels, 256)`, *optional*): With `pixel_values` of dtype
                `torch.uint8`, as `JnanaCollator` makes them for the training scripts: the value that the image
                processor gives each level of each channel ([`normalize_pixels`]). Images are then normalised on the
                device, and a quarter of the bytes is sent to it.
            has_labels (`bool`, *optional*, defaults to `False`): Whether a loss will be computed from the outputs. A
                batch without images then runs the tower on a black image, if several processes train together.

        With `fusion: tokens`, image tokens without images keep the embeddings of their own, as in transformers' LLaVA
        (that of token 0 where the embedding has no row for them), but not with labels.

        Raises:
            ValueError: If images or the cache are given under two names, or the number of images differs from that of
                the image tokens; if there are labels and image tokens, but no images; if the inputs of packed rows are
                incomplete; if the attention implementation does not support packed rows, or overflows (Phi in float16
                with eager attention).
        """
        cache = _one_cache(past_key_values, cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        given = inputs_embeds if input_ids is None else input_ids
        packed = segment_ids is not None or branch_ids is not None or packed_layout is not None
        if packed:
            shape = (given.shape[0], given.shape[1])  # type: ignore[union-attr]  # one is given
            check_packed_inputs(segment_ids, branch_ids, position_ids, attention_mask, cache, shape)
        if pixel_values is not None and pixel_table is not None:
            pixel_values = normalize_pixels(pixel_values, pixel_table)
        # 0 features: this batch has no images, and the other processes read precomputed features of theirs.
        no_features = image_features is not None and image_features.shape[0] == 0
        images = self._project_images(
            pixel_values,
            None if no_features else image_features,
            mm_encoder_outputs,
            vision_feature_layer,
            vision_feature_select_strategy,
            image_sizes,
        )
        if images is None and has_labels and input_ids is not None:
            self._check_images(input_ids == self.config.image_token_id, 0, image_positions)
        blank = None
        if images is None and self._must_encode_blank_image(has_labels, cache):
            blank = self._encode_blank_image(given.device, no_features)  # type: ignore[union-attr]  # one is given
        cross_inputs = None
        if self.config.fusion == "cross_attention":
            inputs_embeds, cross_inputs = self.attend_to_images(
                input_ids,
                inputs_embeds,
                images,
                blank,
                image_indices,
                cache,
                segment_ids,
                branch_ids,
                image_positions,
                max_row_image_tokens,
            )
            image_hidden_states = None if images is None else cross_inputs.image_vectors
            kwargs[INPUTS_NAME] = cross_inputs  # type: ignore[typeddict-unknown-key]
        else:
            inputs_embeds, image_hidden_states = self._place_images(
                input_ids, inputs_embeds, images, blank, image_indices, image_positions
            )

        if packed:
            attention_mask, layout = prepare_packed_attention(
                self.language_model,
                inputs_embeds,
                segment_ids,  # type: ignore[arg-type]  # checked
                branch_ids,  # type: ignore[arg-type]
                position_ids,  # type: ignore[arg-type]
                packed_layout,
            )
            if layout is not None:
                kwargs["packed_layout"] = layout  # type: ignore[typeddict-unknown-key]
            kwargs["use_cache"] = False  # type: ignore[typeddict-unknown-key]
        _check_float16_attention(self.language_model.config, inputs_embeds)
        # The paged cache of continuous batching goes past the language model to its attention, where it has this name.
        cache_name = CACHE_NAME if cache is None or isinstance(cache, Cache) else "cache"
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{cache_name: cache},
            **kwargs,
        )
        filled = getattr(outputs, CACHE_NAME)
        if cross_inputs is not None and filled is not None:
            setattr(filled, STATES_NAME, cross_inputs.states)
        return JnanaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_hidden_states,
            **{CACHE_NAME: filled},
        )

    def _place_images(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        images: list[torch.Tensor] | None,
        blank: torch.Tensor | None,
        image_indices: ImageIndices | None,
        image_positions: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`fusion: tokens`: embeddings with image vectors at the positions of the image tokens, and these vectors."""
        shown = images if image_indices is None else self._select_images(images, image_indices)
        image_hidden_states = None if shown is None else torch.cat(shown)
        if input_ids is not None:
            # The image token needs no row in the embedding: its vector is used only where no image is given, as when
            # an exporter or an assistant model runs the text alone.
            has_row = self.config.image_token_id < self.config.text_config.vocab_size
            if image_hidden_states is None and has_row:
                text_ids = input_ids
            else:
                text_ids = input_ids.masked_fill(input_ids == self.config.image_token_id, 0)
            inputs_embeds = self.get_input_embeddings()(text_ids)
        assert inputs_embeds is not None  # for mypy; checked by the caller
        if image_hidden_states is not None:
            image_hidden_states = image_hidden_states.to(inputs_embeds.device, inputs_embeds.dtype)
            if image_positions is None:
                image_mask = self.get_placeholder_mask(
                    input_ids,  # type: ignore[arg-type]
                    inputs_embeds,
                    image_hidden_states,
                    image_indices,
                    len(images or ()),
                )
                inputs_embeds = inputs_embeds.masked_scatter(image_mask, image_hidden_states)
            else:  # the gradient of `masked_scatter` would read the number of image tokens
                self._check_positions(image_positions, len(image_hidden_states))
                places = image_positions.to(inputs_embeds.device)
                filled = inputs_embeds.flatten(0, 1).index_copy(0, places, image_hidden_states)
                inputs_embeds = filled.view_as(inputs_embeds)
        elif blank is not None:
            inputs_embeds = inputs_embeds + (0.0 * blank.sum()).to(inputs_embeds.dtype)
        return inputs_embeds, image_hidden_states


def _check_float16_attention(text_config: PreTrainedConfig, inputs_embeds: torch.Tensor) -> None:
    """
    Raise `ValueError` for Phi in float16 with eager attention. The products of Phi-2's queries and keys exceed the
    largest float16 number, 65,504. sdpa, flex and flash attention compute them in float32; eager attention does not.
    """
    # Not public, but the name by which transformers documents that custom models look up their registered attention.
    if text_config.model_type != "phi" or text_config._attn_implementation != "eager":
        return
    device = inputs_embeds.device.type
    if device == "meta":
        return
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else inputs_embeds.dtype
    if dtype == torch.float16:
        raise ValueError(
            "`attn_implementation` is 'eager', which computes the attention scores of Phi in float16, where they "
            "overflow. Load the model with `attn_implementation='sdpa'`, or use bfloat16 or float32."
        )


def _one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache, given under one of the names that transformers 5 has used for it."""
    if past_key_values is not None and cache is not None:
        raise ValueError("The cache is given twice; give only one of `past_key_values` and `cache`.")
    return cache if past_key_values is None else past_key_values


def _own_modules(module: nn.Module) -> list[nn.Module]:
    """`module` and all below it, without what PEFT puts beside a layer (it keeps the layer itself as `base_layer`)."""
    pending, found = [module], []
    while pending:
        children = dict(pending[-1].named_children())
        if "base_layer" in children:
            pending[-1:] = [children["base_layer"]]
        else:
            found.append(pending.pop())
            pending.extend(children.values())
    return found


def _stop_dropout_if_frozen(backbone: nn.Module) -> None:
    """Put a backbone without trainable weights of its own into evaluation mode, but for gradient checkpointing."""
    modules = _own_modules(backbone)
    if any(parameter.requires_grad for module in modules for parameter in module.parameters(recurse=False)):
        return
    for module in modules:
        # A decoder layer is checkpointed in training mode only. Its dropout is in the modules that it contains.
        module.training = isinstance(module, GradientCheckpointingLayer)


class JnanaForConditionalGeneration(JnanaPreTrainedModel, JnanaGenerationMixin):
    """
    Vision tower, projector and language model with the language model's own head.

    Args:
        config ([`JnanaConfig`]): The configuration.

    Raises:
        ValueError: If the head of the language model's family can't be reproduced exactly.
    """

    _tp_plan = {"lm_head": "colwise_gather_output"}
    # Whether the fused loss runs Liger's Triton kernel, which needs liger-kernel and a GPU, instead of torch's.
    use_liger_kernel = False

    def __init__(self, config: JnanaConfig):
        check_text_family(config.text_config)
        super().__init__(config)
        self.model = JnanaModel(config)
        self.lm_head = build_head(config.text_config)
        # GPT-NeoX calls its embedding `embed_in`, the others `embed_tokens`.
        embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        # An image token in an answer would need an image in the next turn.
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
        Join two checkpoints with a freshly initialised projector.

        Args:
            vision (`str`): Hub id or directory of an image encoder, alone or inside a full CLIP or SigLIP.
            text (`str`): Hub id or directory of a causal language model.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): Of the whole model; `"auto"` is the
                language model's.
            attn_implementation (`str` or `dict`, *optional*): For both, or a dict with `vision_config`, `text_config`.
            vision_kwargs, text_kwargs (`dict`, *optional*): `from_pretrained` arguments for one of the two only.
            **kwargs: Fields of [`JnanaConfig`] (`image_token_id`, `projector_type`, ...); any other goes to both
                `from_pretrained` (`cache_dir`, `token`, `trust_remote_code`, ...).

        Returns:
            [`JnanaForConditionalGeneration`]: In evaluation mode, with exactly the two checkpoints' weights.

        Raises:
            ValueError: If the language model's family is not supported, or a checkpoint lacks weights.
        """
        return join_pretrained(
            cls, vision, text, dtype, attn_implementation, vision_kwargs or {}, text_kwargs or {}, kwargs
        )

    @classmethod
    def from_idefics_pretrained(
        cls,
        path: str,
        *,
        image_token_id: int | None = None,
        dtype: str | torch.dtype | None = None,
        **kwargs: Any,
    ) -> "JnanaForConditionalGeneration":
        """
        An IDEFICS checkpoint as a Jnana model with `fusion: cross_attention` and the same logits.

        Args:
            path (`str`): Hub id or directory.
            image_token_id (`int`, *optional*): The id of `<image>`; by default that of the checkpoint's tokenizer.
            dtype (`str` or `torch.dtype`, *optional*): By default the checkpoint's, but bfloat16 for float16.
            **kwargs: For `from_pretrained` (`device_map`, `quantization_config`, `revision`, ...).

        Returns:
            [`JnanaForConditionalGeneration`]: In evaluation mode.

        Raises:
            ValueError: If the checkpoint lacks weights, or its config can't be expressed in a [`JnanaConfig`].
        """
        return load_idefics(cls, path, image_token_id=image_token_id, dtype=dtype, **kwargs)

    @classmethod
    def from_llava_pretrained(
        cls,
        path: str,
        *,
        dtype: str | torch.dtype | None = None,
        quantization_config: Any = None,
        **kwargs: Any,
    ) -> "JnanaForConditionalGeneration":
        """
        Load a published LLaVA-1.5 or LLaVA-1.6 checkpoint in the format of transformers (`llava-hf/llava-1.5-7b-hf`,
        `llava-hf/llava-v1.6-mistral-7b-hf`, ...). Logits and gradients equal those of transformers' own class.

        Args:
            path (`str`): Hub id or directory.
            dtype (`str` or `torch.dtype`, *optional*): By default the dtype that the weights are stored in, but
                bfloat16 where that is float16.
            quantization_config (`BitsAndBytesConfig`, *optional*): For a language model of 4 or 8 bits. The vision
                tower, the projector and the head are not quantised.
            **kwargs: For `from_pretrained` (`device_map`, `attn_implementation`, `revision`, `token`, ...).

        Returns:
            [`JnanaForConditionalGeneration`]: In evaluation mode, with exactly the checkpoint's weights.

        Raises:
            ValueError: If `path` holds another kind of model, its language model's family is not supported, or it
                lacks weights.
        """
        if quantization_config is not None:
            kwargs["quantization_config"] = quantization_config
        return load_llava(cls, path, dtype=dtype, **kwargs)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: ImageSizes | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """See [`JnanaModel.get_image_features`]."""
        return self.model.get_image_features(
            pixel_values, vision_feature_layer, vision_feature_select_strategy, image_sizes, **kwargs
        )

    def _can_fuse_loss(self) -> bool:
        """Whether the loss can be computed without logits; logs once why not."""
        reason = unfused_reason(self.lm_head)
        if reason is None and self.loss_function is not ForCausalLMLoss:
            reason = "the model has a loss function of its own"
        if reason is not None and not torch.compiler.is_compiling():
            log_unfused(reason)
        return reason is None

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
        logits_to_keep: int | torch.Tensor = 0,
        logit_positions: torch.LongTensor | None = None,
        skip_logits: bool = False,
        return_token_losses: bool = False,
        image_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_indices: ImageIndices | None = None,
        image_sizes: ImageSizes | None = None,
        image_positions: torch.LongTensor | None = None,
        max_row_image_tokens: int | None = None,
        segment_ids: torch.LongTensor | None = None,
        branch_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | JnanaCausalLMOutputWithPast:
        """
        Inputs as in [`JnanaModel.forward`], and

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): The tokens to predict,
                -100 at unsupervised positions; position i holds the token of position i.
            shift_labels (`torch.LongTensor`, *optional*): Instead of `labels`: position i holds the token that
                position i must predict. Shaped as the logits without their last dimension. It is read from `**kwargs`:
                as a parameter with `label` in its name the stock Trainer would want it in every evaluation batch.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): Positions to compute logits for: the
                last n (0 for all), or indices, or a boolean mask `(batch_size, sequence_length)`. With a mask the
                logits are `(num_kept, vocab_size)`, while `labels` and `shift_labels` still cover the whole rows. With
                the mask of the labelled positions, loss and gradients equal those of all logits.
            logit_positions (`torch.LongTensor` of shape `(num_kept,)`, *optional*): Instead of the boolean mask, which
                makes a GPU wait: the same positions as indices into the rows laid end to end.
            skip_logits (`bool`, *optional*, defaults to `False`): In training mode and with labels, compute the loss
                without keeping logits: `logits` is `None`, and the loss is fused with the head wherever
                [`~loss_jnana.unfused_reason`] finds nothing against it. Without effect in evaluation mode.
            return_token_losses (`bool`, *optional*, defaults to `False`): Give the loss of each labelled position too,
                for a log that tells several data sets apart. Liger's kernel does not give it.
        """
        shift_labels = kwargs.pop("shift_labels", None)  # type: ignore[typeddict-item]
        has_labels = labels is not None or shift_labels is not None
        if getattr(self, "_is_replica", False) and (logit_positions is not None or image_positions is not None):
            raise ValueError(
                "DataParallel splits the batches of `JnanaCollator` wrongly: positions are counted over the whole "
                "batch. Start one process for each GPU (`accelerate launch`), or let the process see one GPU "
                "(`CUDA_VISIBLE_DEVICES=0`)."
            )
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_features=image_features,
            mm_encoder_outputs=mm_encoder_outputs,
            image_indices=image_indices,
            image_sizes=image_sizes,
            image_positions=image_positions,
            max_row_image_tokens=max_row_image_tokens,
            segment_ids=segment_ids,
            branch_ids=branch_ids,
            has_labels=has_labels,
            **kwargs,
        )
        hidden_states, shift_labels = _select_positions(
            outputs.last_hidden_state, labels, shift_labels, logits_to_keep, logit_positions
        )
        skip_logits = skip_logits and self.training and has_labels
        logits, loss, losses = None, None, None
        if skip_logits and self._can_fuse_loss():
            given = (
                *(hidden_states, self.lm_head, _to_predict(labels, shift_labels), kwargs.get("num_items_in_batch")),
                *(kwargs.get("ignore_index", IGNORED), self.use_liger_kernel),
            )
            if return_token_losses:
                loss, losses = head_loss(*given, return_token_losses=True)
            else:
                loss = head_loss(*given)
        else:
            logits = self.lm_head(hidden_states)
            if has_labels:
                loss = self.loss_function(
                    logits=logits,
                    labels=labels,
                    vocab_size=self.config.text_config.vocab_size,
                    shift_labels=shift_labels,
                    **kwargs,
                )
                if return_token_losses:
                    ignored: Any = kwargs.get("ignore_index", IGNORED)
                    losses = token_losses(logits, _to_predict(labels, shift_labels), ignored)
        return JnanaCausalLMOutputWithPast(
            loss=loss,
            logits=None if skip_logits else logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            token_losses=losses,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )


class JnanaWrongAutoClass(JnanaPreTrainedModel):
    """
    Raises the error of Auto classes that have no model of this kind: `AutoModelForCausalLM`, which text-only programs
    try first, and `AutoModelForSequenceClassification`, which reward models are made of.
    """

    def __init__(self, config: JnanaConfig, *args, **kwargs):
        raise ValueError(_WRONG_AUTO_CLASS)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        raise ValueError(f"{str(pretrained_model_name_or_path)!r}: {_WRONG_AUTO_CLASS}")


_WRONG_AUTO_CLASS = (
    "a Jnana model reads images and text and writes text, so it is not loaded as a text-only model, and it has no "
    "classification head. Load it with `AutoModelForImageTextToText` (or `AutoModelForMultimodalLM`), or with "
    "`AutoModel` for hidden states."
)


def _shifted(labels: torch.Tensor) -> torch.Tensor:
    """At each position the label of the next."""
    return nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORED)


def _to_predict(labels: torch.Tensor | None, shift_labels: torch.Tensor | None) -> torch.Tensor:
    """The token that each position must predict, from the one of the two that is given."""
    return _shifted(labels) if shift_labels is None else shift_labels  # type: ignore[arg-type]


def _select_positions(
    hidden_states: torch.Tensor,
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None,
    logits_to_keep: int | torch.Tensor,
    logit_positions: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The hidden states to compute logits for and, where both are selected by position, their labels; see
    [`JnanaForConditionalGeneration.forward`].
    """
    selected = isinstance(logits_to_keep, torch.Tensor) or logits_to_keep != 0
    if selected and logit_positions is not None:
        raise ValueError("Give `logits_to_keep` or `logit_positions`, not both.")
    if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.dtype == torch.bool:
        logit_positions = logits_to_keep.flatten().nonzero()[:, 0]
    if logit_positions is not None:
        if shift_labels is None and labels is not None:
            shift_labels = _shifted(labels)
        return select_labelled(hidden_states, shift_labels, logit_positions)
    if isinstance(logits_to_keep, int):
        return hidden_states[:, slice(-logits_to_keep, None)], shift_labels
    logits_to_keep = logits_to_keep.to(hidden_states.device)
    if logits_to_keep.ndim == 1:  # indices, the same for every row
        return hidden_states[:, logits_to_keep], shift_labels
    return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1), shift_labels  # indices of each row


JnanaModel.register_for_auto_class("AutoModel")
JnanaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = [
    "CACHE_NAME",
    "JnanaForConditionalGeneration",
    "JnanaModel",
    "JnanaPreTrainedModel",
    "JnanaWrongAutoClass",
]
