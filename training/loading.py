"""Loads or builds a model with its processor, from a directory of any kind, a Hub id, or two backbones.

A tokenizer that the language model was not trained with raises an error. Without this check the ids would stand for
other words than in training, and up to half of the answers would be wrong without any error.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    TrainingArguments,
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
    grow_embeddings,
    held_dtype,
    jnana_config_from_idefics,
    jnana_config_from_llava,
    load_adapter_base,
    model_type_of,
    quantization_config,
)
from jnana.processing import JnanaProcessor, read_chat_template, set_image_geometry
from jnana.processing.chat_formats_jnana import check_answer_end, find_answer_end
from jnana.processing.data import check_tokenizer, tokenizer_fingerprint

from .adapters import adapter_reference, is_adapter
from .device_map import check_spread, reads_spread, spread_over_devices
from .distributed import unpartitioned
from .options.arguments import LIGER_LOSS, ModelArguments


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


def prepare_processor(args: ModelArguments) -> JnanaProcessor:
    """The processor that the arguments ask for, checked against the model's parts; no weights are read.

    Raises:
        ValueError: if the tokenizer, the image processor or a projector field is refused.
    """
    trust = {"trust_remote_code": args.trust_remote_code}
    if args.model_name_or_path is not None:
        processor = load_processor(args.model_name_or_path, chat_template=args.chat_template, **trust)
        if args.image_geometry is not None:
            processor.image_processor = set_image_geometry(processor.image_processor, args.image_geometry)
        check_fit(load_config(args.model_name_or_path), processor, args.model_name_or_path)
        return processor
    tokenizer_name = args.tokenizer_name_or_path or args.text_model
    processor = JnanaProcessor.from_vision_text_pretrained(
        args.vision_model,
        tokenizer_name,
        chat_template=args.chat_template,
        vision_feature_select_strategy=args.vision_feature_select_strategy or "default",
        image_geometry=args.image_geometry,
        downsample_factor=downsample_factor(args.projector_fields),
        tokens_per_view=tokens_per_view(args.projector_fields),
        **trust,
    )
    check_text_tokenizer(args.text_model, processor.tokenizer, tokenizer_name, **trust)
    backbones = [AutoConfig.from_pretrained(name, **trust) for name in (args.vision_model, args.text_model)]
    size = image_fields(backbones[0], processor)
    config = JnanaConfig.from_vision_text_configs(*backbones, **args.projector_fields, **size)
    check_image_tokens(config, processor, args.vision_model, f"the image processor of {args.vision_model}")
    return processor


def frozen_dtype(args: ModelArguments) -> str:
    """The dtype of a run's frozen weights: `dtype`, or for `auto` the one that the checkpoint is stored in.

    Weights stored in float16 are held in bfloat16. It has float32's range; activations of language models that were
    trained in bfloat16 overflow in float16. For the base of an adapter to continue it is the dtype of the last round.

    Args:
        args (`ModelArguments`): Which model; only its config is read.

    Returns:
        `str`: `float32`, `bfloat16` or, only if `dtype` asks for it, `float16`.
    """
    if args.dtype != "auto":
        return args.dtype
    name = args.model_name_or_path or args.text_model
    if name is not None and is_adapter(name):
        stored = adapter_reference(name)["dtype"]
    else:
        config = PreTrainedConfig.get_config_dict(name)[0]
        # configs of transformers 4 have `torch_dtype`, and some have it in the language model's part only
        fields = [
            part.get(key) for part in (config, config.get("text_config", {})) for key in ("dtype", "torch_dtype")
        ]
        stored = next((field for field in fields if field is not None), None)
    stored = str(stored or "float32").removeprefix("torch.")
    held = str(held_dtype(getattr(torch, stored))).removeprefix("torch.")
    logger.info(f"dtype auto: {name} is stored in {stored}; frozen weights are held in {held}")
    return held


def prepare_model(
    args: ModelArguments,
    processor: JnanaProcessor,
    training_args: TrainingArguments | None = None,
    quantization: dict[str, Any] | None = None,
) -> nn.Module:
    """The model that the arguments ask for.

    Args:
        args (`ModelArguments`): Which model.
        processor (`JnanaProcessor`): What [`prepare_processor`] made of the same arguments.
        training_args (`TrainingArguments`, *optional*): Of the run. A quantised model is loaded on their `device`, as
            it cannot be moved afterwards, and under ZeRO-3 the model is built whole (see [`unpartitioned`]). A model
            is spread over their GPUs if `device_map` asks for it.
        quantization (`dict`, *optional*): Settings as for `jnana.modeling.quantization_config`; default: none.

    Raises:
        ValueError: if a projector field contradicts the checkpoint to continue, or the model is too large for
            `device_map`.
    """
    loading = {"dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    if args.attn_implementation is not None:
        loading["attn_implementation"] = args.attn_implementation
    quantization = quantization or {"quantization": "none"}
    if quantization["quantization"] != "none" and training_args is not None:
        loading["device_map"] = {"": training_args.device}
    start = args.model_name_or_path
    spread = args.device_map is not None
    if spread and reads_spread(args):
        loading["device_map"] = args.device_map
    whole = start is None or quantization["quantization"] != "none" or is_adapter(start)
    whole = whole or model_type_of(start) in PUBLISHED_MODEL_TYPES
    with unpartitioned(training_args, whole):
        model = _load_or_build(args, processor, quantization, loading)
    if training_args is not None and training_args.use_liger_kernel:
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        inner.use_liger_kernel = (training_args.liger_kernel_config or {}).get(LIGER_LOSS, True)
    if spread and training_args is not None:
        if "device_map" not in loading:
            spread_over_devices(model.get_base_model() if isinstance(model, PeftModel) else model, args.device_map)
        check_spread(model, training_args)
    return model


def _load_or_build(
    args: ModelArguments, processor: JnanaProcessor, quantization: dict[str, Any], loading: dict[str, Any]
) -> nn.Module:
    """The work behind [`prepare_model`]; `loading` holds the arguments of `from_pretrained`."""
    if args.model_name_or_path is None:
        loading["quantization_config"] = quantization_config(quantization, args.dtype)
        return build_pair(
            args.vision_model,
            args.text_model,
            processor,
            tokenizer_name=args.tokenizer_name_or_path or args.text_model,
            **args.projector_fields,
            **loading,
        )
    model, _ = load_model(
        args.model_name_or_path,
        trainable_adapter=True,
        quantization=quantization,
        chat_template=args.chat_template,
        **loading,
    )
    if args.chat_template is not None:  # its answers may end in another token than those of the checkpoint's template
        set_special_tokens(model, processor)
    for name, value in args.projector_fields.items():
        present = getattr(model.config, name)
        if present != value:
            raise ValueError(
                f"{name} is {value!r}, but the checkpoint {args.model_name_or_path!r} has {present!r}; leave it out, "
                "or build a new pair from vision_model and text_model"
            )
    return model


def build_pair(
    vision: str, text: str, processor: JnanaProcessor, *, tokenizer_name: str | None = None, **fields
) -> JnanaForConditionalGeneration:
    """Join two backbones by a projector with random weights.

    Args:
        vision (`str`): Vision tower, Hub id or folder.
        text (`str`): Causal language model, Hub id or folder.
        processor (`JnanaProcessor`): Made for the same two; its tokenizer holds the image and the pad token.
        tokenizer_name (`str`, *optional*): The tokenizer's name in errors; default: `text`.
        fields: `JnanaConfig`'s projector fields, and what `from_pretrained` takes (`dtype`, ...).

    Raises:
        ValueError: if the tokenizer is not the one that the language model was trained with.
    """
    tokenizer = processor.tokenizer
    trust_remote_code = fields.get("trust_remote_code", False)
    fingerprint = check_text_tokenizer(text, tokenizer, tokenizer_name or text, trust_remote_code)
    vision_config = AutoConfig.from_pretrained(vision, trust_remote_code=trust_remote_code)
    size = image_fields(vision_config, processor)
    model = JnanaForConditionalGeneration.from_vision_text_pretrained(
        vision, text, image_token_id=processor.image_token_id, **size, **fields
    )
    check_image_tokens(model.config, processor, model_name=vision, processor_name="the processor")
    model.config.tokenizer_fingerprint = fingerprint
    for part in (model.config.vision_config, model.config.text_config):
        part.name_or_path = ""  # transformers writes it into config.json, which is published
    grow_embeddings(model, len(tokenizer))
    set_special_tokens(model, processor)
    return model


def check_text_tokenizer(
    text: str, tokenizer: PreTrainedTokenizerBase, tokenizer_name: str, trust_remote_code: bool = False
) -> str | None:
    """Compare a tokenizer with the one that the language model `text` was trained with.

    The latter is known by the fingerprint that run_pretrain writes into the model's config, or else by the tokenizer
    in the checkpoint.

    Returns:
        `str` or `None`: the fingerprint; `None`, with a warning, when the checkpoint holds neither.

    Raises:
        ValueError: if they differ; the message names both.
    """
    config = AutoConfig.from_pretrained(text, trust_remote_code=trust_remote_code)
    fingerprint = getattr(config, "tokenizer_fingerprint", None)
    if fingerprint is None:
        try:
            shipped = AutoTokenizer.from_pretrained(text, trust_remote_code=trust_remote_code)
        except (OSError, ValueError):
            shipped = None
        # for some families transformers returns an empty tokenizer where the checkpoint has none
        if shipped is None or len(shipped) < config.get_text_config().vocab_size // 2:
            logger.warning(f"{text!r} ships no tokenizer, so {tokenizer_name!r} cannot be compared with it")
            return None
        fingerprint = tokenizer_fingerprint(shipped)
    check_tokenizer(fingerprint, tokenizer, model_name=text, tokenizer_name=tokenizer_name)
    return fingerprint


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
