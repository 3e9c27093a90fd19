"""The two backbones, image encoder and language model: which are supported, how they are built, loaded and joined.

Without an image, the logits must equal those of the bare language model bit for bit. So a language model family is
supported only if its head is known to be one Linear layer over the last hidden states. The table below says whether
that layer has a bias (Phi's has one; stock LLaVA drops it). Building a model of any other family raises an error.
"""

import copy
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
)

from .configuration_jnana import JnanaConfig
from .loading_jnana import (
    NOT_QUANTIZED,
    NOT_QUANTIZED_TEXT,
    adopt_quantization,
    explain_missing_safetensors,
    without_parts,
)
from .projector_jnana import build_projector


try:
    # Releases that have this function (not 5.20) also let a model return selected hidden states by their indices.
    from transformers.utils.output_capturing import select_hidden_states  # noqa: F401

    SELECTS_HIDDEN_STATES = True
except ImportError:
    SELECTS_HIDDEN_STATES = False

# Whether the family's head, one Linear layer, has a bias.
HEAD_HAS_BIAS = {
    "gpt_neox": False,
    "llama": False,
    "mistral": False,
    "phi": True,
    "phi3": False,
    "qwen2": False,
    "qwen3": False,
}

# Config fields by which other families change logits after the Linear layer, with the value that changes nothing.
LOGIT_CHANGES = {
    "final_logit_softcapping": None,
    "lm_head_multiplier": 1.0,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
}


def check_text_family(text_config: PreTrainedConfig) -> None:
    """
    Raise unless the head of the language model can be reproduced exactly.

    Args:
        text_config (`PreTrainedConfig`): The language model's config.

    Raises:
        ValueError: With the family's name and the reason.
    """
    family = text_config.model_type
    changes = [
        f"{field}={getattr(text_config, field)}"
        for field, neutral in LOGIT_CHANGES.items()
        if getattr(text_config, field, neutral) not in (neutral, None)
    ]
    if changes:
        reason = f"its head does more than one Linear layer ({', '.join(changes)})"
    elif family not in HEAD_HAS_BIAS:
        reason = "its head has not been shown to be one Linear layer over the last hidden states"
    else:
        return
    raise ValueError(
        f"`text_config.model_type` is {family!r}, which Jnana does not support: {reason}, so its text-only logits "
        f"would differ from the bare model's. Choose a language model of one of these families: "
        f"{', '.join(HEAD_HAS_BIAS)}."
    )


def build_head(text_config: PreTrainedConfig) -> nn.Linear:
    """
    The family's head, with random weights.

    Args:
        text_config (`PreTrainedConfig`): The language model's config.

    Returns:
        `torch.nn.Linear`: Maps `(..., hidden_size)` to `(..., vocab_size)`.

    Raises:
        ValueError: If the family is not supported.
    """
    check_text_family(text_config)
    bias = HEAD_HAS_BIAS[text_config.model_type]
    return nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=bias)


def build_vision_tower(config: JnanaConfig) -> PreTrainedModel:
    """The image encoder with random weights: for `pooled` CLIP the one that ends in CLIP's projection."""
    if _needs_clip_projection(config):
        tower = CLIPVisionModelWithProjection(config.vision_config)
        dtype = config.vision_config.dtype
        return tower if dtype is None else tower.to(dtype)
    return AutoModel.from_config(config.vision_config)


def load_vision_tower(name: str, config: JnanaConfig, **kwargs: Any) -> PreTrainedModel:
    """
    The image encoder of a checkpoint: of the encoder alone, or of a full CLIP or SigLIP with its text half left out.

    Args:
        name (`str`): Hub id or folder.
        config ([`JnanaConfig`]): Its fields decide which part is loaded; see [`build_vision_tower`].
        **kwargs: For `from_pretrained` (`dtype`, `revision`, `cache_dir`, ...).

    Returns:
        `PreTrainedModel`: The tower, with the checkpoint's weights wherever its features depend on them.

    Raises:
        ValueError: If the checkpoint lacks some of the weights on which the selected features depend.
    """
    loader: Any = CLIPVisionModelWithProjection if _needs_clip_projection(config) else AutoModel
    vision_config = copy.deepcopy(config.vision_config)
    kwargs = {"use_safetensors": True, **kwargs}
    with explain_missing_safetensors(name):
        tower, info = loader.from_pretrained(name, config=vision_config, output_loading_info=True, **kwargs)
    _refuse_remote(name, tower)
    if info["missing_keys"]:  # some ViT checkpoints lack the pooler that AutoModel adds, which is not used here
        refuse_missing(name, "vision", set(info["missing_keys"]) - set(find_unused_parameters(tower, config)))
    return tower


