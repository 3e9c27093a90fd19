# Copyright 2026 The Jnana authors. Licensed under the Apache License, Version 2.0.
"""The configuration of a Jnana model: an image encoder, a causal language model and the projector that joins them.

This file contains only the fields, their checks and the number of tokens of an image, so that configs can be read and
written without building a model. It is copied into every saved checkpoint, so it imports only transformers.
"""

import copy
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES


PROJECTOR_TYPES = ("linear", "mlp", "resblock", "pixel_shuffle", "avg_pool", "perceiver")
# Projectors that join neighbouring vectors, so that a view takes fewer tokens than it has patches.
DOWNSAMPLING_PROJECTORS = ("pixel_shuffle", "avg_pool")
FUSIONS = ("tokens", "cross_attention")
CROSS_ATTENTION_GATES = ("scalar", "vector")
SELECT_STRATEGIES = ("default", "full", "pooled")

# The fields that define the projector, its inputs and the cross-attention. With the two backbones they define a model
# before training.
PROJECTOR_FIELDS = (
    "projector_type",
    "projector_hidden_act",
    "projector_num_blocks",
    "projector_layer_norm",
    "projector_downsample_factor",
    "projector_num_layers",
    "projector_num_latents",
    "projector_depth",
    "projector_num_heads",
    "projector_head_dim",
    "projector_qk_layer_norm",
    "multimodal_projector_bias",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "fusion",
    "cross_layer_interval",
    "cross_attention_intermediate_size",
    "cross_attention_qk_norm",
    "cross_attention_gate",
    "cross_attention_norm_eps",
    "image_end_token_id",
)

# Vectors before the patches in a tower's output (CLS), by model type. Registers are counted separately, by
# `num_register_tokens` in the configs of the towers that have them.
TOWER_CLS_TOKENS = {
    "clip_vision_model": 1,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "siglip_vision_model": 0,
    "vit": 1,
}

# Towers that interpolate their position embedding to the size of the image: DINOv2's config has 518 pixels, its image
# processor gives 224.
RESIZING_TOWERS = ("dinov2", "dinov2_with_registers", "dinov3_vit")

# Where the Auto classes find the code in a saved checkpoint, which has no subdirectories.
AUTO_MAP = {
    "AutoConfig": "configuration_jnana.JnanaConfig",
    "AutoModel": "modeling_jnana.JnanaModel",
    "AutoModelForImageTextToText": "modeling_jnana.JnanaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_jnana.JnanaForConditionalGeneration",
    "AutoModelForPreTraining": "modeling_jnana.JnanaForConditionalGeneration",
    # These raise an error that names the classes above.
    "AutoModelForCausalLM": "modeling_jnana.JnanaWrongAutoClass",
    "AutoModelForSequenceClassification": "modeling_jnana.JnanaWrongAutoClass",
}


