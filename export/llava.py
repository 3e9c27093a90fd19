"""Stock LLaVA folders: the modules of a Jnana model in the class of transformers that computes the same.

| Jnana | transformers |
|---|---|
| projector `mlp` or `linear` | `LlavaForConditionalGeneration` |
| projector `mlp` with `projector_layer_norm` | `VipLlavaForConditionalGeneration` |
| one of the first two, with tiles | `LlavaNextForConditionalGeneration` |

What fits none of them is refused with the reason and the nearest way.
"""

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedModel,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from jnana.modeling import JnanaConfig
from jnana.processing import JnanaProcessor

from .refusals import NEAREST_AS_IT_IS, check_projector, refuse


STOCK: dict[str, tuple[type, type[PreTrainedModel], type]] = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor),
    "vipllava": (VipLlavaConfig, VipLlavaForConditionalGeneration, LlavaProcessor),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor),
}


# Up to transformers 5.20 VipLlava's config alone has a plural here.
VIP_LAYER_FIELD = next(field.name for field in fields(VipLlavaConfig) if field.name.startswith("vision_feature_layer"))


def check_fits_llava(config: JnanaConfig, double_linear: bool = False, distill: bool = False) -> str:
    """
    The `model_type` of the stock class that computes what a model computes.

    Args:
        config ([`JnanaConfig`]): The model's.
        double_linear (`bool`): Whether a `linear` projector shall be written with the activation `gelu`.
        distill (`bool`): Whether a `resblock` projector will be replaced by an `mlp`.

    Returns:
        `str`: `llava`, `vipllava` or `llava_next`.

    Raises:
        ValueError: If there is no such class: with the reason, and the nearest way to go.
    """
    check_projector(config, "LLaVA", distill)
    tiles, strategy = config.image_grid_pinpoints is not None, config.vision_feature_select_strategy
    prefix = config.num_prefix_tokens
    if strategy == "default" and prefix > 1:
        refuse(
            f"the tower {config.vision_config.model_type!r} has {prefix} vectors before its patches (CLS and "
            "registers), of which LLaVA drops the first only",
            f"train with vision_feature_select_strategy: full, or {NEAREST_AS_IT_IS}",
        )
    if tiles and prefix != 1:
        refuse(
            f"LLaVA-1.6 takes tiles from towers with a CLS vector only, and {config.vision_config.model_type!r} "
            f"has {prefix} vectors before its patches",
            f"train with a CLIP tower, or {NEAREST_AS_IT_IS}",
        )
    if double_linear and config.projector_type != "linear":
        refuse(f"double_linear is for projectors of type linear, and this one is {config.projector_type!r}", "drop it")
    if double_linear and 2 * config.vision_feature_size > config.text_config.hidden_size:
        refuse(
            f"a doubled linear projector needs 2 x {config.vision_feature_size} units (twice the width of the vision "
            f"features), and LLaVA's projector has {config.text_config.hidden_size} (the language model's width)",
            "leave double_linear out: transformers knows the activation 'linear'",
        )
    if config.projector_type == "mlp" and config.projector_layer_norm:
        if tiles or strategy != "default" or prefix != 1:
            refuse(
                "an mlp with projector_layer_norm is VipLlava's projector, and VipLlava takes one view an image from "
                f"a tower with a CLS vector, which it drops (here: tiles {tiles}, vision_feature_select_strategy "
                f"{strategy!r}, {prefix} vectors before the patches)",
                f"train without projector_layer_norm, or {NEAREST_AS_IT_IS}",
            )
        return "vipllava"
    return "llava_next" if tiles else "llava"


def build_stock(model: Any, processor: JnanaProcessor, double_linear: bool = False) -> PreTrainedModel:
    """
    Move the modules of a model into the stock class; no weight is in memory twice but those of the projector.

    Args:
        model ([`JnanaForConditionalGeneration`]): Not usable afterwards.
        processor ([`JnanaProcessor`]): Its ids must have rows in the embedding; missing rows are added as zeros, and
            their tokens are never generated.
        double_linear (`bool`): See [`check_fits_llava`].

    Returns:
        `PreTrainedModel`: In evaluation mode.

    Raises:
        ValueError: If the head has a bias that is not zero.
    """
    kind = check_fits_llava(model.config, double_linear)
    check_head(model)
    config_class, model_class, _ = STOCK[kind]
    with torch.device("meta"):
        stock: Any = model_class(config_class(**stock_fields(model.config, kind, double_linear)))
    source, target = model.model, stock.model
    target.vision_tower, target.language_model = source.vision_tower, source.language_model
    fill_projector(target.multi_modal_projector, source.multi_modal_projector, model.config, double_linear)
    if kind == "llava_next":
        target.image_newline = source.multi_modal_projector.image_newline
    stock.lm_head.weight = model.lm_head.weight
    stock.config.vision_config, stock.config.text_config = target.vision_tower.config, target.language_model.config
    for part in (stock.config.vision_config, stock.config.text_config):
        part.name_or_path = ""  # it is saved in config.json
    stock.config.text_config.tie_word_embeddings = model.config.tie_word_embeddings
    stock.config.dtype = model.dtype
    stock.generation_config = copy.deepcopy(model.generation_config)
    rows = stock.get_input_embeddings().weight.shape[0]
    needed = max(processor.image_token_id, processor.tokenizer.pad_token_id or 0) + 1
    if needed > rows:
        stock.resize_token_embeddings(needed, mean_resizing=False)
        with torch.no_grad():
            for module in (stock.get_input_embeddings(), stock.get_output_embeddings()):
                module.weight[rows:] = 0
        stock.generation_config.suppress_tokens = sorted(
            {*(stock.generation_config.suppress_tokens or []), *range(rows, needed)}
        )
    return stock.eval()


