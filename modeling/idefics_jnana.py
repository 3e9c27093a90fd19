"""IDEFICS checkpoints (`HuggingFaceM4/idefics-9b`, `idefics-80b` and their instruct versions) as Jnana models.

transformers' own class reads the checkpoint. Its weights then move, without being copied, into a model with `fusion:
cross_attention`, whose language model is an ordinary Llama. Only the embedding and the head are written anew: IDEFICS
keeps the rows of the tokens that it added in tables of their own, and here they are the last rows of one table.
"""

import copy
import re
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    LlamaConfig,
)

from .configuration_jnana import JnanaConfig
from .loading_jnana import HUB_ARGUMENTS, NOT_QUANTIZED, REPOSITORY_ARGUMENTS, held_dtype, without_parts


IDEFICS_MODEL_TYPE = "idefics"

IMAGE_TOKEN = "<image>"
# Stands before and behind each image token in IDEFICS's prompts. Like the image token it must not be generated.
AROUND_IMAGE_TOKEN = "<fake_token_around_image>"

# Patterns in the names of IDEFICS's weights and what stands there in ours, applied one after the other.
NAMES = (
    (r"^model\.vision_model\.", "model.vision_tower."),
    (r"^model\.(embed_tokens|layers|norm)\b", r"model.language_model.\1"),
    # the resampler
    (r"^model\.perceiver_resampler\.", "model.multi_modal_projector.resampler."),
    (r"\bblocks\.(\d+)\.0\.", r"layers.\1.attention."),
    (r"\bblocks\.(\d+)\.1\.ln\.", r"layers.\1.mlp_norm."),
    (r"\bblocks\.(\d+)\.1\.fc\.", r"layers.\1.fc1."),
    (r"\bblocks\.(\d+)\.1\.c_proj\.", r"layers.\1.fc2."),
    (r"\b(context|latents|q|k)_layer_norm\.", r"\1_norm."),
    (r"\bresampler\.layer_norm\.", "resampler.norm."),
    (r"\boutput_proj\.", "o_proj."),
    # the gated blocks
    (r"^model\.gated_cross_attn_layers\.(\d+)\.(cross_attn\.|mlp\.)?", r"model.cross_attention.layers.\1."),
    (r"(cross_attention\.layers\.\d+)\.input_layernorm\.", r"\1.attention_norm."),
    (r"(cross_attention\.layers\.\d+)\.post_attention_layernorm\.", r"\1.mlp_norm."),
    (r"\balpha_cross_attn$", "attention_gate"),
    (r"\balpha_dense$", "mlp_gate"),
)


def jnana_config_from_idefics(config: IdeficsConfig, image_token_id: int) -> JnanaConfig:
    """
    The config of the Jnana model that computes what an IDEFICS model computes.

    Args:
        config (`IdeficsConfig`): Of the IDEFICS checkpoint.
        image_token_id (`int`): The id of `<image>`, which the checkpoint's config does not name.

    Returns:
        `JnanaConfig`: With `image_end_token_id` set, because IDEFICS's processor hides an image behind `</s>`.

    Raises:
        ValueError: If the model has no resampler, or dropout, or its blocks don't cover its layers evenly.
    """
    _check_convertible(config, image_token_id)
    vision, perceiver = config.vision_config, config.perceiver_config
    vision_config = CLIPVisionConfig(
        hidden_size=vision.embed_dim,
        projection_dim=vision.embed_dim,  # of CLIP's image embedding, which is not used
        **{
            name: getattr(vision, name)
            for name in (
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_channels",
                "image_size",
                "patch_size",
                "hidden_act",
                "layer_norm_eps",
                "attention_dropout",
                "initializer_range",
                "initializer_factor",
            )
        },
    )
    text_config = LlamaConfig(
        vocab_size=config.vocab_size + config.additional_vocab_size,
        num_key_value_heads=config.num_attention_heads,
        rope_parameters=copy.deepcopy(config.rope_parameters),
        **{
            name: getattr(config, name)
            for name in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "hidden_act",
                "max_position_embeddings",
                "initializer_range",
                "rms_norm_eps",
                "pad_token_id",
                "bos_token_id",
                "eos_token_id",
                "tie_word_embeddings",
            )
        },
    )
    return JnanaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_type="perceiver",
        projector_hidden_act="relu",
        projector_num_latents=perceiver.resampler_n_latents,
        projector_depth=perceiver.resampler_depth,
        projector_num_heads=perceiver.resampler_n_heads,
        projector_head_dim=perceiver.resampler_head_dim,
        projector_qk_layer_norm=perceiver.qk_layer_norms_perceiver,
        fusion="cross_attention",
        cross_layer_interval=config.cross_layer_interval,
        cross_attention_qk_norm=config.qk_layer_norms,
        cross_attention_gate="vector" if config.alpha_type == "vector" else "scalar",
        cross_attention_norm_eps=config.rms_norm_eps,
        image_end_token_id=config.eos_token_id,
    )


