"""One process whose model is spread over the GPUs of one machine, layer by layer (`device_map`).

transformers and accelerate do the work: a layer's inputs move to the GPU that holds it, and the stock Trainer leaves
such a model where it is. The GPUs compute one after the other, so this is for models that do not fit on one of them;
FSDP2 lets all of them compute at the same time.
"""

from typing import Any

from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from jnana.modeling import JnanaConfig, model_type_of

from .adapters import is_adapter
from .distributed import sharding_of
from .options.arguments import ModelArguments
from .options.recipes import accelerate_config


def check_device_map(args: ModelArguments, training_args: TrainingArguments, quantization: str = "none") -> None:
    """Refuse `device_map` in a run of several processes, with FSDP or DeepSpeed, or where quantised weights must move.

    Args:
        args (`ModelArguments`): `device_map`, and which model.
        training_args (`TrainingArguments`): Of the run.
        quantization (`str`, *optional*, defaults to `"none"`): `none`, `nf4` or `int8`.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    if args.device_map is None:
        return
    sharding = sharding_of(training_args)
    if training_args.world_size > 1 or sharding is not None:
        several = training_args.world_size > 1
        run = f"has {training_args.world_size} processes" if several else f"shards the model ({sharding})"
        raise ValueError(
            f"device_map is {args.device_map!r}, with which one process spreads the model over all GPUs, but this run "
            f"{run}; start the script with `python`, not `accelerate launch`, or leave device_map out"
        )
    if quantization != "none" and not reads_spread(args):
        raise ValueError(
            f"device_map is {args.device_map!r} and quantization {quantization!r}, which needs a Jnana checkpoint as "
            "model_name_or_path: another model is spread after it is built, and quantised weights can't be moved. "
            "Give a directory of run_align or a merged one, or leave one of the two options out"
        )


def reads_spread(args: ModelArguments) -> bool:
    """Whether `from_pretrained` reads the model straight to the GPUs: a Jnana checkpoint.

    Others are built on the CPU first, whose memory must hold them: pairs, adapters with their base, LLaVA checkpoints.
    """
    name = args.model_name_or_path
    return name is not None and not is_adapter(name) and model_type_of(name) == JnanaConfig.model_type


def spread_over_devices(model: PreTrainedModel, device_map: str, max_memory: dict | None = None) -> PreTrainedModel:
    """Move the layers of a model to the GPUs of this machine, as `from_pretrained(device_map=...)` loads a checkpoint.

    Args:
        model (`JnanaForConditionalGeneration`): On the CPU, with or without adapters in it; changed in place.
        device_map (`str`): `auto` or `balanced`: about the same number of bytes on each GPU; `balanced_low_0`: less on
            the first, which also holds inputs and logits; `sequential`: fill one after the other.
        max_memory (`dict`, *optional*): Bytes of each device; default: what is free.
    """
    # The projector reads weights of its own (`image_newline`) beside the outputs of its layers.
    kept_whole = sorted({*(model._no_split_modules or ()), type(model.model.multi_modal_projector).__name__})
    if device_map != "sequential":
        low_zero = device_map == "balanced_low_0"
        max_memory = get_balanced_memory(model, max_memory, no_split_module_classes=kept_whole, low_zero=low_zero)
    found = infer_auto_device_map(model, max_memory, no_split_module_classes=kept_whole)
    return dispatch_model(model, found, skip_keys=model._skip_keys_device_placement)


def check_spread(model: nn.Module, args: TrainingArguments) -> None:
    """Check that `device_map` has put no layer where it can't train, and that it uses more than one of several GPUs.

    Args:
        model (`PreTrainedModel` or `PeftModel`): As it was loaded.
        args (`TrainingArguments`): Of the run.

    Raises:
        ValueError: naming the layers, or the number of GPUs, and the remedy.
    """
    devices: dict[Any, list[str]] = {}
    # without the attribute there is one device: the only GPU, or the CPU
    for name, device in getattr(model, "hf_device_map", {}).items():
        devices.setdefault(device, []).append(name)
    gpus = [device for device in devices if device not in ("cpu", "disk")]
    offloaded = [name for device in ("cpu", "disk") for name in devices.get(device, [])]
    if gpus and offloaded:
        raise ValueError(
            f"device_map: the GPUs hold only a part of the model, and {len(offloaded)} modules stay outside of them "
            f"({', '.join(offloaded[:3])}, ...), where they can't train; use more GPUs, quantization: nf4, or "
            f"{accelerate_config('fsdp2.yaml')}"
        )
    if len(gpus) <= 1 < args.n_gpu:
        raise ValueError(
            f"device_map put the whole model on one of {args.n_gpu} GPUs; leave it out, and start with "
            f"{accelerate_config('ddp.yaml')}"
        )
