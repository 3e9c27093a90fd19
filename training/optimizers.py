"""Muon for the hidden matrices, AdamW for everything else, as one optimizer for the Trainer's official hook.

Muon (Keller Jordan, 2024) steps a matrix by its orthogonalised momentum and, on small models, gets further in the same
number of steps. It is meant for hidden 2-D weights only: embeddings, heads, biases and norms stay with AdamW.
"""

import logging

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import Trainer, TrainingArguments

from .arguments import RateArguments
from .learning_rates import describe_rates, split_by_part, stock_groups


logger = logging.getLogger(__name__)


class TogetherMuon(Muon):
    """`torch.optim.Muon` that orthogonalises all matrices of one shape together, in the gradients' own dtype.

    Stock Muon takes them one by one, in bfloat16, which CPUs without bfloat16 units only imitate: 1.04 s a step
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
                self._step_together(parameters, group)
        return loss

    def _step_together(self, parameters: list[nn.Parameter], group: dict) -> None:
        updates = []
        for parameter in parameters:
            buffers = self.state[parameter]
            if "momentum_buffer" not in buffers:
                buffers["momentum_buffer"] = torch.zeros_like(parameter.grad)
            buffers["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
            update = parameter.grad.lerp(buffers["momentum_buffer"], group["momentum"])
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
    """Runs `TogetherMuon` and `torch.optim.AdamW` over one list of parameter groups.

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
            mine = [group for group in self.param_groups if group["muon"] is muon]
            if not mine:
                continue
            if muon:
                part = TogetherMuon(mine, **own, momentum=momentum, adjust_lr_fn="match_rms_adamw")
            else:
                part = AdamW(mine, **own, betas=betas, eps=eps)
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
    outer = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
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


def trainer_optimizer(
    name: str, model: nn.Module, args: TrainingArguments, rates: RateArguments | None = None
) -> tuple[type[Optimizer], dict] | None:
    """What to hand to `Trainer(optimizer_cls_and_kwargs=...)`; `None` leaves all to the Trainer and its `optim`.

    Args:
        name (`str`): `stock` or `muon`.
        model (`nn.Module`): With what trains marked by `requires_grad`.
        args (`TrainingArguments`): Learning rate, weight decay, `optim`.
        rates (`RateArguments`, *optional*): Parts with a rate or schedule of their own.

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
