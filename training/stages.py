"""Sets `requires_grad` for each part of the model in each stage, and adds LoRA adapters. No other file does.

| stage             | vision_tower | multi_modal_projector | cross_attention | language_model | lm_head |
|-------------------|--------------|-----------------------|-----------------|----------------|---------|
| pretrain          | -            | -                     | -               | trains         | trains  |
| align             | frozen (1)   | trains                | trains          | frozen         | frozen  |
| sft with `lora_r` | frozen (1, 2)| trains                | trains          | its adapter    | frozen  |
| sft without       | frozen (1)   | trains                | trains          | trains         | trains  |

(1) With `freeze_vision_tower: false` it trains, but for the parameters on which the selected features do not depend
    (CLIP's last layer and `post_layernorm`): DDP waits for every gradient. LLaVA-1.6 trains it.
(2) With `lora_vision_target_modules` its adapter trains.

With `fusion: cross_attention` the projector is the resampler, and `cross_attention` holds the gated blocks; other
models have none.

Parameters that train are held in float32, whatever the dtype of the frozen ones: at LLaVA-1.6's 2e-6 nearly every step
of AdamW is smaller than the distance between two neighbouring bfloat16 numbers.
"""

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from jnana.modeling import JnanaConfig, quantized_weight_count
from jnana.modeling.backbones_jnana import build_vision_tower, find_unused_parameters

from .options.arguments import LoraArguments


logger = logging.getLogger(__name__)

PARTS = ("vision_tower", "multi_modal_projector", "cross_attention", "language_model", "lm_head")
# What joins the two backbones: it starts from random weights and trains in full, beside LoRA too.
JOINING_PARTS = ("multi_modal_projector", "cross_attention")

# The parts that train in each stage. `pretrain` has a bare language model, of which everything trains.
STAGES: dict[str, dict[str, bool]] = {
    "pretrain": {"language_model": True, "lm_head": True},
    "align": {
        "vision_tower": False,
        "multi_modal_projector": True,
        "cross_attention": True,
        "language_model": False,
        "lm_head": False,
    },
    "sft": {
        "vision_tower": False,
        "multi_modal_projector": True,
        "cross_attention": True,
        "language_model": True,
        "lm_head": True,
    },
}


@dataclass
class PartCount:
    """Parameters of one part of the model, and the dtypes that the trainable and the frozen ones are held in."""

    trainable: int = 0
    total: int = 0
    trainable_dtypes: set[str] = field(default_factory=set)
    frozen_dtypes: set[str] = field(default_factory=set)


def apply_stage(
    model: nn.Module,
    stage: str,
    lora: LoraArguments | None = None,
    packing: str = "none",
    freeze_vision_tower: bool = True,
) -> nn.Module:
    """Freeze and unfreeze the parts of `model` as in the table, and log the number of trained parameters.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            A bare language model (`pretrain`), a `JnanaForConditionalGeneration`, or (`sft` only) a `PeftModel` loaded
            with a trainable adapter, which is then continued.
        stage (`str`): `pretrain`, `align` or `sft`.
        lora (`LoraArguments`, *optional*): With `lora_r > 0` the language model gets an adapter and is itself frozen.
        packing (`str`, *optional*, defaults to `"none"`): `none`, `rows` or `shared_image`; warns about dropout.
        freeze_vision_tower (`bool`, *optional*, defaults to `True`):
            `False` trains the tower whole; not read where an adapter is continued, which trains what it holds.

    Returns:
        `nn.Module`: the model, or the `PeftModel` around it. Trained weights are float32, whatever the others are.

    Raises:
        ValueError: if the stage is unknown, or the adapter's targets match no linear layer of the language model.
    """
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r} is unknown; it must be one of {list(STAGES)}")
    continued = isinstance(model, PeftModel)
    if continued and stage != "sft":
        raise ValueError(f"stage {stage!r} cannot continue an adapter; merge it first (run_sft --merge_adapter true)")
    with_lora = continued or (lora is not None and lora.lora_r > 0)
    trains = {**STAGES[stage], "vision_tower": not freeze_vision_tower}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad = trains[part] and not (with_lora and part in ("language_model", "lm_head"))
    if continued:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "lora_" in name or "modules_to_save." in name
    elif with_lora:
        model = add_lora(model, lora, freeze_vision_tower)
    if isinstance(model, PeftModel):
        logger.info(describe_lora(model.peft_config["default"]))
    # `prepare_model_for_kbit_training` would convert the tower, the embeddings and the head to float32 too.
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()  # AdamW's small steps are rounded away in 16 bits
    freeze_unused(model)  # after the conversion: without autocast the tower computes in one dtype
    logger.info(describe_parameters(model, stage))
    log_dropout(active_dropout(model), packing)
    return model