def load_language_model(name: str, **kwargs: Any) -> PreTrainedModel:
    """
    A causal language model with its head, as `AutoModelForCausalLM` loads it.

    Args:
        name (`str`): Hub id or folder.
        **kwargs: For `from_pretrained` (`config`, `dtype`, `revision`, `cache_dir`, ...).

    Returns:
        `PreTrainedModel`: The language model, all its weights from the checkpoint.

    Raises:
        ValueError: If the checkpoint lacks some of the model's weights.
    """
    loader: Any = AutoModelForCausalLM
    kwargs = {"use_safetensors": True, **kwargs}
    with explain_missing_safetensors(name):
        model, info = loader.from_pretrained(name, output_loading_info=True, **kwargs)
    _refuse_remote(name, model)
    refuse_missing(name, "text", info["missing_keys"])
    return model


def join_pretrained(
    model_class: type[PreTrainedModel],
    vision: str,
    text: str,
    dtype: str | torch.dtype,
    attn_implementation: str | dict[str, str] | None,
    vision_kwargs: dict[str, Any],
    text_kwargs: dict[str, Any],
    kwargs: dict[str, Any],
) -> Any:
    """See [`JnanaForConditionalGeneration.from_vision_text_pretrained`]; `model_class` is that class."""
    vision, text = str(vision), str(text)  # error messages quote them
    # The language model is loaded alone, so module names are those of a bare one.
    quantization = without_parts(kwargs.pop("quantization_config", None), NOT_QUANTIZED_TEXT)
    quantized = {} if quantization is None else {"quantization_config": quantization}
    placed = {"device_map": kwargs.pop("device_map")} if "device_map" in kwargs else {}
    names = {field.name for field in fields(JnanaConfig)}
    config_fields = {key: value for key, value in kwargs.items() if key in names}
    shared = {key: value for key, value in kwargs.items() if key not in names}
    vision_kwargs, text_kwargs = {**shared, **vision_kwargs}, {**shared, **text_kwargs}
    config = JnanaConfig.from_vision_text_configs(
        AutoConfig.from_pretrained(vision, **vision_kwargs),
        AutoConfig.from_pretrained(text, **text_kwargs),
        **config_fields,
    )
    check_text_family(config.text_config)  # before gigabytes are read
    language_model = load_language_model(text, dtype=dtype, **quantized, **placed, **text_kwargs)
    tower = load_vision_tower(vision, config, dtype=language_model.dtype, **placed, **vision_kwargs)
    config.vision_config, config.text_config = tower.config, language_model.config

    with torch.device("meta"):
        model = model_class(config)
    projector = build_projector(config)
    projector.apply(model._init_weights)
    model.model.vision_tower = tower
    model.model.multi_modal_projector = projector.to(language_model.device, language_model.dtype)
    model.model.language_model = language_model.base_model
    if config.fusion == "cross_attention":
        model.model.build_cross_attention()
        model.model.cross_attention.apply(model._init_weights)
        model.model.cross_attention.to(language_model.device, language_model.dtype)
    model.lm_head = language_model.get_output_embeddings()
    model.generation_config = copy.deepcopy(language_model.generation_config)
    model.generation_config.suppress_tokens = [config.image_token_id]
    if quantization is not None:
        adopt_quantization(model, language_model, list(NOT_QUANTIZED))
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    return model.eval()