class JnanaConfig(PreTrainedConfig):
    r"""
    Configuration of [`JnanaForConditionalGeneration`]. Names follow transformers' `LlavaConfig`.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*, defaults to `CLIPVisionConfig`):
            The image encoder (CLIP, SigLIP, DINOv2, ViT; the vision part only).
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to `PhiConfig`):
            The causal language model.
        image_token_id (`int`, *optional*, defaults to 50295):
            The token that is replaced by one image vector. The default is the first free row of Phi-2's embedding.
        projector_type (`str`, *optional*, defaults to `"mlp"`):
            `"linear"`, `"mlp"` (Linear, activation, Linear; LLaVA-1.5), `"resblock"` (Linear, then residual blocks),
            `"pixel_shuffle"` (the vectors of a square of patches side by side in one vector, then Linear layers;
            Idefics3), `"avg_pool"` (their mean, then Linear layers) or `"perceiver"` (a resampler with a fixed number
            of latents, then Linear).
        projector_hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation between the projector's Linear layers.
        projector_num_blocks (`int`, *optional*, defaults to 1):
            Residual blocks of `resblock`.
        projector_layer_norm (`bool`, *optional*, defaults to `False`):
            Whether `mlp` starts with a LayerNorm over the vision features.
        projector_downsample_factor (`int`, *optional*, defaults to 2):
            Side, in patches, of the squares that `pixel_shuffle` and `avg_pool` join to one vector.
        projector_num_layers (`int`, *optional*, defaults to 2):
            Linear layers of `pixel_shuffle` and `avg_pool`: 1, or 2 with the activation between them.
        projector_num_latents (`int`, *optional*, defaults to 64):
            Vectors that `perceiver` makes of an image.
        projector_depth (`int`, *optional*, defaults to 6):
            Layers of `perceiver`. This and the next three defaults are IDEFICS's.
        projector_num_heads (`int`, *optional*, defaults to 16):
            Attention heads of `perceiver`.
        projector_head_dim (`int`, *optional*, defaults to 96):
            Width of one of these heads.
        projector_qk_layer_norm (`bool`, *optional*, defaults to `True`):
            Whether `perceiver` normalises queries and keys.
        multimodal_projector_bias (`bool`, *optional*, defaults to `True`):
            Whether the projector's Linear layers have a bias.
        vision_feature_layer (`int` or `list[int]`, *optional*, defaults to -1):
            Which of the tower's hidden states to read (0 is the embedding); several are concatenated. Not used by
            `pooled`.
        vision_feature_select_strategy (`str`, *optional*, defaults to `"default"`):
            `"default"` (patches only), `"full"` (with CLS and registers) or `"pooled"` (the tower's own image
            embedding, one vector an image; CLIP's is the projected one).
        fusion (`str`, *optional*, defaults to `"tokens"`):
            How images reach the language model: `"tokens"` (their vectors stand in the row; LLaVA) or
            `"cross_attention"` (gated cross-attention blocks between its layers; Flamingo, IDEFICS). The latter needs
            `projector_type: perceiver`; an image takes one token of the row, which keeps its ordinary embedding.
        cross_layer_interval (`int`, *optional*, defaults to 4):
            A cross-attention block stands before every n-th layer of the language model, from the first on.
        cross_attention_intermediate_size (`int`, *optional*):
            Width inside the MLPs of the blocks; by default the language model's.
        cross_attention_qk_norm (`bool`, *optional*, defaults to `True`):
            Whether the blocks normalise queries and keys (RMSNorm of each head).
        cross_attention_gate (`str`, *optional*, defaults to `"scalar"`):
            The gates of the blocks: one number (`"scalar"`) or one for each channel (`"vector"`).
        cross_attention_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of the RMSNorms in the blocks.
        image_end_token_id (`int`, *optional*):
            With `cross_attention`, the token behind which no image is attended to until the next one, as IDEFICS's
            `</s>`. By default there is none, because a chat template may close every answer of a conversation with
            its end token, and the later questions are about the image too.
        image_size (`int`, *optional*):
            Side in pixels of the images that enter the tower, if it differs from `vision_config.image_size`: DINOv2's
            image processor gives 224, its config has 518. Only for towers that interpolate their position embedding.
        image_grid_pinpoints (`list[list[int]]`, *optional*):
            Resolutions (height, width) in pixels that an image is resized and padded to before it is cut into tiles
            (LLaVA-1.6, "anyres"). Each is a multiple of the tower's image size. The tower then encodes several views
            of an image, the whole image and its tiles, and the number of image tokens depends on the image's size.
            By default an image is one view.
        image_seq_length (`int`, *optional*):
            Tokens a view of an image takes. Derived from the tower and the projector; when given it must agree.
        num_prefix_tokens (`int`, *optional*):
            Vectors before the patches in the tower's output (CLS, registers). Derived for known towers.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Follows `text_config` when that ties them.
        tokenizer_fingerprint (`str`, *optional*):
            Digest of the tokenizer that the language model was trained with; used by the training code only.

    Raises:
        ValueError: If no model can be built from the value of a field; the message names field, value and remedy.
    """

    model_type = "jnana"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    # The Trainer gathers the other outputs of all processes; a batch without images has no `image_hidden_states`.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_hidden_states"]

    # Objects once constructed; dicts and None are made into objects by `__post_init__`.
    vision_config: PreTrainedConfig = None  # type: ignore[assignment]
    text_config: PreTrainedConfig = None  # type: ignore[assignment]
    image_token_id: int = 50295
    projector_type: str = "mlp"
    projector_hidden_act: str = "gelu"
    projector_num_blocks: int = 1
    projector_layer_norm: bool = False
    projector_downsample_factor: int = 2
    projector_num_layers: int = 2
    projector_num_latents: int = 64
    projector_depth: int = 6
    projector_num_heads: int = 16
    projector_head_dim: int = 96
    projector_qk_layer_norm: bool = True
    multimodal_projector_bias: bool = True
    vision_feature_layer: int | list[int] = -1
    vision_feature_select_strategy: str = "default"
    fusion: str = "tokens"
    cross_layer_interval: int = 4
    cross_attention_intermediate_size: int | None = None
    cross_attention_qk_norm: bool = True
    cross_attention_gate: str = "scalar"
    cross_attention_norm_eps: float = 1e-6
    image_end_token_id: int | None = None
    image_size: int | None = None
    image_grid_pinpoints: list[list[int]] | None = None
    image_seq_length: int | None = None
    num_prefix_tokens: int = None  # type: ignore[assignment]
    tie_word_embeddings: bool = False
    tokenizer_fingerprint: str | None = None

    def __post_init__(self, **kwargs):
        self.vision_config = _sub_config(self.vision_config, "vision_config", "clip_vision_model")
        self.text_config = _sub_config(self.text_config, "text_config", "phi")
        if self.num_prefix_tokens is None:
            self.num_prefix_tokens = _count_prefix_tokens(self.vision_config)
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = self.tie_word_embeddings or bool(
            getattr(self.text_config, "tie_word_embeddings", False)
        )
        self._check_choices()
        if self.image_seq_length is None:
            self.image_seq_length = self.num_image_tokens

    @classmethod
    def from_vision_text_configs(
        cls,
        vision_config: PreTrainedConfig,
        text_config: PreTrainedConfig,
        **fields: Any,
    ) -> "JnanaConfig":
        """
        The config of a model made from two backbones. Of a full `CLIPConfig` or `SiglipConfig` the vision part is
        used, with the width of its projection. The language model's `tokenizer_fingerprint` is copied if it has one.

        Args:
            vision_config (`PreTrainedConfig`): Config of the image encoder's checkpoint.
            text_config (`PreTrainedConfig`): Config of the language model's checkpoint.
            **fields: Any field of [`JnanaConfig`].

        Returns:
            `JnanaConfig`: A config that shares no object with the two given ones.
        """
        vision_part = copy.deepcopy(getattr(vision_config, "vision_config", vision_config))
        if vision_config.model_type == "clip":
            vision_part.projection_dim = (
                vision_config.projection_dim
            )  # a CLIPConfig's own field is the one that counts
        fields.setdefault("tokenizer_fingerprint", getattr(text_config, "tokenizer_fingerprint", None))
        return cls(vision_config=vision_part, text_config=copy.deepcopy(text_config), **fields)

    @property
    def image_height_and_width(self) -> tuple[int, int]:
        """`tuple[int, int]`: Pixels of the images that enter the tower."""
        size = self.image_size or self.vision_config.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """`tuple[int, int]`: Rows and columns of the patches of one view."""
        patch_size = self.vision_config.patch_size
        height, width = self.image_height_and_width
        patch_height, patch_width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        return height // patch_height, width // patch_width

    @property
    def token_grid(self) -> tuple[int, int] | None:
        """`tuple[int, int]` or `None`: Rows and columns of a view's tokens, where these are a map of the view."""
        if self.vision_feature_select_strategy != "default" or self.projector_type == "perceiver":
            return None
        rows, columns = self.patch_grid
        factor = self.projector_downsample_factor if self.projector_type in DOWNSAMPLING_PROJECTORS else 1
        return rows // factor, columns // factor

    @property
    def num_view_features(self) -> int:
        """`int`: Vectors of a view that enter the projector; for ViT-B/32 49 by `default`, 1 by `pooled`."""
        if self.vision_feature_select_strategy == "pooled":
            return 1
        rows, columns = self.patch_grid
        prefix = self.num_prefix_tokens if self.vision_feature_select_strategy == "full" else 0
        return rows * columns + prefix

    @property
    def num_image_tokens(self) -> int:
        """`int`: Tokens one view takes in the text. An image is one view, without `image_grid_pinpoints`."""
        if self.fusion == "cross_attention":
            return 1
        if self.projector_type == "perceiver":
            return self.projector_num_latents
        grid = self.token_grid
        return self.num_view_features if grid is None else grid[0] * grid[1]

    @property
    def vision_feature_size(self) -> int:
        """`int`: Width of the features that enter the projector."""
        if self.vision_feature_select_strategy == "pooled":
            is_clip = self.vision_config.model_type == "clip_vision_model"
            return self.vision_config.projection_dim if is_clip else self.vision_config.hidden_size
        num_layers = 1 if isinstance(self.vision_feature_layer, int) else len(self.vision_feature_layer)
        return self.vision_config.hidden_size * num_layers

    def _check_choices(self) -> None:
        """Raise `ValueError` on a value from which no model can be built."""
        for field, choices in (
            ("projector_type", PROJECTOR_TYPES),
            ("fusion", FUSIONS),
            ("cross_attention_gate", CROSS_ATTENTION_GATES),
            ("vision_feature_select_strategy", SELECT_STRATEGIES),
        ):
            if getattr(self, field) not in choices:
                raise ValueError(f"`{field}` is {getattr(self, field)!r}; choose one of {', '.join(choices)}.")
        if not isinstance(self.projector_num_blocks, int) or self.projector_num_blocks < 1:
            raise ValueError(
                f"`projector_num_blocks` is {self.projector_num_blocks!r}; a `resblock` projector has at least 1 "
                "block. For none choose `projector_type: linear`."
            )
        for field in (
            "projector_num_latents",
            "projector_depth",
            "projector_num_heads",
            "projector_head_dim",
            "cross_layer_interval",
        ):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{field}` is {value!r}; it must be an integer of at least 1.")
        if self.image_size not in (None, self.vision_config.image_size) and (
            self.vision_config.model_type not in RESIZING_TOWERS
        ):
            raise ValueError(
                f"`image_size` is {self.image_size}, but a {self.vision_config.model_type!r} tower takes images of "
                f"its own {self.vision_config.image_size} pixels only. Leave it out, or choose one of "
                f"{', '.join(RESIZING_TOWERS)}."
            )
        if self.image_token_id < 0:
            raise ValueError(f"`image_token_id` is {self.image_token_id}; it must be a token id of the tokenizer.")
        self._check_fusion()
        self._check_downsampling()
        self._check_grid_pinpoints()
        layers = (
            [self.vision_feature_layer] if isinstance(self.vision_feature_layer, int) else self.vision_feature_layer
        )
        states = self.vision_config.num_hidden_layers + 1
        if not layers or any(not isinstance(layer, int) or not -states <= layer < states for layer in layers):
            raise ValueError(
                f"`vision_feature_layer` is {self.vision_feature_layer!r}; the tower has {states} hidden states, so "
                f"choose from {-states} to {states - 1}, or a list of such."
            )

    def _check_fusion(self) -> None:
        """Raise `ValueError` where `fusion: cross_attention` has nothing to attend to, or several images in one."""
        if self.fusion != "cross_attention":
            return
        if self.projector_type != "perceiver":
            raise ValueError(
                f"`projector_type` is {self.projector_type!r}, but `fusion: cross_attention` attends to the latents "
                "of a resampler. Set `projector_type: perceiver`."
            )
        if self.image_grid_pinpoints is not None:
            raise ValueError(
                "`image_grid_pinpoints` cuts an image into tiles, but with `fusion: cross_attention` a token attends "
                "to one view only. Leave it out."
            )

    def _check_downsampling(self) -> None:
        """Raise `ValueError` where `pixel_shuffle` or `avg_pool` can't join the patches of a view in squares."""
        if self.projector_type not in DOWNSAMPLING_PROJECTORS:
            return
        factor = self.projector_downsample_factor
        if self.vision_feature_select_strategy != "default":
            raise ValueError(
                f"`projector_type` is {self.projector_type!r}, which joins neighbouring patches, but "
                f"`vision_feature_select_strategy` is {self.vision_feature_select_strategy!r}; choose 'default'."
            )
        if not isinstance(factor, int) or factor < 1 or any(side % factor for side in self.patch_grid):
            rows, columns = self.patch_grid
            raise ValueError(
                f"`projector_downsample_factor` is {factor!r}, but a view has {rows} x {columns} patches; choose a "
                "number that divides both."
            )
        if self.projector_num_layers not in (1, 2):
            raise ValueError(f"`projector_num_layers` is {self.projector_num_layers!r}; choose 1 or 2.")

    def _check_grid_pinpoints(self) -> None:
        """Raise `ValueError` on resolutions that can't be cut into tiles."""
        if self.image_grid_pinpoints is None:
            return
        height, width = self.image_height_and_width
        if self.vision_feature_select_strategy != "default":
            raise ValueError(
                "`image_grid_pinpoints` cuts images into tiles, whose patches are laid out as one map, but "
                f"`vision_feature_select_strategy` is {self.vision_feature_select_strategy!r}; choose 'default'."
            )
        if height != width or not self.image_grid_pinpoints:
            raise ValueError(
                f"`image_grid_pinpoints` is {self.image_grid_pinpoints!r} for a tower that takes images of {height} x "
                f"{width} pixels; give at least one resolution, and a tower with square images."
            )
        for pinpoint in self.image_grid_pinpoints:
            if len(pinpoint) != 2 or any(side < height or side % height for side in pinpoint):
                raise ValueError(
                    f"`image_grid_pinpoints` has {list(pinpoint)}; give (height, width) in multiples of the tower's "
                    f"image size, {height} pixels."
                )

    def check_image_seq_length(self) -> None:
        """
        Compare `image_seq_length` with the number of vectors that the tower gives. Called by the model and not at
        construction, because `from_pretrained` sets overridden fields one by one after it.

        Raises:
            ValueError: If they differ.
        """
        self._check_choices()
        if self.image_seq_length != self.num_image_tokens:
            raise ValueError(
                f"`image_seq_length` is {self.image_seq_length}, but this tower gives {self.num_image_tokens} vectors "
                f"a view with `vision_feature_select_strategy: {self.vision_feature_select_strategy}` and "
                f"`projector_type: {self.projector_type}`. Leave `image_seq_length` out, or set it together with them."
            )

    def save_pretrained(self, save_directory, *args, **kwargs):
        # The whole map, whichever of the classes is being saved, without the prefix "user/repo--" that loading from
        # the Hub adds: the checkpoint contains the code.
        self.auto_map = {**getattr(self, "auto_map", {}), **AUTO_MAP}
        super().save_pretrained(save_directory, *args, **kwargs)


def _sub_config(value: dict | PreTrainedConfig | None, field: str, default_type: str) -> PreTrainedConfig:
    """The config object for `field`, which a JSON file holds as a dict with its `model_type`."""
    if isinstance(value, PreTrainedConfig):
        return value
    if value is not None and not isinstance(value, dict):
        raise TypeError(
            f"`{field}` is a {type(value).__name__}; give a config object or a dict with its `model_type`."
        )
    fields = dict(value or {})
    model_type = fields.pop("model_type", default_type)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"`{field}.model_type` is {model_type!r}, which the installed transformers does not know; install a newer "
            "release of it."
        )
    return CONFIG_MAPPING[model_type](**fields)


def _count_prefix_tokens(vision_config: PreTrainedConfig) -> int:
    """CLS and register vectors before the patches."""
    model_type = vision_config.model_type
    if model_type not in TOWER_CLS_TOKENS:
        raise ValueError(
            f"`vision_config.model_type` is {model_type!r}: it is not known how many vectors (CLS, registers) stand "
            f"before its patches. Set `num_prefix_tokens`, or choose one of {', '.join(TOWER_CLS_TOKENS)}."
        )
    return TOWER_CLS_TOKENS[model_type] + getattr(vision_config, "num_register_tokens", 0)


JnanaConfig.register_for_auto_class()
# `transformers serve` and the any-to-any pipeline look up in this table of names what a model can do.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[JnanaConfig.model_type] = "JnanaForConditionalGeneration"

__all__ = ["JnanaConfig"]