def unused_vision_parameters(config: JnanaConfig) -> list[str]:
    """[`JnanaModel.unused_vision_parameters`], from a tower on the meta device.

    The model's own tower may be wrapped by PEFT, spread over devices or partitioned by DeepSpeed.

    Args:
        config ([`JnanaConfig`]): The model's.

    Returns:
        `list[str]`: names as in the tower's `named_parameters()`.
    """
    with torch.device("meta"):
        return find_unused_parameters(build_vision_tower(config), config)


def freeze_unused(model: nn.Module) -> None:
    """Freeze the parameters of a tower that trains on which the selected features do not depend."""
    trainable = {
        name.partition("vision_tower.")[2].removeprefix("modules_to_save.default."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and part_of(name) == "vision_tower"
    }
    if trainable:
        for name in trainable.keys() & unused_vision_parameters(model.config):
            trainable[name].requires_grad = False


def log_dropout(dropout: dict[str, float], packing: str) -> None:
    """Log the dropout of a run that trains, or warn about it where packed rows would differ from separate rows.

    The dropout of LoRA is stated with its rank ([`describe_lora`]).

    Args:
        dropout (`dict[str, float]`): As [`active_dropout`] gives it.
        packing (`str`): `none`, `rows` or `shared_image`.
    """
    stated = ", ".join(f"{part} {probability:g}" for part, probability in sorted(dropout.items()))
    if dropout and packing != "none":
        logger.warning(
            f"packing is {packing!r}, and dropout is on in trained parts ({stated}). Conversations that share a row "
            "then share its noise, so packed rows do not train exactly what separate rows train. Set the dropout "
            "fields in the language model's config.json (Phi-2: `resid_pdrop`) and lora_dropout to 0, or packing: none"
        )
    elif set(dropout) - {"lora"}:
        logger.info(f"dropout: {stated}")


def active_dropout(model: nn.Module) -> dict[str, float]:
    """The largest dropout probability in each part of the model that has dropout in training. Frozen parts have none;
    the one of LoRA counts as `lora`."""
    was_training = model.training
    model.train()
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        probability = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
        if module.training and isinstance(probability, float) and probability > 0:
            part = "lora" if "lora_dropout" in name else part_of(name)
            found[part] = max(found.get(part, 0.0), probability)
    model.train(was_training)
    return found


def add_lora(model: nn.Module, lora: LoraArguments, freeze_vision_tower: bool = True) -> nn.Module:
    """Wrap `model` in a `PeftModel` with adapters on the language model; the projector and the blocks of
    cross-attention train in full.

    The vision tower gets adapters only if `lora_vision_target_modules` is given, and trains in full, as the projector
    does, with `freeze_vision_tower` false. CLIP and Phi share layer names (`q_proj`, `fc1`), so the targets are full
    module names, never suffixes.
    """
    targets = adapter_targets(model, lora)
    logger.info(describe_targets(targets))
    config = LoraConfig(
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha if lora.lora_alpha is not None else 2 * lora.lora_r,
        lora_dropout=lora.lora_dropout or 0.0,
        target_modules=targets,
        modules_to_save=[
            name
            for name, _ in model.model.named_children()
            if name in JOINING_PARTS or (name == "vision_tower" and not freeze_vision_tower)
        ],
        # without a task type PEFT writes the name of the model's (temporary) remote-code module into the adapter
        task_type="CAUSAL_LM",
    )
    if Path(model.name_or_path).is_dir():
        # PEFT would write a folder of this machine into the adapter and its card; jnana_base.json names the base
        model.name_or_path = model.config.name_or_path = ""
    if lora.base_model_id is not None:
        config.base_model_name_or_path = lora.base_model_id
    return get_peft_model(model, config)


def describe_lora(config: LoraConfig) -> str:
    """One line about an adapter's rank, scale and dropout."""
    text = f"LoRA of rank {config.r}, alpha {config.lora_alpha:g}, dropout {config.lora_dropout:g}"
    noise = "; its noise differs between packed and separate rows, so they train different adapters"
    return text + (noise if config.lora_dropout > 0 else "")


def adapter_targets(model: nn.Module, lora: LoraArguments) -> list[str]:
    """The full names of all layers that get an adapter, in the language model and, if asked for, the tower.

    Layers of the tower on which the selected features do not depend get no gradient and are left out.

    Raises:
        ValueError: if a name matches nothing.
    """
    targets = resolve_targets(model, lora.lora_target_modules or ["all-linear"])
    if lora.lora_vision_target_modules:
        unused = {f"model.vision_tower.{name}".rpartition(".")[0] for name in unused_vision_parameters(model.config)}
        option = "lora_vision_target_modules"
        of_the_tower = resolve_targets(model, lora.lora_vision_target_modules, "vision_tower", option)
        targets += [name for name in of_the_tower if name not in unused]
    return targets


def resolve_targets(
    model: nn.Module, wanted: list[str], part: str = "language_model", option: str = "lora_target_modules"
) -> list[str]:
    """The full names of the linear layers of one part whose last name component is in `wanted`.

    Raises:
        ValueError: if one of the names matches nothing; the message lists the layers there are.
    """
    linear = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and part_of(name) == part
    ]
    kinds = sorted({name.rsplit(".", 1)[-1] for name in linear})
    if wanted == ["all-linear"]:
        return linear
    missing = [name for name in wanted if name not in kinds]
    if missing:
        raise ValueError(
            f"{option}: {missing} match no linear layer of the {part.replace('_', ' ')}; it has {kinds}, "
            "or take `all-linear`"
        )
    return [name for name in linear if name.rsplit(".", 1)[-1] in wanted]