def select_image_features(
    tower: PreTrainedModel,
    pixel_values: torch.Tensor,
    layers: int | list[int],
    strategy: str,
    num_prefix_tokens: int,
    **kwargs: Any,
) -> tuple[Any, torch.Tensor]:
    """
    Run the tower and select the features for the projector.

    Args:
        tower (`PreTrainedModel`): The image encoder.
        pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`): The images.
        layers (`int` or `list[int]`): Hidden states to select; several are concatenated along their width.
        strategy (`str`): `"default"`, `"full"` or `"pooled"`.
        num_prefix_tokens (`int`): How many leading vectors `"default"` drops.

    Returns:
        `tuple`: The tower's own output, and features of shape `(num_views, num_view_features, vision_feature_size)`.
    """
    if strategy == "pooled":
        outputs = tower(pixel_values, return_dict=True, **kwargs)
        # SigLIP's and DINOv2's own image embedding is `pooler_output`; CLIP's is its projection.
        pooled = outputs["image_embeds"] if "image_embeds" in outputs else outputs["pooler_output"]
        return outputs, pooled.unsqueeze(1)  # => [num_images, 1, width]
    layers = [layers] if isinstance(layers, int) else list(layers)
    # Where possible only the selected ones: those of all layers of a ViT-L/14-336 are 30 MB an image in bfloat16.
    kwargs["output_hidden_states"] = kwargs.get("output_hidden_states") or (layers if SELECTS_HIDDEN_STATES else True)
    outputs = tower(pixel_values, return_dict=True, **kwargs)
    start = num_prefix_tokens if strategy == "default" else 0
    features = [outputs.hidden_states[layer][:, start:] for layer in layers]
    if len(features) == 1:
        return outputs, features[0]
    # `device_map` may have put the layers of the tower on several devices
    return outputs, torch.cat([feature.to(features[-1].device) for feature in features], dim=-1)


def image_shape(config: JnanaConfig) -> tuple[int, int, int, int]:
    """`pixel_values`' shape for one image."""
    return (1, config.vision_config.num_channels, *config.image_height_and_width)


def find_unused_parameters(tower: PreTrainedModel, config: JnanaConfig) -> list[str]:
    """
    Parameters of the tower on which the selected features do not depend: CLIP's `post_layernorm`, layers behind the
    selected one. Found by differentiating the features on the meta device, which computes shapes and no values.

    Args:
        tower (`PreTrainedModel`): The image encoder.
        config ([`JnanaConfig`]): Its fields decide which features are selected.

    Returns:
        `list[str]`: Names as in `tower.named_parameters()`.
    """
    tensors = {
        f"tower.{name}": torch.empty_like(tensor, device="meta").requires_grad_(tensor.is_floating_point())
        for name, tensor in [*tower.named_parameters(), *tower.named_buffers()]
    }
    pixel_values = torch.empty(image_shape(config), device="meta", dtype=tower.dtype)
    names = [name for name, _ in tower.named_parameters() if tensors[f"tower.{name}"].requires_grad]
    with torch.enable_grad():
        features = torch.func.functional_call(_FeatureSelection(tower, config), tensors, (pixel_values,))
        gradients = torch.autograd.grad(
            features.sum(), [tensors[f"tower.{name}"] for name in names], allow_unused=True
        )
    return [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]


class _FeatureSelection(nn.Module):
    """[`select_image_features`] as a module, for `torch.func.functional_call`."""

    def __init__(self, tower: PreTrainedModel, config: JnanaConfig):
        super().__init__()
        self.tower, self.config = tower, config

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        layers, strategy = self.config.vision_feature_layer, self.config.vision_feature_select_strategy
        return select_image_features(self.tower, pixel_values, layers, strategy, self.config.num_prefix_tokens)[1]


def _needs_clip_projection(config: JnanaConfig) -> bool:
    pooled = config.vision_feature_select_strategy == "pooled"
    return pooled and config.vision_config.model_type == "clip_vision_model"


def refuse_missing(name: str, part: str, missing_keys: set[str]) -> None:
    """Raise if weights are missing: a frozen backbone with random weights would train without any error, and fail."""
    if missing_keys:
        shown = ", ".join(sorted(missing_keys)[:3])
        raise ValueError(
            f"The {part} checkpoint {name!r} lacks {len(missing_keys)} weights of the model to load from it "
            f"({shown}, ...). For `vision_feature_select_strategy: pooled` it must hold CLIP's projection: a full "
            "CLIP or a `CLIPVisionModelWithProjection`."
        )


def _refuse_remote(name: str, model: PreTrainedModel) -> None:
    """Raise if the checkpoint's own code was used: it may compute something else than transformers' model does."""
    if not type(model).__module__.startswith("transformers."):
        raise ValueError(
            f"{name!r} was loaded by its own code ({type(model).__module__}), but a saved Jnana checkpoint builds it "
            "from transformers. Leave out `trust_remote_code`, if transformers knows the family."
        )
