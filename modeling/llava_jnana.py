"""Published LLaVA checkpoints as starting points: LLaVA-1.5 (`llava`) and LLaVA-1.6 (`llava_next`).

transformers' own class reads the checkpoint, whatever names and shards its weights have; the modules are then moved
into a Jnana model, so that no weight is in memory twice. Logits and gradients equal those of the class that was read.
"""

import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .backbones_jnana import check_text_family, refuse_missing
from .configuration_jnana import JnanaConfig
from .loading_jnana import (
    HUB_ARGUMENTS,
    NOT_QUANTIZED,
    REPOSITORY_ARGUMENTS,
    adopt_quantization,
    held_dtype,
    without_parts,
)


logger = logging.get_logger(__name__)

LLAVA_MODEL_TYPES = ("llava", "llava_next")


def jnana_config_from_llava(config: PreTrainedConfig) -> JnanaConfig:
    """
    The config of the Jnana model that computes what a LLaVA model computes. Its dtype is that of the stored weights,
    but bfloat16 for float16.

    Args:
        config (`LlavaConfig` or `LlavaNextConfig`): The config of the published checkpoint.

    Raises:
        ValueError: If it is of another model, or its language model's family is not supported.
    """
    if config.model_type not in LLAVA_MODEL_TYPES:
        raise ValueError(
            f"model_type is {config.model_type!r}; a LLaVA checkpoint in the format of transformers has one of "
            f"{', '.join(LLAVA_MODEL_TYPES)}."
        )
    check_text_family(config.text_config)
    text_config = copy.deepcopy(config.text_config)
    text_config.tie_word_embeddings = bool(config.tie_word_embeddings)
    stored = _stored_dtype(config)
    return JnanaConfig(
        vision_config=copy.deepcopy(config.vision_config),
        text_config=text_config,
        image_token_id=config.image_token_id,
        projector_type="mlp",
        projector_hidden_act=config.projector_hidden_act,
        multimodal_projector_bias=config.multimodal_projector_bias,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_grid_pinpoints=getattr(config, "image_grid_pinpoints", None),
        dtype=held_dtype(stored),
    )


def load_llava(model_class: type[PreTrainedModel], path: str, **kwargs: Any) -> Any:
    """See [`JnanaForConditionalGeneration.from_llava_pretrained`]; `model_class` is that class."""
    path = str(path)
    with_info = kwargs.pop("output_loading_info", False)
    torch_dtype = kwargs.pop("torch_dtype", None)  # the older name
    dtype = kwargs.pop("dtype", None) or torch_dtype
    names = (*HUB_ARGUMENTS, *REPOSITORY_ARGUMENTS)
    hub_arguments = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    stock_config = AutoConfig.from_pretrained(path, **hub_arguments)
    config = jnana_config_from_llava(stock_config)  # before gigabytes are read
    stored_quantization = getattr(stock_config, "quantization_config", None)
    if stored_quantization is not None and "quantization_config" in kwargs:
        raise ValueError(
            f"{path} is stored quantised ({dict(stored_quantization)!r}), so `quantization_config` can't be chosen: "
            "leave `quantization` out, or take the checkpoint in 16 bits."
        )
    # The modules of the two classes have the same names.
    quantization = without_parts(kwargs.pop("quantization_config", None), NOT_QUANTIZED)
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    stored = _stored_dtype(stock_config)
    as_stored = dtype in (None, "auto")
    loader: Any = AutoModelForImageTextToText
    stock, info = loader.from_pretrained(
        path,
        dtype=(config.dtype or "auto") if as_stored else dtype,
        output_loading_info=True,
        use_safetensors=True,
        **kwargs,
    )
    # transformers reads the tower of a checkpoint that stores none of its unused last norm.
    refuse_missing(path, "LLaVA", {key for key in info["missing_keys"] if "post_layernorm" not in key})
    if as_stored and stock.dtype == torch.float16 and getattr(stock, "hf_quantizer", None) is None:
        stock, stored = stock.to(torch.bfloat16), torch.float16  # the config names no dtype
    if as_stored and stored == torch.float16:
        logger.warning(
            f"{path} is stored in float16 and loaded in bfloat16, because activations of language models can exceed "
            "the range of float16. `dtype='float16'` loads it as it is stored."
        )

    model = adopt_llava(model_class, stock, config)
    if getattr(stock, "hf_quantizer", None) is not None:
        # A checkpoint that is stored quantised may hold other parts than the language model in 4 bits.
        parts = dict(model.named_modules())
        whole = [name for name in NOT_QUANTIZED if name not in parts or not _has_quantized_layers(parts[name])]
        adopt_quantization(model, stock, whole)
    if hasattr(stock, "hf_device_map"):
        model.hf_device_map = stock.hf_device_map
    if kwargs.get("attn_implementation") is not None:
        model.set_attn_implementation(kwargs["attn_implementation"])
    return (model, info) if with_info else model


def adopt_llava(model_class: type[PreTrainedModel], stock: PreTrainedModel, config: JnanaConfig) -> Any:
    """
    Move the modules of a LLaVA model into a Jnana model, which then holds the same weights, and not copies.

    Args:
        model_class (`type`): [`JnanaForConditionalGeneration`].
        stock (`LlavaForConditionalGeneration` or `LlavaNextForConditionalGeneration`): Not usable afterwards.
        config ([`JnanaConfig`]): From [`jnana_config_from_llava`].

    Returns:
        [`JnanaForConditionalGeneration`]: In evaluation mode.
    """
    with torch.device("meta"):
        model: Any = model_class(config)
    source, target = stock.model, model.model
    target.vision_tower = source.vision_tower
    target.language_model = source.language_model
    target.multi_modal_projector.linear_1 = source.multi_modal_projector.linear_1
    target.multi_modal_projector.linear_2 = source.multi_modal_projector.linear_2
    if config.image_grid_pinpoints is not None:
        target.multi_modal_projector.image_newline = source.image_newline
    head = stock.get_output_embeddings()
    if model.lm_head.bias is not None and head.bias is None:  # Phi's head has a bias, stock LLaVA builds it without
        head.bias = torch.nn.Parameter(head.weight.new_zeros(head.out_features))
    model.lm_head = head
    config.vision_config, config.text_config = target.vision_tower.config, target.language_model.config
    config.dtype = stock.dtype
    for part in (config.vision_config, config.text_config):
        part.name_or_path = ""  # it is saved in config.json
    model.generation_config = copy.deepcopy(stock.generation_config)
    model.generation_config.suppress_tokens = [config.image_token_id]
    return model.eval()


def _has_quantized_layers(module: torch.nn.Module) -> bool:
    return any(not weight.is_floating_point() for weight in module.parameters())


def _stored_dtype(config: PreTrainedConfig) -> torch.dtype | None:
    """The dtype that a checkpoint was saved in, as its config says; `None` where it does not."""
    dtype = config.dtype or config.get_text_config().dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
