"""The model and the processor with which a stage starts: a checkpoint to continue, or two backbones to join.

A tokenizer that the language model was not trained with raises an error. Without this check the ids would stand for
other words than in training, and up to half of the answers would be wrong without any error.
"""

import contextlib
import logging
import platform
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
from transformers.utils import is_torchvision_available

from jnana.modeling import (
    JnanaConfig,
    JnanaForConditionalGeneration,
    grow_embeddings,
    held_dtype,
    model_type_of,
    quantization_config,
)
from jnana.processing import JnanaProcessor, set_image_geometry
from jnana.processing.data import check_tokenizer, tokenizer_fingerprint

from .adapters import adapter_reference, is_adapter
from .device_map import check_spread, reads_spread, spread_over_devices
from .distributed import unpartitioned
from .loading import (
    PUBLISHED_MODEL_TYPES,
    check_fit,
    check_image_tokens,
    downsample_factor,
    image_fields,
    load_config,
    load_model,
    load_processor,
    set_special_tokens,
    tokens_per_view,
)
from .options.arguments import LIGER_LOSS, ModelArguments


logger = logging.getLogger(__name__)


def prepare_processor(args: ModelArguments, image_backend: str | None = None) -> JnanaProcessor:
    """The processor that the arguments ask for, checked against the model's parts; no weights are read.

    Args:
        args (`ModelArguments`): Which model.
        image_backend (`str`, *optional*): What [`run_image_backend`] chose for all processes of a run; without it
            `args.image_backend`, or as the processor is loaded.

    Raises:
        ValueError: if the tokenizer, the image processor or a projector field is refused, or torchvision was chosen
            and can't be imported here.
    """
    trust = {"trust_remote_code": args.trust_remote_code}
    if args.model_name_or_path is not None:
        processor = load_processor(args.model_name_or_path, chat_template=args.chat_template, **trust)
        if args.image_geometry is not None:
            processor.image_processor = set_image_geometry(processor.image_processor, args.image_geometry)
        check_fit(load_config(args.model_name_or_path), processor, args.model_name_or_path)
        return _resizing_with(processor, args, image_backend)
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
    return _resizing_with(processor, args, image_backend)


def _resizing_with(processor: JnanaProcessor, args: ModelArguments, chosen: str | None) -> JnanaProcessor:
    """The processor, resizing images with the library that the run has chosen, and recording the one that resizes."""
    backend = chosen or args.image_backend
    if backend is None:
        return processor
    if backend == "torchvision" and not is_torchvision_available():
        raise ValueError(
            f"image_backend is 'torchvision', which can't be imported on {platform.node()}; install the torchvision "
            "of this torch on each machine of the run, or give image_backend: pil"
        )
    processor.set_image_backend(backend)
    if args.image_backend not in (None, processor.image_backend):
        name = type(processor.image_processor).__name__
        logger.warning(
            f"image_backend {args.image_backend!r}: there is no such {name}; {processor.image_backend} resizes"
        )
    return processor


def run_image_backend(args: ModelArguments) -> str:
    """The library that a run resizes images with: `image_backend`, or that of the checkpoint to continue, or for a new
    pair the one that transformers prefers.

    Args:
        args (`ModelArguments`): Which model; only its processor's settings are read.

    Raises:
        ValueError: if `image_backend` names a library that is not installed.
    """
    installed = is_torchvision_available()
    if args.image_backend == "torchvision" and not installed:
        raise ValueError(
            "image_backend is 'torchvision', which can't be imported here; install the torchvision of this torch, or "
            "leave image_backend out"
        )
    if args.image_backend is not None:
        return args.image_backend
    recorded = None
    if args.model_name_or_path is not None:
        with contextlib.suppress(OSError):  # an error of the path is explained where the processor is loaded
            recorded = JnanaProcessor.get_processor_dict(args.model_name_or_path)[0].get("image_backend")
    if recorded == "torchvision" and not installed:
        logger.warning(
            f"{args.model_name_or_path} was trained on images that torchvision resized, which can't be imported here; "
            "Pillow resizes them, and pixels differ by a level (docs/data.md)"
        )
    if recorded == "pil" or not installed:
        return "pil"
    return "torchvision"


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
