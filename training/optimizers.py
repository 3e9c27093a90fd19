"""The optimizers and learning rates that the stock Trainer has no option for, through its official hooks.

Two things are added: learning rates and schedules for single parts of the model, and Muon. Muon (Keller Jordan, 2024)
steps a matrix by its orthogonalised momentum and, on small models, gets further in the same number of steps. It is
meant for the hidden 2-D weights only: embeddings, heads, biases and norms stay with AdamW.
"""

import logging
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import Trainer, TrainerCallback, TrainingArguments

from .options.arguments import PartArguments
from .stages import JOINING_PARTS, part_of


logger = logging.getLogger(__name__)

# Schedules that follow the loss, not the step: one scheduler adapts the rates of all groups.
SCHEDULES_OF_THE_LOSS = ("reduce_lr_on_plateau", "greedy")


class BatchedMuon(Muon):
    """`torch.optim.Muon` that orthogonalises all matrices of one shape together, in the gradients' own dtype.

    Stock Muon takes them one by one, in bfloat16, which is slow on CPUs without bfloat16 instructions: 1.04 s a step
    against 0.08 s here, for 24 matrices of a small CLIP on one core. Options and state are the stock ones.
    """

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            same_shape: dict[tuple, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    key = (tuple(sorted(parameter.shape)), parameter.grad.dtype, parameter.device)
                    same_shape.setdefault(key, []).append(parameter)
            for parameters in same_shape.values():
                self._step_same_shape(parameters, group)
        return loss

    def _step_same_shape(self, parameters: list[nn.Parameter], group: dict) -> None:
        """Step matrices of one shape, up to transposition."""
        updates = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter.grad)
            state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
            update = parameter.grad.lerp(state["momentum_buffer"], group["momentum"])
            updates.append(update.mT if update.size(0) > update.size(1) else update)
        stack = torch.stack(updates)  # => [matrices, rows <= columns, columns]
        stack = stack / stack.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
        a, b, c = group["ns_coefficients"]
        for _ in range(group["ns_steps"]):
            gram = stack @ stack.mT
            stack = a * stack + (b * gram + c * gram @ gram) @ stack
        for parameter, update in zip(parameters, stack, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            rate = group["lr"] * 0.2 * max(parameter.shape) ** 0.5  # as adjust_lr_fn="match_rms_adamw"
            parameter.add_(update.mT if parameter.size(0) > parameter.size(1) else update, alpha=-rate)


class MuonWithAdamW(Optimizer):
    """Runs [`BatchedMuon`] and `torch.optim.AdamW` over one list of parameter groups.

    The two share this optimizer's groups and state, so schedulers, `state_dict` and resuming see a single optimizer.

    Args:
        groups (`list[dict]`): Parameter groups, each with `"muon": bool`.
        lr (`float`): For both; Muon's update is scaled to AdamW's root mean square, so one rate serves both.
        betas, eps: AdamW's.
        momentum (`float`, defaults to 0.95): Muon's.
    """

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float, momentum: float = 0.95):
        super().__init__(groups, {"lr": lr})
        own = {"lr": lr, "weight_decay": 0.0}
        self.parts: list[Optimizer] = []
        for muon in (True, False):
            selected = [group for group in self.param_groups if group["muon"] is muon]
            if not selected:
                continue
            if muon:
                part = BatchedMuon(selected, **own, momentum=momentum, adjust_lr_fn="match_rms_adamw")
            else:
                part = AdamW(selected, **own, betas=betas, eps=eps)
            self.parts.append(part)
        self.share()

    def share(self) -> None:
        """Let the parts work on this optimizer's own groups and state."""
        for part in self.parts:
            muon = isinstance(part, Muon)
            for group in self.param_groups:
                if group["muon"] is muon:
                    for name, value in part.defaults.items():
                        group.setdefault(name, value)
            part.param_groups = [group for group in self.param_groups if group["muon"] is muon]
            part.state = self.state

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.share()


def muon_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in three groups: hidden matrices, other matrices, vectors (which never decay)."""
    # the language model's embedding, its head, the positions of a tower, and a resampler's latents
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if model.get_output_embeddings() is not None:
        embeddings.append(model.get_output_embeddings())
    outer = {id(module.weight) for module in embeddings}
    outer |= {id(parameter) for name, parameter in model.named_parameters() if name.endswith(".latents")}
    hidden, other, vectors = [], [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim == 2
            group = hidden if matrix and id(parameter) not in outer else other if matrix else vectors
            group.append(parameter)
    groups = [
        {"params": hidden, "muon": True, "weight_decay": weight_decay},
        {"params": other, "muon": False, "weight_decay": weight_decay},
        {"params": vectors, "muon": False, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def stock_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The two groups that the Trainer itself makes of the trainable parameters: with weight decay and without."""
    # The method reads nothing of the Trainer, which does not exist yet: its optimizer is chosen before it is made.
    decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in named if name in decaying], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name not in decaying], "weight_decay": 0.0},
    ]


