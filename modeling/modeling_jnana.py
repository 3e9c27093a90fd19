"""Jnana: an image encoder, a projector and a causal language model behind one `forward`.

The ladder is transformers' own (config -> PreTrainedModel -> Model -> ForConditionalGeneration) and names are those of
its LLaVA, so that Trainer, pipelines, TRL and servers find what they look for. No class here inherits from LLaVA:
transformers renames weights by class name and model type, and a checkpoint must hold the names the model has in
memory.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check

from .backbones_jnana import (
    build_head,
    build_vision_tower,
    check_text_family,
    find_unused_parameters,
    image_shape,
    join_pretrained,
    select_image_features,
)
from .configuration_jnana import JnanaConfig
from .loading_jnana import (
    HUB_ARGUMENTS,
    REPOSITORY_ARGUMENTS,
    disable_packed_kernel,
    load_adapted,
    read_base_reference,
)
from .packed_attention_jnana import check_packed_inputs, create_packed_mask
from .projector_jnana import build_projector


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
            names = (*HUB_ARGUMENTS, *REPOSITORY_ARGUMENTS)
            hub_arguments = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            reference = read_base_reference(path, **hub_arguments)
            if reference is not None:
                return load_adapted(cls, str(path), reference, kwargs)
        loaded = super().from_pretrained(path, *model_args, **kwargs)
        disable_packed_kernel(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

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


class JnanaImageMixin:
    """How [`JnanaModel`] reads images with its vision tower and projector."""

    config: JnanaConfig
    vision_tower: PreTrainedModel
    multi_modal_projector: nn.Module
    language_model: PreTrainedModel

    def get_vision_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> tuple[Any, torch.Tensor]:
        """
        What the projector reads. A tower without any trainable parameter runs without building a graph.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`): The images of the
                whole batch, in the order in which its rows name them.
            vision_feature_layer (`int` or `list[int]`, *optional*): Instead of the config's.
            vision_feature_select_strategy (`str`, *optional*): Instead of the config's.

        Returns:
            `tuple`: The tower's output, and features of shape `(num_images, num_image_tokens, vision_feature_size)`.

        Raises:
            ValueError: If `pixel_values` isn't a batch of images.
        """
        if pixel_values.ndim != 4:
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}; give (num_images, channels, height, width), "
                "the images of all rows one after the other."
            )
        config = self.config
        trainable = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trainable):
            return select_image_features(
                self.vision_tower,
                pixel_values,
                layers=config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer,
                strategy=vision_feature_select_strategy or config.vision_feature_select_strategy,
                num_prefix_tokens=config.num_prefix_tokens,
                **kwargs,
            )

    def project_vision_features(self, image_features: torch.Tensor) -> list[torch.Tensor]:
        """
        Carry vision features into the language model's embedding space.

        Args:
            image_features (`torch.FloatTensor` of shape `(num_images, num_image_tokens, vision_feature_size)`): As
                [`~JnanaModel.get_vision_features`] gives them, or stored from an earlier run.

        Returns:
            `list[torch.FloatTensor]`: One tensor of shape `(num_image_tokens, hidden_size)` an image.

        Raises:
            ValueError: If the features are of another shape.
        """
        width = self.config.vision_feature_size
        if image_features.ndim != 3 or image_features.shape[-1] != width:
            raise ValueError(
                f"`image_features` has shape {tuple(image_features.shape)}; give (num_images, num_image_tokens, "
                f"{width}), as `get_vision_features` gives them with this config's `vision_feature_layer` and "
                "`vision_feature_select_strategy`."
            )
        # PEFT keeps the frozen original beside the copy that trains, and 4-bit weights are of no float dtype.
        weights = [weight for weight in self.multi_modal_projector.parameters() if weight.is_floating_point()]
        weight = next((weight for weight in weights if weight.requires_grad), weights[0])
        return list(self.multi_modal_projector(image_features.to(weight.device, weight.dtype)))

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Image features as the language model reads them; arguments as in [`~JnanaModel.get_vision_features`].

        Returns:
            `BaseModelOutputWithPooling`: The tower's output, with in `pooler_output` a list of one tensor of shape
            `(num_image_tokens, hidden_size)` an image.
        """
        outputs, features = self.get_vision_features(
            pixel_values, vision_feature_layer, vision_feature_select_strategy, **kwargs
        )
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self.project_vision_features(features),  # type: ignore[arg-type]
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """
        The places that image features take; found from embeddings where ids are not given.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Token ids.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`): Embeddings.
            image_features (`torch.FloatTensor` of shape `(num_image_vectors, hidden_size)`): Projected features.

        Returns:
            `torch.BoolTensor` of shape `(batch_size, sequence_length, 1)`.

        Raises:
            ValueError: Unless there are as many image tokens as image vectors.
        """
        image_token_id = self.config.image_token_id
        if input_ids is None:
            image_token = torch.full((), image_token_id, dtype=torch.long, device=inputs_embeds.device)
            image_mask = (inputs_embeds == self.language_model.get_input_embeddings()(image_token)).all(-1)
        else:
            image_mask = input_ids == image_token_id
        self._check_counts(image_mask, image_features.shape[0])
        return image_mask.unsqueeze(-1)

    def unused_vision_parameters(self) -> list[str]:
        """
        Parameters of the tower on which the selected features do not depend: CLIP's `post_layernorm`, layers behind
        the selected one. They never get a gradient, so freeze them, or DistributedDataParallel has to search for them.

        Returns:
            `list[str]`: Their names, as in `named_parameters()` of this model.
        """
        return [f"vision_tower.{name}" for name in find_unused_parameters(self.vision_tower, self.config)]

    def _read_images(
        self,
        pixel_values: torch.Tensor | None,
        image_features: torch.Tensor | None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None,
        vision_feature_layer: int | list[int] | None,
        vision_feature_select_strategy: str | None,
    ) -> torch.Tensor | None:
        """Projected features of shape `(num_image_vectors, hidden_size)`, from whichever way images were given."""
        encoded = (mm_encoder_outputs or {}).get("image")
        if sum(value is not None for value in (pixel_values, image_features, encoded)) > 1:
            raise ValueError(
                "Images are given twice; give only one of `pixel_values`, `image_features`, `mm_encoder_outputs`."
            )
        if pixel_values is not None:
            encoded = self.get_image_features(
                pixel_values, vision_feature_layer, vision_feature_select_strategy, return_dict=True
            )
        if image_features is not None:
            return torch.cat(self.project_vision_features(image_features))
        # A list of (tokens, hidden_size) or a tensor (images, tokens, hidden_size).
        return None if encoded is None else torch.cat(list(encoded.pooler_output))  # type: ignore[arg-type]

    def _show_images(self, vectors: torch.Tensor | None, image_indices: torch.Tensor) -> torch.Tensor:
        """Vectors `(num_images * num_image_tokens, hidden_size)` of the images that `image_indices` names."""
        size = self.config.num_image_tokens
        num_images = 0 if vectors is None else len(vectors) // size
        if vectors is None or image_indices.ndim != 1:
            raise ValueError(
                f"`image_indices` has shape {tuple(image_indices.shape)} for {num_images} images; give one number for "
                "each place of an image, together with the images."
            )
        torch_compilable_check(
            (image_indices >= 0).all() & (image_indices < num_images).all(),
            lambda: f"`image_indices` {image_indices.tolist()} must be from 0 to {num_images - 1}, one of the images.",
        )
        return vectors.view(num_images, size, -1)[image_indices.to(vectors.device)].flatten(0, 1)

    def _check_counts(self, image_mask: torch.Tensor, num_vectors: int) -> None:
        """Raise `ValueError` unless there are as many image tokens as image vectors."""
        num_tokens, size = image_mask.sum(), self.config.num_image_tokens
        torch_compilable_check(
            num_tokens == num_vectors,
            lambda: (
                f"The text has {int(num_tokens)} image tokens (`image_token_id` {self.config.image_token_id}), but "
                f"the images give {num_vectors} vectors, {size} an image ({num_vectors // size} images). Let the "
                "processor write the image tokens, pass every image that the text names, and load model and processor "
                "from one folder."
            ),
        )

    def _others_may_read_images(self, past_key_values: Cache | None) -> bool:
        """Whether other processes may be reading images now: several run, and this is no step of generation."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return False
        return past_key_values is None or past_key_values.get_seq_length() == 0

    def _touch_image_path(self, device: torch.device, stored: bool) -> torch.Tensor:
        """
        Run tower and projector on a black image, or the projector alone on features of zeros (`stored`: the processes
        read stored features); returns a zero that depends on them. When several processes compute together and one has
        a batch without images, its parameters must take part all the same: DDP waits for their gradients, FSDP and
        ZeRO-3 for their shards, in evaluation too, and in the order in which the other processes ask: images first.
        """
        if stored:
            size = (1, self.config.num_image_tokens, self.config.vision_feature_size)
            return 0.0 * self.project_vision_features(torch.zeros(size, device=device))[0].sum()
        black = torch.zeros(image_shape(self.config), device=device, dtype=self.vision_tower.dtype)
        return 0.0 * self.get_image_features(black, return_dict=True).pooler_output[0].sum()


class JnanaModel(JnanaPreTrainedModel, JnanaImageMixin):
    """
    The pair without a language modeling head.

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