def check_head(model: Any) -> None:
    """Refuse a head with a bias, which stock LLaVA builds without one."""
    bias = model.lm_head.bias
    if bias is not None and bool(bias.any()):
        family = model.config.text_config.model_type
        refuse(
            f"the head of the language model ({family!r}) has a bias, and stock LLaVA's has none: logits would differ "
            f"by up to {bias.abs().max().item():.2g}",
            f"export it with --to gguf, which keeps the bias, or {NEAREST_AS_IT_IS}",
        )


def stock_fields(config: JnanaConfig, kind: str, double_linear: bool) -> dict[str, Any]:
    """The fields of the stock config."""
    linear = config.projector_type == "linear"
    values: dict[str, Any] = {
        "vision_config": copy.deepcopy(config.vision_config),
        "text_config": copy.deepcopy(config.text_config),
        "image_token_index": config.image_token_id,
        "image_seq_length": config.image_seq_length,
        VIP_LAYER_FIELD if kind == "vipllava" else "vision_feature_layer": config.vision_feature_layer,
        "projector_hidden_act": ("gelu" if double_linear else "linear") if linear else config.projector_hidden_act,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if kind != "vipllava":
        values |= {
            "vision_feature_select_strategy": stock_strategy(config),
            "multimodal_projector_bias": config.multimodal_projector_bias,
        }
    if kind == "llava_next":
        values["image_grid_pinpoints"] = [list(pinpoint) for pinpoint in config.image_grid_pinpoints or ()]
    return values


def stock_strategy(config: JnanaConfig) -> str:
    """LLaVA's `default` drops the first vector, so a tower without CLS (SigLIP) needs `full`."""
    return "full" if config.num_prefix_tokens == 0 else config.vision_feature_select_strategy


@torch.no_grad()
def fill_projector(target: Any, source: Any, config: JnanaConfig, double_linear: bool) -> None:
    """
    Give a stock projector the weights of ours.

    A linear layer `W x + b` becomes the first layer, behind it the activation `linear` and a second layer that is the
    identity: exact, bit for bit. Doubled, it becomes `[W, -W] gelu([x, -x]) + b`, as gelu(x) - gelu(-x) = x.
    """
    if config.projector_type == "linear":
        first, second = linear_as_two(source.linear, double_linear)
    else:
        first, second = source.linear_1, source.linear_2
    for name, layer in (("linear_1", first), ("linear_2", second)):
        bias = layer.bias
        if bias is None and getattr(target, name).bias is not None:  # VipLlava's always has one
            bias = nn.Parameter(layer.weight.new_zeros(layer.out_features))
        getattr(target, name).weight, getattr(target, name).bias = layer.weight, bias
    if hasattr(target, "projector_layernorm"):
        norm = source.layer_norm
        target.projector_layernorm.weight, target.projector_layernorm.bias = norm.weight, norm.bias


def linear_as_two(linear: nn.Linear, double: bool) -> tuple[nn.Linear, nn.Linear]:
    """One linear layer as the two of LLaVA's projector; see [`fill_projector`]."""
    weight, bias = linear.weight, linear.bias
    width, width_in = weight.shape
    layers = [nn.Linear(width_in, width, bias=bias is not None), nn.Linear(width, width, bias=bias is not None)]
    first, second = (layer.to(weight.device, weight.dtype) for layer in layers)
    for tensor in (*first.parameters(), *second.parameters()):
        tensor.zero_()
    if double:
        identity = torch.eye(width_in, dtype=weight.dtype, device=weight.device)
        first.weight[: 2 * width_in] = torch.cat([identity, -identity])
        second.weight[:, : 2 * width_in] = torch.cat([weight, -weight], dim=1)
    else:
        first.weight.copy_(weight)
        second.weight.copy_(torch.eye(width, dtype=weight.dtype, device=weight.device))
    if bias is not None:
        (second if double else first).bias.copy_(bias)
    return first, second


def stock_processor(config: JnanaConfig, processor: JnanaProcessor) -> Any:
    """
    The stock processor: the same image processor, tokenizer and chat template.

    Args:
        config ([`JnanaConfig`]): The model's.
        processor ([`JnanaProcessor`]): The model's.
    """
    return processor_of(STOCK[check_fits_llava(config)][2], config, processor)


def processor_of(processor_class: Any, config: JnanaConfig, processor: JnanaProcessor) -> Any:
    """The stock processor of a given class; see [`stock_processor`]."""
    image_processor, tokenizer = processor.image_processor, copy.deepcopy(processor.tokenizer)
    if getattr(image_processor, "crop_size", None) is None:  # SigLIP's; LLaVA's processor counts tokens by it
        image_processor = copy.deepcopy(image_processor)
        image_processor.crop_size = dict(image_processor.size)
    tokenizer.chat_template = processor.chat_template  # some programs read the tokenizer's
    return processor_class(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        num_additional_image_tokens=config.num_prefix_tokens,
        vision_feature_select_strategy=stock_strategy(config),
        chat_template=processor.chat_template,
        image_token=processor.image_token,
    )


def load_stock(folder: Path, device: torch.device) -> tuple[PreTrainedModel, Any]:
    """The exported model and its processor, loaded by nothing but transformers."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", use_safetensors=True)
    return model.to(device).eval(), transformers.AutoProcessor.from_pretrained(folder)