def describe_targets(targets: list[str]) -> str:
    """The number of layers of each kind that get an adapter, by part."""
    lines = []
    for part in PARTS:
        kinds = Counter(name.rsplit(".", 1)[-1] for name in targets if part_of(name) == part)
        if kinds:
            counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            lines.append(f"LoRA on {sum(kinds.values())} linear layers of {part}: {counted}")
    return "\n".join(lines)


def part_of(name: str) -> str:
    """The part that a parameter or module name belongs to; a bare language model has two, body and head."""
    pieces = name.split(".")
    for part in PARTS:
        if part in pieces:
            return part
    return "lm_head" if "embed_out" in pieces else "language_model"


def parameter_count(parameter: nn.Parameter) -> int:
    """The number of values in a weight, also if it is packed in 4 bits or partitioned over the processes."""
    return getattr(parameter, "ds_numel", None) or quantized_weight_count(parameter)


def dtype_name(parameter: nn.Parameter) -> str:
    """How a weight is held: the name of its dtype, or `nf4` where bitsandbytes has packed it in 4 bits."""
    if type(parameter).__name__ == "Params4bit":
        return parameter.quant_type  # type: ignore[attr-defined]
    return str(parameter.dtype).removeprefix("torch.")


def count_parameters(model: nn.Module) -> dict[str, PartCount]:
    """Trainable and total parameters by part, and their dtypes.

    Tied weights count once. The untrained copies of the projector and the tower that PEFT keeps beside the trained
    ones are left out.
    """
    counts: dict[str, PartCount] = {}
    for name, parameter in model.named_parameters():
        if "original_module" in name.split("."):
            continue
        count = counts.setdefault(part_of(name), PartCount())
        number = parameter_count(parameter)
        count.total += number
        count.trainable += number if parameter.requires_grad else 0
        dtypes = count.trainable_dtypes if parameter.requires_grad else count.frozen_dtypes
        dtypes.add(dtype_name(parameter))
    return counts


def describe_parameters(model: nn.Module, stage: str) -> str:
    """The table logged at the start of a run."""
    counts = count_parameters(model)
    lines = [
        f"stage {stage}: trained parameters",
        f"  {'part':<24}{'trainable':>16}  {'dtype':<12}{'frozen':>18}  dtype",
    ]
    trainable, total = (sum(getattr(count, name) for count in counts.values()) for name in ("trainable", "total"))
    counts = {part: counts[part] for part in PARTS if part in counts} | {"all": PartCount(trainable, total)}
    for part, count in counts.items():
        held = [", ".join(sorted(dtypes)) for dtypes in (count.trainable_dtypes, count.frozen_dtypes)]
        line = f"  {part:<24}{count.trainable:>16,}  {held[0]:<12}{count.total - count.trainable:>18,}  {held[1]}"
        lines.append(line.rstrip())
    return "\n".join([*lines, f"  {trainable / max(total, 1):.3%} of all parameters train"])
