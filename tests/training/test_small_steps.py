"""At LLaVA-1.6's rate for the tower, 2e-6, steps are lost in bfloat16 weights and kept in float32 weights."""

import copy

import torch
from torch import nn

from jnana.training.stages import apply_stage, part_of
from tests.training.test_stages import batch, pair


STEPS = 20
RATE = 2e-6


def with_small_weights(model: nn.Module) -> nn.Module:
    """The tower's matrices scaled to a root mean square of 0.02: the loss in rounding depends on the weights' size."""
    for name, parameter in model.named_parameters():
        if part_of(name) == "vision_tower" and parameter.ndim > 1:
            with torch.no_grad():
                parameter.mul_(0.02 / parameter.square().mean().sqrt())
    return model


def share_changed(model: nn.Module, steps: int = STEPS) -> tuple[float, float]:
    """Share of the tower's trained values that AdamW has changed after some steps under autocast, and the share that
    is left of it after one rounding to bfloat16 at the end."""
    tower = [p for name, p in model.named_parameters() if part_of(name) == "vision_tower" and p.requires_grad]
    before = [parameter.detach().clone() for parameter in tower]
    optimizer = torch.optim.AdamW(tower, lr=RATE, weight_decay=0.0)
    model.train()
    generator = torch.Generator().manual_seed(0)
    inputs = batch()
    for _ in range(steps):
        inputs["pixel_values"] = torch.randn(2, 3, 24, 24, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    pairs = list(zip(tower, before, strict=True))
    changed = sum((parameter != old).sum().item() for parameter, old in pairs)
    left = sum((parameter.bfloat16() != old.bfloat16()).sum().item() for parameter, old in pairs)
    count = sum(parameter.numel() for parameter in tower)
    return changed / count, left / count


def test_bfloat16_weights_lose_the_steps_that_float32_weights_keep():
    stored = with_small_weights(pair(layer=-2)).to(torch.bfloat16)
    ours = apply_stage(copy.deepcopy(stored), "sft", freeze_vision_tower=False)
    changed, left = share_changed(ours)
    assert changed > 0.99 and 0.12 < left < 0.2
    # the negative control: the same weights, trained in the dtype that they were loaded in
    pure = apply_stage(copy.deepcopy(stored), "sft", freeze_vision_tower=False)
    for name, parameter in pure.named_parameters():
        if part_of(name) == "vision_tower":
            parameter.data = parameter.data.to(torch.bfloat16)
    assert share_changed(pure)[0] < 0.08
