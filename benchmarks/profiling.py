"""Profiles one training step (collator, forward, backward) with torch's profiler."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.autograd import DeviceType


# Parts of a step, and substrings of the names of their operations. The first match counts; all others are "rest".
PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "convolution"),
    "attention": ("scaled_dot_product", "flash", "flex", "aten::_softmax", "KeyRanges", "varlen"),
    "loss": ("log_softmax", "nll_loss", "cross_entropy"),
    "collator": ("collator",),
}


def profile_step(
    model: nn.Module, make_batch: Callable[[], dict[str, torch.Tensor]], device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, float], str]:
    """
    Profile one step, after one unprofiled step.

    Args:
        model (`nn.Module`): In training mode, with a `loss` in its output.
        make_batch (`Callable`): Reads and collates one batch.
        device (`torch.device`): Where the model is.
        dtype (`torch.dtype`): Dtype of the computation; autocast if it is not float32.

    Returns:
        `tuple[dict[str, float], str]`: The share of the time (on a GPU, of the GPU's time) of each of [`PARTS`] and of
            the rest; and the profiler's table.
    """

    def step() -> None:
        with torch.profiler.record_function("collator"):
            batch = make_batch()
        batch = send_to_device(batch, device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            with torch.profiler.record_function("forward"):
                loss = model(**batch).loss
            with torch.profiler.record_function("backward"):
                loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    step()  # warm-up
    with torch.profiler.profile(activities=activities) as profile:
        step()
    on = "device" if device.type == "cuda" else "cpu"
    averages = profile.key_averages()
    table = averages.table(sort_by=f"self_{on}_time_total", row_limit=25, max_name_column_width=60)
    return shares(averages, f"self_{on}_time_total"), table


def shares(averages: Any, field: str) -> dict[str, float]:
    """The share of each part in the sum of the profiler's events."""
    found = dict.fromkeys([*PARTS, "rest"], 0.0)
    for event in averages:
        if event.device_type != DeviceType.CPU:  # kernels are counted with the operations that launched them
            continue
        part = next((part for part, names in PARTS.items() if any(name in event.key for name in names)), "rest")
        found[part] += getattr(event, field)
    total = sum(found.values()) or 1.0
    return {part: time / total for part, time in found.items()}
