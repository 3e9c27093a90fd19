"""The highest rate of floating-point operations of the chip that trains: the denominator of MFU.

For the GPUs of the table it is the rate that NVIDIA states for dense 16-bit matrix products with 32-bit accumulation.
(Datasheets print twice as much, for 2:4 sparse matrices, which training does not use.) For everything else, CPUs,
other GPUs and float32, the product of two large matrices is timed once.
"""

import re
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ChipPeak:
    """
    Args:
        flops (`float`): Operations a second.
        source (`str`): Name of the chip, and where the rate is from.
    """

    flops: float
    source: str

    def __str__(self) -> str:
        value = f"{self.flops / 1e12:,.0f} T" if self.flops >= 1e13 else f"{self.flops / 1e9:,.0f} G"
        return f"{value}FLOP/s ({self.source})"


# (pattern in the name that the driver gives, TFLOP/s, dtypes, source)
HALF = (torch.bfloat16, torch.float16)
DATASHEETS: list[tuple[str, float, tuple[torch.dtype, ...], str]] = [
    (r"B200\b", 2250, HALF, "NVIDIA HGX B200 datasheet"),
    (r"H200 NVL\b", 835.5, HALF, "NVIDIA H200 datasheet, NVL"),
    (r"H200\b", 989.5, HALF, "NVIDIA H200 datasheet, SXM"),
    (r"H100 NVL\b", 835.5, HALF, "NVIDIA H100 datasheet, NVL"),
    (r"H100 PCIe\b", 756.5, HALF, "NVIDIA H100 PCIe datasheet"),
    (r"H100\b", 989.5, HALF, "NVIDIA H100 datasheet, SXM"),
    (r"A100\b", 312, HALF, "NVIDIA A100 datasheet"),
    (r"A40\b", 149.7, HALF, "NVIDIA A40 datasheet"),
    (r"A30\b", 165, HALF, "NVIDIA A30 datasheet"),
    (r"A10\b", 125, HALF, "NVIDIA A10 datasheet"),
    (r"L40S\b", 362, HALF, "NVIDIA L40S datasheet"),
    (r"L4\b", 121, HALF, "NVIDIA L4 datasheet"),
    (r"GeForce RTX 4090$", 165.2, HALF, "NVIDIA Ada GPU architecture whitepaper"),
    (r"GeForce RTX 3090$", 71, HALF, "NVIDIA GA102 architecture whitepaper"),
    (r"V100-SXM2\b", 125, (torch.float16,), "NVIDIA V100 datasheet, SXM2"),
    (r"V100-PCIE\b", 112, (torch.float16,), "NVIDIA V100 datasheet, PCIe"),
    (r"T4\b", 65, (torch.float16,), "NVIDIA T4 datasheet"),
]


def chip_peak(device: torch.device, dtype: torch.dtype) -> ChipPeak:
    """
    The rate of one device: from a datasheet, or else measured, which takes a fraction of a second.

    Args:
        device (`torch.device`): The device that trains.
        dtype (`torch.dtype`): Of its matrix products.
    """
    name = device_name(device)
    return stated_peak(name, dtype) or ChipPeak(measured_peak(device, dtype), f"{name}, measured by a matrix product")


def device_name(device: torch.device) -> str:
    """The name that the driver gives a GPU; of other devices the kind, as `CPU`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def stated_peak(name: str, dtype: torch.dtype) -> ChipPeak | None:
    """The rate in the datasheet of the chip with that name, or `None`."""
    for pattern, tera, dtypes, source in DATASHEETS:
        if re.search(rf"\b{pattern}", name):
            return ChipPeak(tera * 1e12, f"{name}, {source}") if dtype in dtypes else None
    return None


def measured_peak(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Operations a second of the product of two square matrices, the fastest of five after one to warm up.

    Args:
        device (`torch.device`), dtype (`torch.dtype`): As for [`chip_peak`].
        size (`int`, *optional*): Rows of the matrices; default: 1,024 on a CPU, 8,192 elsewhere.
    """
    size = size or (1024 if device.type == "cpu" else 8192)
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay as they are
    first, second = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    fastest = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(first, second).sum().item()  # reading the sum waits for the device
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest
