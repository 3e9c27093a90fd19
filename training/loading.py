"""Loads a model with its processor, from a directory of any kind or a Hub id."""

import logging
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    PreTrainedConfig,
)

from jnana.modeling import (
    DOWNSAMPLING_PROJECTORS,
    HUB_ARGUMENTS,
    IDEFICS_MODEL_TYPE,
    LLAVA_MODEL_TYPES,
    REPOSITORY_ARGUMENTS,
    RESIZING_TOWERS,
    JnanaConfig,
    JnanaForConditionalGeneration,
    find_image_tokens,
    jnana_config_from_idefics,
    jnana_config_from_llava,
    load_adapter_base,
    model_type_of,
    quantization_config,
)
from jnana.processing import JnanaProcessor, read_chat_template
from jnana.processing.chat_formats_jnana import check_answer_end, find_answer_end
from jnana.processing.data import check_tokenizer, tokenizer_fingerprint

from .adapters import adapter_reference, is_adapter


logger = logging.getLogger(__name__)

# Published checkpoints that are starting points as they are
PUBLISHED_MODEL_TYPES = (*LLAVA_MODEL_TYPES, IDEFICS_MODEL_TYPE)


def load_model(
    path: str,
    *,
    dtype: str | torch.dtype | None = None,
    quantization: str | dict[str, Any] | None = None,
    trainable_adapter: bool = False,
    chat_template: str | None = None,
    **loading_kwargs,
) -> tuple[nn.Module, JnanaProcessor]:
    """Load a Jnana checkpoint (a full one, a Trainer's `checkpoint-N`, or the adapter directory of run_sft), or a
    published LLaVA or IDEFICS checkpoint.

    The model computes what `AutoModelForImageTextToText.from_pretrained(path)` computes: weights, dtypes and
    generation config are read by the same code. This function adds the processor, the checks that the two belong
    together and, around an adapter, PEFT's `PeftModel`, which can be trained on, switched off and merged.

    Args:
        path (`str`): Folder or Hub id.
        dtype (`str` or `torch.dtype`, *optional*): Dtype of the weights; default: the one in the checkpoint, for a
            LLaVA checkpoint in float16 bfloat16.
        quantization (`str` or `dict`, *optional*): `none`, `nf4` or `int8`, or settings as for
            `jnana.modeling.quantization_config`. By default an adapter's base is held as it was in training, and a
            full checkpoint as it was saved.
        trainable_adapter (`bool`, defaults to `False`): Leave an adapter's weights trainable, to go on training.
        chat_template (`str`, *optional*): Name of a shipped template, or the path of a `.jinja` file, to use instead
            of the checkpoint's.
        loading_kwargs: For `from_pretrained` (`device_map`, `attn_implementation`, `revision`, `subfolder`, `token`,
            `trust_remote_code`, ...).

    Returns:
        `tuple[nn.Module, JnanaProcessor]`: a `JnanaForConditionalGeneration`, or the `PeftModel` around one.

    Raises:
        ValueError: if the folder is none of these kinds, the base of an adapter cannot be found, or the tokenizer is
            not the one that the language model was trained with.
        ImportError: if bitsandbytes is needed and not installed.
    """
    names = (*HUB_ARGUMENTS, *REPOSITORY_ARGUMENTS)
    from_hub = {name: loading_kwargs[name] for name in names if loading_kwargs.get(name) is not None}
    processor = load_processor(path, loading_kwargs.pop("trust_remote_code", False), chat_template, **from_hub)
    config = load_config(path, **from_hub)
    check_fit(config, processor, path)
    if dtype is not None:
        loading_kwargs["dtype"] = dtype
    if quantization is not None:
        settings = {"quantization": quantization} if isinstance(quantization, str) else quantization
        loading_kwargs["quantization_config"] = quantization_config(settings, dtype or config.dtype)
    if not is_adapter(path, **from_hub):
        model = JnanaForConditionalGeneration.from_pretrained(path, **loading_kwargs)
        if model.config.tokenizer_fingerprint is None and model_type_of(path, **from_hub) in PUBLISHED_MODEL_TYPES:
            model.config.tokenizer_fingerprint = tokenizer_fingerprint(processor.tokenizer)
            set_special_tokens(model, processor)
            # Its chat template closes every answer by the end-of-text token, and later questions need the image too.
            model.config.image_end_token_id = None
        return model, processor
    reference = adapter_reference(path, **from_hub)
    base, from_hub = load_adapter_base(JnanaForConditionalGeneration, path, reference, loading_kwargs)
    return PeftModel.from_pretrained(base, path, is_trainable=trainable_adapter, **from_hub), processor


def load_config(path: str, **hub_arguments: Any) -> JnanaConfig:
    """The config of a Jnana checkpoint or adapter, or the one that a published checkpoint gets.

    Args:
        path (`str`): Folder or Hub id.
        **hub_arguments: `revision`, `subfolder`, `token`, `cache_dir`, ... as for `from_pretrained`.

    Raises:
        ValueError: if `path` holds a model of another type.
    """
    model_type = model_type_of(path, **hub_arguments)
    if model_type in LLAVA_MODEL_TYPES:
        return jnana_config_from_llava(AutoConfig.from_pretrained(path, **hub_arguments))
    if model_type == IDEFICS_MODEL_TYPE:
        image_token_id = find_image_tokens(path, **hub_arguments)[0]
        return jnana_config_from_idefics(AutoConfig.from_pretrained(path, **hub_arguments), image_token_id)
    if model_type != JnanaConfig.model_type:
        raise ValueError(
            f"{path!r} is not a Jnana checkpoint: its config.json says model_type {model_type!r}. Give a directory "
            "written by run_align or run_sft, a published checkpoint in the format of transformers (model_type "
            f"{' or '.join(PUBLISHED_MODEL_TYPES)}), or name two backbones as vision_model and text_model"
        )
    return JnanaConfig.from_pretrained(path, **hub_arguments)


def check_fit(config: JnanaConfig, processor: JnanaProcessor, path: str) -> None:
    """Refuse a checkpoint whose tokenizer or image processor was replaced by another."""
    check_own_tokenizer(config, processor, path)
    check_image_tokens(config, processor, model_name=f"the model in {path}", processor_name=f"the processor in {path}")


def check_image_tokens(config: JnanaConfig, processor: JnanaProcessor, model_name: str, processor_name: str) -> None:
    """Refuse a processor whose number of image tokens differs from the model's number of image vectors.

    Raises:
        ValueError: naming both, with their numbers.
    """
    written = processor.num_image_tokens(*processor.image_height_and_width())
    if written != config.image_seq_length:
        raise ValueError(
            f"{processor_name} writes {written} image tokens an image, but {model_name} gives "
            f"{config.image_seq_length} vectors an image (vision_feature_select_strategy "
            f"{config.vision_feature_select_strategy!r}); they must agree in image size, patch size and strategy"
        )
    pinpoints = [
        [list(pinpoint) for pinpoint in of or ()]
        for of in (processor.image_grid_pinpoints, config.image_grid_pinpoints)
    ]
    if pinpoints[0] != pinpoints[1]:
        raise ValueError(
            f"{processor_name} cuts images into tiles by image_grid_pinpoints {pinpoints[0]}, but {model_name} has "
            f"{pinpoints[1]}; load both from one directory"
        )


def image_fields(vision_config: PreTrainedConfig, processor: JnanaProcessor) -> dict[str, Any]:
    """The fields of `JnanaConfig` that depend on the image processor: `image_grid_pinpoints`, and `image_size` for a
    tower that takes images of any size."""
    height, width = processor.image_height_and_width()
    resizes = getattr(vision_config, "vision_config", vision_config).model_type in RESIZING_TOWERS
    size = {"image_size": height} if resizes and height == width else {}
    return {"image_grid_pinpoints": processor.image_grid_pinpoints, **size}


def downsample_factor(projector_fields: dict[str, Any]) -> int:
    """Side, in patches, of the squares that a projector of these fields joins to one token."""
    if projector_fields.get("projector_type") not in DOWNSAMPLING_PROJECTORS:
        return 1
    return projector_fields.get("projector_downsample_factor", JnanaConfig.projector_downsample_factor)


def tokens_per_view(projector_fields: dict[str, Any]) -> int | None:
    """The image tokens of a view, where a projector of these fields gives a fixed number of them."""
    if projector_fields.get("fusion") == "cross_attention":
        return 1
    if projector_fields.get("projector_type") == "perceiver":
        return projector_fields.get("projector_num_latents", JnanaConfig.projector_num_latents)
    return None


def check_own_tokenizer(config: JnanaConfig, processor: JnanaProcessor, path: str) -> None:
    """Refuse a checkpoint whose tokenizer files were replaced by others."""
    if config.tokenizer_fingerprint is not None:
        check_tokenizer(
            config.tokenizer_fingerprint,
            processor.tokenizer,
            model_name=f"the language model of {path}",
            tokenizer_name=f"in {path}",
        )


def load_processor(
    path: str, trust_remote_code: bool = False, chat_template: str | None = None, **hub_arguments: Any
) -> JnanaProcessor:
    """The processor of a Jnana checkpoint, or the one that a published checkpoint gets.

    Args:
        path (`str`): Folder or Hub id.
        trust_remote_code (`bool`, defaults to `False`): Needed only where a backbone's own tokenizer or image
            processor is custom code.
        chat_template (`str`, *optional*): Name of a shipped template, or the path of a `.jinja` file, to use instead
            of the checkpoint's.
        **hub_arguments: `revision`, `subfolder`, `token`, `cache_dir`, ... as for `from_pretrained`.

    Raises:
        ValueError: if `path` is a folder without one, or the chat template does not suit (see
            [`~jnana.processing.adopt_chat_template`]).
    """
    model_type = model_type_of(path, **hub_arguments)
    if model_type in LLAVA_MODEL_TYPES:
        return JnanaProcessor.from_llava_pretrained(path, chat_template=chat_template, **hub_arguments)
    if model_type == IDEFICS_MODEL_TYPE:
        return JnanaProcessor.from_idefics_pretrained(path, chat_template=chat_template, **hub_arguments)
    folder = Path(path) / hub_arguments.get("subfolder", "")
    if Path(path).is_dir() and not (folder / "processor_config.json").is_file():
        unfinished = sorted(checkpoint.name for checkpoint in folder.glob("checkpoint-*"))
        raise ValueError(
            f"{str(folder)!r} is not a Jnana checkpoint: it has no processor_config.json. "
            + (f"Its run was cut off: take one of {unfinished} in it, or finish the run. " if unfinished else "")
            + "Give a directory written by run_align or run_sft, or name two backbones as vision_model and text_model"
        )
    processor = JnanaProcessor.from_pretrained(path, trust_remote_code=trust_remote_code, **hub_arguments)
    if chat_template is not None:
        processor.chat_template = read_chat_template(chat_template)
        check_answer_end(processor.chat_template, processor.tokenizer, chat_template, processor.image_token)
    return processor


def set_special_tokens(model: nn.Module, processor: JnanaProcessor) -> None:
    """Set the generation config: padding, the tokens that end an answer (the tokenizer's, the chat template's, the
    language model's), and no image tokens, which would break the next turn."""
    generation, tokenizer = model.generation_config, processor.tokenizer
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    template = processor.chat_template
    written = find_answer_end(template, tokenizer, processor.image_token) if isinstance(template, str) else None
    ends = list(dict.fromkeys(end for end in (tokenizer.eos_token_id, written, *ends) if end is not None))
    generation.eos_token_id = ends[0] if len(ends) == 1 else ends
    generation.pad_token_id = tokenizer.pad_token_id
    generation.suppress_tokens = sorted({processor.image_token_id, *(generation.suppress_tokens or [])})
