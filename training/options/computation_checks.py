"""Checks of the options about computation: quantisation, dtypes, sharding, kernels."""

from typing import Any

import torch
from transformers import PreTrainedConfig, TrainingArguments
from transformers.utils import is_bitsandbytes_available, is_liger_kernel_available

from jnana.training.device_map import check_device_map
from jnana.training.distributed import sharding_of

from .arguments import (
    LIGER_LOSS,
    ModelArguments,
    TextModelArguments,
)
from .recipes import accelerate_config


def check_quantization(settings: dict[str, Any], device: torch.device) -> None:
    """Refuse a quantised base that bitsandbytes, or the device, cannot compute with.

    Args:
        settings (`dict`): As `jnana.training.adapters.quantization_settings` gives them.
        device (`torch.device`): The device of the run.

    Raises:
        ValueError: naming the option and the remedy.
    """
    method = settings["quantization"]
    if method == "none":
        return
    remedy = "set `quantization: none` and hold the language model in 16 bits (`dtype: bfloat16`)"
    if not is_bitsandbytes_available():
        raise ValueError(
            f"quantization is {method!r}, which needs bitsandbytes, and that is not installed: "
            f"`pip install bitsandbytes`, or {remedy}"
        )
    import bitsandbytes

    if device.type not in bitsandbytes.supported_torch_devices:
        raise ValueError(
            f"quantization is {method!r}, but the installed bitsandbytes {bitsandbytes.__version__} computes on "
            f"{sorted(bitsandbytes.supported_torch_devices)} and this run is on {device.type!r}; {remedy}"
        )
    if device.type == "cuda" and settings.get("compute_dtype") == "bfloat16":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ValueError(
                "quantization_compute_dtype is 'bfloat16', for which this GPU "
                f"({torch.cuda.get_device_name(device)}) has no units; give `--dtype float16 --bf16 false --fp16 true`"
            )