def split_by_part(groups: list[dict], model: nn.Module, rates: PartArguments, learning_rate: float) -> list[dict]:
    """Split parameter groups so that each holds one part of the model, with the part's learning rate.

    Args:
        groups (`list[dict]`): Parameter groups.
        model (`nn.Module`): The model that the parameters belong to.
        rates (`PartArguments`): The parts' own rates.
        learning_rate (`float`): Of the parts without a rate of their own.

    Returns:
        `list[dict]`: Groups with `part` and `lr`, none of them empty. The language model's come first, then the
        projector's, as the Trainer logs the first group's rate.

    Raises:
        ValueError: if a part was given a rate or a schedule and nothing in it trains.
    """
    parts = {id(parameter): part_of(name) for name, parameter in model.named_parameters()}
    # The blocks of cross-attention start at random like the projector, and train with its rate.
    parts = {key: "multi_modal_projector" if part in JOINING_PARTS else part for key, part in parts.items()}
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
                "leave them out, or let it train (freeze_vision_tower: false, or lora_vision_target_modules)"
            )
    order = ["language_model", *rates.parts]
    return sorted(split.values(), key=lambda group: order.index(group["part"]))


def describe_rates(groups: list[dict], rates: PartArguments, schedule: str) -> str:
    """The table of learning rates that is logged before training."""
    lines = ["learning rates"]
    for part, lr in dict.fromkeys((group["part"], group["lr"]) for group in groups):
        lines.append(f"  {part:<24}{lr:>12g}  {rates.schedule_of(part) or schedule}")
    return "\n".join(lines)


def schedule_factor(name: str, warmup_steps: int, num_steps: int) -> Callable[[int], float]:
    """The function from the step to the factor on the learning rate, as in transformers' schedule of that name.

    Args:
        name (`str`): `constant`, `constant_with_warmup`, `linear` or `cosine`.
        warmup_steps (`int`): Steps in which the rate rises from 0, except with `constant`.
        num_steps (`int`): Steps of the run.
    """

    def factor(step: int) -> float:
        if name == "constant":
            return 1.0
        if step < warmup_steps:
            return step / max(1, warmup_steps)
        decay_steps = max(1, num_steps - warmup_steps)
        if name == "linear":
            return max(0.0, (num_steps - step) / decay_steps)
        if name == "cosine":
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup_steps) / decay_steps))))
        return 1.0

    return factor


class PartScheduleCallback(TrainerCallback):
    """Gives parts of the model their own schedules, and logs every part's learning rate.

    The Trainer builds one `LambdaLR` over all groups, with one function for each. Before the first step, and after a
    resume has restored the scheduler's step, the function of such a part is replaced by that of its own schedule.
    """

    def __init__(self, rates: PartArguments):
        self.rates = rates
        self.current: dict[str, float] = {}  # the rates of the step in progress

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        self.scheduler = lr_scheduler
        for index, group in enumerate(lr_scheduler.optimizer.param_groups):
            name = self.rates.schedule_of(group["part"])
            if name is not None:
                warmup_steps = args.get_warmup_steps(state.max_steps)
                lr_scheduler.lr_lambdas[index] = schedule_factor(name, warmup_steps, state.max_steps)
            group["lr"] = lr_scheduler.base_lrs[index] * lr_scheduler.lr_lambdas[index](lr_scheduler.last_epoch)
        lr_scheduler._last_lr = [group["lr"] for group in lr_scheduler.optimizer.param_groups]

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        groups = self.scheduler.optimizer.param_groups
        self.current = {f"{g['part']}_learning_rate": g["lr"] for g in groups if g["part"] != "language_model"}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            state.log_history[-1].update(self.current)


def check_rates(rates: PartArguments, args: TrainingArguments) -> None:
    """Refuse negative rates, and part schedules beside a main schedule that depends on the loss.

    Raises:
        ValueError: naming the field, its value and the remedy.
    """
    for name in ("projector_learning_rate", "vision_learning_rate"):
        value = getattr(rates, name)
        if value is not None and value < 0:
            raise ValueError(f"{name} is {value}; it must be at least 0, or be left out for learning_rate")
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    if rates.given and schedule in SCHEDULES_OF_THE_LOSS:
        raise ValueError(
            f"lr_scheduler_type {schedule!r} follows the loss, so parts cannot have rates or schedules beside it; "
            "take cosine, linear or constant"
        )


def trainer_optimizer(
    name: str, model: nn.Module, args: TrainingArguments, rates: PartArguments | None = None
) -> tuple[type[Optimizer], dict] | None:
    """The value for `Trainer(optimizer_cls_and_kwargs=...)`; `None` where the Trainer's own `optim` suffices.

    Args:
        name (`str`): `stock` or `muon`.
        model (`nn.Module`): The trained parameters have `requires_grad`.
        args (`TrainingArguments`): Learning rate, weight decay, `optim`.
        rates (`PartArguments`, *optional*): Rates and schedules of single parts.

    Raises:
        ValueError: if a part has a rate and does not train, or `optim` makes parameter groups of its own.
    """
    by_part = rates is not None and rates.given
    if name == "muon":
        kwargs = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        optimizer, groups = MuonWithAdamW, muon_groups(model, args.weight_decay)
    elif not by_part:
        return None
    else:
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if not isinstance(optimizer, type) or {"params", "model", "optimizer_dict"} & set(kwargs):
            raise ValueError(
                f"optim {args.optim!r} makes parameter groups of its own, so parts cannot have their own learning "
                "rates; take adamw_torch or adamw_bnb_8bit, or leave the parts' rates out"
            )
        groups = stock_groups(model, args.weight_decay)
    if by_part:
        groups = split_by_part(groups, model, rates, args.learning_rate)
        logger.info(describe_rates(groups, rates, getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)))
    return optimizer, {**kwargs, "params": groups}
