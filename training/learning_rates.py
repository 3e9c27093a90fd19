"""A learning rate and a schedule of its own for each part of the model, through the stock Trainer's hooks.

The optimizer's parameters come in one group a part (`optimizer_cls_and_kwargs`), and a callback gives a group another
schedule when training begins. `learning_rate` and `lr_scheduler_type` hold for the language model and for whatever has
none of its own.
"""

import logging

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainingArguments, get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from .arguments import RateArguments
from .stages import part_of


logger = logging.getLogger(__name__)

# As Trainer.get_decay_parameter_names: vectors of a norm and biases never decay.
NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def stock_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The two groups that the Trainer itself would make of the trainable parameters."""
    decaying = set(get_parameter_names(model, [nn.LayerNorm], NO_DECAY))
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in named if name in decaying], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name not in decaying], "weight_decay": 0.0},
    ]


def split_by_part(groups: list[dict], model: nn.Module, rates: RateArguments, learning_rate: float) -> list[dict]:
    """Split parameter groups so that each holds one part, with the part's learning rate; empty ones are left out.

    Args:
        groups (`list[dict]`): Parameter groups.
        model (`nn.Module`): Whose parameters they are.
        rates (`RateArguments`): The parts' own rates.
        learning_rate (`float`): Of the parts without one.

    Returns:
        `list[dict]`: Groups with `part` and `lr`, the language model's first, whose rate is the one the Trainer logs.

    Raises:
        ValueError: if a part was given a rate or a schedule and nothing in it trains.
    """
    parts = {id(parameter): part_of(name) for name, parameter in model.named_parameters()}
    split: dict[tuple[str, int], dict] = {}
    for number, group in enumerate(groups):
        for parameter in group["params"]:
            part = parts[id(parameter)]
            key = (part if part in rates.parts else "language_model", number)
            lr = rates.rate_of(part)
            new = {**group, "params": [], "part": key[0], "lr": learning_rate if lr is None else lr}
            split.setdefault(key, new)["params"].append(parameter)
    for part, (rate, schedule) in rates.parts.items():
        if (rate is not None or schedule is not None) and part not in {present for present, _ in split}:
            raise ValueError(
                f"{part} has a learning rate ({rate}) or schedule ({schedule}) of its own, but nothing in it trains; "
                "leave them out, or let it train (lora_vision_target_modules)"
            )
    ordered = sorted(split.items(), key=lambda item: item[0][0] != "language_model")
    return [group for _, group in ordered]


def describe_rates(groups: list[dict], rates: RateArguments, schedule: str) -> str:
    """The table printed before training."""
    lines = ["learning rates"]
    for part, lr in dict.fromkeys((group["part"], group["lr"]) for group in groups):
        lines.append(f"  {part:<24}{lr:>12g}  {rates.schedule_of(part) or schedule}")
    return "\n".join(lines)


class PartScheduleCallback(TrainerCallback):
    """Gives parts a schedule of their own, and writes every part's rate into the log.

    The Trainer builds one `LambdaLR` over all groups, with one function a group; here a group's is exchanged for that
    of another schedule, before the first step and after a resume has restored the scheduler's place.
    """

    def __init__(self, rates: RateArguments):
        self.rates = rates
        self.current: dict[str, float] = {}  # the rates of the step being taken

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        self.scheduler = lr_scheduler
        for index, group in enumerate(lr_scheduler.optimizer.param_groups):
            name = self.rates.schedule_of(group["part"])
            if name is not None:
                lr_scheduler.lr_lambdas[index] = schedule_factor(name, args, state.max_steps)
            group["lr"] = lr_scheduler.base_lrs[index] * lr_scheduler.lr_lambdas[index](lr_scheduler.last_epoch)
        lr_scheduler._last_lr = [group["lr"] for group in lr_scheduler.optimizer.param_groups]

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        groups = self.scheduler.optimizer.param_groups
        self.current = {f"{g['part']}_learning_rate": g["lr"] for g in groups if g["part"] != "language_model"}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            state.log_history[-1].update(self.current)


def schedule_factor(name: str, args: TrainingArguments, steps: int):
    """The function from step to a factor on the learning rate, as transformers' `get_scheduler` makes it."""
    nobody = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(name, nobody, args.get_warmup_steps(steps), steps)
    return scheduler.lr_lambdas[0]


def check_rates(rates: RateArguments, args: TrainingArguments) -> None:
    """Refuse rates that are none, and part schedules beside a main schedule that is no function of the step.

    Raises:
        ValueError: naming the field, its value and the remedy.
    """
    for name in ("projector_learning_rate", "vision_learning_rate"):
        value = getattr(rates, name)
        if value is not None and value < 0:
            raise ValueError(f"{name} is {value}; it must be at least 0, or be left out for learning_rate")
    if not rates.given:
        return
    nobody = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(
        args.lr_scheduler_type, nobody, 1, 10, scheduler_specific_kwargs=args.lr_scheduler_kwargs
    )
    if not isinstance(scheduler, LambdaLR):
        name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise ValueError(
            f"lr_scheduler_type {name!r} is no function of the step, so parts cannot have rates or schedules beside "
            "it; take cosine, linear or constant"
        )