def convert_state_dict(state_dict: dict[str, torch.Tensor], tower_prefix: str = "") -> dict[str, torch.Tensor]:
    """
    IDEFICS's weights under Jnana's names. Embedding and head are joined; all other tensors are the same objects.

    Args:
        state_dict (`dict[str, torch.Tensor]`): Of an `IdeficsForVisionText2Text`; emptied.
        tower_prefix (`str`, *optional*, defaults to `""`): What stands before the names of the tower's weights.

    Returns:
        `dict[str, torch.Tensor]`: Of the [`JnanaForConditionalGeneration`].
    """
    for table, added in (
        ("model.embed_tokens.weight", "model.embed_tokens.additional_embedding.weight"),
        ("lm_head.weight", "lm_head.additional_fc.weight"),
    ):
        if added in state_dict:
            state_dict[table] = torch.cat([state_dict[table], state_dict.pop(added)])
    converted = {}
    for name in list(state_dict):
        weight, new_name = state_dict.pop(name), name
        for pattern, ours in NAMES:
            new_name = re.sub(pattern, ours, new_name)
        new_name = new_name.replace("model.vision_tower.", f"model.vision_tower.{tower_prefix}")
        converted[new_name] = weight.flatten() if new_name.endswith("_gate") else weight
    return converted


def load_idefics(
    model_class: Any,
    path: str,
    *,
    image_token_id: int | None = None,
    dtype: str | torch.dtype | None = None,
    **kwargs: Any,
) -> Any:
    """See [`JnanaForConditionalGeneration.from_idefics_pretrained`]; `model_class` is that class."""
    path = str(path)
    with_info = kwargs.pop("output_loading_info", False)
    quantization = without_parts(kwargs.get("quantization_config"), NOT_QUANTIZED)
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    files = {name: kwargs.pop(name) for name in (*HUB_ARGUMENTS, *REPOSITORY_ARGUMENTS) if name in kwargs}
    config = IdeficsConfig.from_pretrained(path, **files)
    suppressed = [image_token_id]
    if image_token_id is None:
        suppressed = find_image_tokens(path, **files)
    jnana_config = jnana_config_from_idefics(config, suppressed[0])  # type: ignore[arg-type]  # no longer None
    if dtype in (None, "auto"):
        dtype = held_dtype(config.dtype) or "auto"
    loaded: Any = IdeficsForVisionText2Text.from_pretrained(
        path, config=config, dtype=dtype, output_loading_info=True, use_safetensors=True, **files
    )
    stock, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{path!r} lacks {len(missing)} weights of IDEFICS ({', '.join(missing[:3])}, ...); download it again."
        )
    generation_config, dtype = copy.deepcopy(stock.generation_config), stock.dtype
    weights = convert_state_dict(stock.state_dict(), _tower_prefix(jnana_config))
    del loaded, stock
    model = model_class.from_pretrained(None, config=jnana_config, state_dict=weights, dtype=dtype, **kwargs)
    model.generation_config = generation_config
    model.generation_config.suppress_tokens = suppressed
    return (model.eval(), info) if with_info else model.eval()


def find_image_tokens(path: str, **kwargs: Any) -> list[int]:
    """
    The ids of `<image>` and `<fake_token_around_image>`, from the tokenizer of an IDEFICS checkpoint.

    Args:
        path (`str`): Hub id or directory.
        **kwargs: For `AutoTokenizer.from_pretrained`.

    Raises:
        ValueError: If the tokenizer has no such tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(path, **kwargs)
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in (IMAGE_TOKEN, AROUND_IMAGE_TOKEN) if token not in vocabulary]
    if missing:
        raise ValueError(f"The tokenizer in {path!r} has no {' and no '.join(missing)}; give `image_token_id`.")
    return [vocabulary[IMAGE_TOKEN], vocabulary[AROUND_IMAGE_TOKEN]]


def _check_convertible(config: IdeficsConfig, image_token_id: int) -> None:
    if not config.use_resampler:
        raise ValueError(
            "`use_resampler` is False, but Jnana's cross-attention attends to the latents of a resampler. Take a "
            "checkpoint with one, as all published IDEFICS models have."
        )
    if config.dropout:
        raise ValueError(
            f"`dropout` is {config.dropout}, which Jnana's layers don't have. Set it to 0 in config.json."
        )
    if config.num_hidden_layers % config.cross_layer_interval:
        raise ValueError(
            f"`cross_layer_interval` is {config.cross_layer_interval}, which does not divide the number of layers, "
            f"{config.num_hidden_layers}; IDEFICS itself can't run such a model."
        )
    rows = config.vocab_size + config.additional_vocab_size
    if not 0 <= image_token_id < rows:
        raise ValueError(f"`image_token_id` is {image_token_id}, but the embedding has {rows} rows; give its own id.")


def _tower_prefix(config: JnanaConfig) -> str:
    """Releases of transformers differ in whether the weights of CLIP's tower are below `vision_model`."""
    with torch.device("meta"):
        tower = CLIPVisionModel(config.vision_config)
    return "vision_model." if next(iter(tower.state_dict())).startswith("vision_model.") else ""


__all__ = ["convert_state_dict", "find_image_tokens", "jnana_config_from_idefics", "load_idefics"]