def check_computation(
    args: TrainingArguments,
    model_args: ModelArguments | TextModelArguments,
    optimizer: str,
    quantization: str = "none",
    trains_language_model: bool = False,
) -> None:
    """Refuse options that the run's sharding, precision or kernels can't follow, and complete `accelerator_config`.

    Args:
        args (`TrainingArguments`): Of the run. Where `accelerator_config.dispatch_batches` is left open it is set to
            `False`: accelerate would cut a packed batch of a stream along dimension 0, images and rows alike.
        model_args (`ModelArguments` or `TextModelArguments`): Attention implementation and dtype.
        optimizer (`str`): `stock` or `muon`.
        quantization (`str`, defaults to `"none"`): `none`, `nf4` or `int8`.
        trains_language_model (`bool`, defaults to `False`): Whether the whole language model trains, which is then
            held in float32, whatever `dtype` says.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    check_liger_kernel(args, model_args)
    check_mixed_precision(args)
    if args.accelerator_config.dispatch_batches is None:
        args.accelerator_config.dispatch_batches = False
    elif args.accelerator_config.dispatch_batches and isinstance(model_args, ModelArguments):
        raise ValueError(
            "accelerator_config: dispatch_batches is true, with which accelerate cuts a batch along dimension 0, its "
            "images and its rows alike; leave it out"
        )
    if isinstance(model_args, ModelArguments):
        check_device_map(model_args, args, quantization)
        check_halves(model_args, args)
    sharding = sharding_of(args)
    if optimizer == "muon" and sharding is not None and sharding.startswith("zero"):
        raise ValueError(
            "optimizer is 'muon', which steps whole matrices, but DeepSpeed's ZeRO flattens all weights; start with "
            f"{accelerate_config('fsdp2.yaml')} or ddp.yaml, or set `optimizer: stock`"
        )
    if quantization == "int8" and sharding == "fsdp":
        raise ValueError(
            "quantization is 'int8', whose weights FSDP cannot shard; set `quantization: nf4`, or start with "
            f"{accelerate_config('ddp.yaml')}"
        )
    attention, dtype = model_args.attn_implementation, "float32" if trains_language_model else model_args.dtype
    if attention is not None and "flash" in attention and dtype == "float32" and not (args.bf16 or args.fp16):
        held = "the language model trains, so it is held in float32" if trains_language_model else "dtype is 'float32'"
        raise ValueError(
            f"attn_implementation is {attention!r}, which computes in 16 bits only, but {held}, and bf16 and fp16 are "
            "false; set `bf16: true`, or `attn_implementation: sdpa`"
        )
    half = args.fp16 or (dtype == "float16" and not args.bf16)
    if attention == "eager" and half and text_model_type(model_args) == "phi":
        raise ValueError(
            "attn_implementation is 'eager', which computes the attention scores of Phi in float16, where they "
            "overflow; set `attn_implementation: sdpa`, or bf16: true instead of float16"
        )


def check_mixed_precision(args: TrainingArguments) -> None:
    """Refuse a `mixed_precision` of accelerate's file that the run's own options contradict: the Trainer follows it.

    Raises:
        ValueError: naming the value, the option and both remedies.
    """
    given = args.mixed_precision
    if given in ("bf16", "fp16") and not getattr(args, given):
        raise ValueError(
            f"{given} is false, but mixed_precision is {given!r} (the file or an option of `accelerate launch`, or "
            f"ACCELERATE_MIXED_PRECISION), in which the Trainer would compute; give `--{given} true`, or start with "
            "`accelerate launch --mixed_precision no`"
        )


def check_halves(model_args: ModelArguments, args: TrainingArguments) -> None:
    """Refuse frozen weights in one kind of 16 bits and computation in the other, where CLIP's first `cat` would fail.

    Raises:
        ValueError: naming both options and the remedy.
    """
    for dtype, option in (("float16", "bf16"), ("bfloat16", "fp16")):
        if model_args.dtype == dtype and getattr(args, option):
            other = {"float16": "bfloat16", "bfloat16": "float16"}[dtype]
            raise ValueError(
                f"dtype is {dtype!r} but {option} is true, which computes in {other}; set `dtype: {other}`, or "
                f"`{option}: false`"
            )


def check_liger_kernel(args: TrainingArguments, model_args: ModelArguments | TextModelArguments) -> None:
    """Refuse `use_liger_kernel` where it would change nothing, or could not run.

    Jnana's models take Liger's fused loss (`modeling/loss_jnana.py`). Of language models Liger patches those that it
    knows by `model_type`.

    Raises:
        ValueError: naming the option and the remedy.
    """
    if not args.use_liger_kernel:
        return
    if not is_liger_kernel_available():
        raise ValueError(
            "use_liger_kernel is true, but liger-kernel is not installed: `pip install liger-kernel`, or leave it out"
        )
    if isinstance(model_args, ModelArguments):
        if args.device.type == "cpu":
            raise ValueError(
                "use_liger_kernel is true, but this run is on 'cpu' and Liger's kernels need a GPU; leave it out: the "
                "loss is then fused with the head by torch"
            )
        others = sorted(set(args.liger_kernel_config or ()) - {LIGER_LOSS})
        if others:
            raise ValueError(
                f"liger_kernel_config names {', '.join(others)}, but of Liger's kernels Jnana's models take only "
                f"{LIGER_LOSS}; leave the others out"
            )
        return
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    model_type = text_model_type(model_args)
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"use_liger_kernel is true, but Liger has no kernels for model_type {model_type!r}; leave it out"
        )


def text_model_type(args: ModelArguments | TextModelArguments) -> str | None:
    """The `model_type` of the language model that the arguments name, read from a config; no weights are read."""
    if isinstance(args, ModelArguments):
        name = args.model_name_or_path or args.text_model
    else:
        name = args.model_name_or_path or args.config_name_or_path
        if name is None:
            return args.text_config_fields.get("model_type")
    if name is None:
        return None
    config = PreTrainedConfig.get_config_dict(name)[0]
    return config.get("text_config", config).get("model_type")
