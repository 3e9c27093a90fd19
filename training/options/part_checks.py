"""Checks of the options about single parts of the model: which parts train, and with which learning rates.

They need the arguments alone, so that a rate for a part that is frozen is refused before a model is loaded.
"""

from safetensors import safe_open
from transformers import TrainingArguments
from transformers.utils import cached_file

from jnana.training.optimizers import check_rates
from jnana.training.stages import part_of

from .arguments import DataArguments, LoraArguments, PartArguments


def check_parts(
    args: PartArguments,
    training_args: TrainingArguments,
    data_args: DataArguments,
    lora_args: LoraArguments | None = None,
    adapter: str | None = None,
) -> None:
    """Check the options of the vision tower and the learning rates of parts.

    Args:
        args (`PartArguments`): The options.
        training_args (`TrainingArguments`): The schedule.
        data_args (`DataArguments`): `feature_cache`.
        lora_args (`LoraArguments`, *optional*): Of run_sft.
        adapter (`str`, *optional*): Directory or Hub id of the adapter that is continued, if one is.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    check_rates(args, training_args)
    targets = lora_args.lora_vision_target_modules if lora_args is not None else None
    if not args.freeze_vision_tower and targets:
        raise ValueError(
            f"freeze_vision_tower is false, but lora_vision_target_modules is {targets}: the tower trains whole or "
            "by an adapter; leave one of them out"
        )
    whole, adapted = not args.freeze_vision_tower, bool(targets)
    if adapter is not None:
        held_whole, adapted = tower_of_adapter(adapter)
        if whole and not held_whole:
            raise ValueError(
                f"freeze_vision_tower is false, but the adapter {adapter!r} to continue was trained on a frozen tower "
                "and does not hold one; leave it out, or merge that adapter (run_merge.py) and start from the merged "
                "checkpoint"
            )
        whole = held_whole
    if whole or adapted:
        check_no_feature_cache(data_args, "freeze_vision_tower: false" if whole else "lora_vision_target_modules")
        return
    for name in ("vision_learning_rate", "vision_lr_scheduler_type"):
        value = getattr(args, name)
        if value is not None:
            if adapter is not None:
                reason = f"the adapter {adapter!r} to continue was trained on a frozen vision tower; leave it out"
            else:
                ways = "freeze_vision_tower: false" + (", or lora_vision_target_modules" if lora_args else "")
                reason = f"the vision tower is frozen; leave it out, or let the tower train ({ways})"
            raise ValueError(f"{name} is {value!r}, but {reason}")


def tower_of_adapter(adapter: str) -> tuple[bool, bool]:
    """Whether an adapter holds a vision tower that trained whole, and whether it has LoRA layers on the tower.

    The names of its tensors say it; PEFT may shorten the names in `adapter_config.json`.
    """
    with safe_open(cached_file(adapter, "adapter_model.safetensors"), framework="pt") as tensors:
        names = [name for name in tensors.keys() if part_of(name) == "vision_tower"]
    adapted = any(".lora_A." in name for name in names)
    return bool(names) and not adapted, adapted


def check_no_feature_cache(args: DataArguments, option: str) -> None:
    """Refuse stored features of a tower that trains."""
    if args.feature_cache is not None:
        raise ValueError(
            f"feature_cache is {args.feature_cache!r}, but the vision tower trains ({option}), so that its features "
            "change with every step; leave one of them out"
        )
