"""Describes the machine of a measurement, measures peak memory, and writes results."""

import ctypes
import datetime
import gc
import json
import os
import platform
import resource
from pathlib import Path
from typing import Any

import torch
import transformers


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, GPU, threads, load and versions.

    Args:
        device (`torch.device`): Device of the models.
    """
    described = {
        "date": datetime.date.today().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["gpu"] = properties.name
        described["gpu_memory_gb"] = round(properties.total_memory / 1e9, 1)
        described["cuda"] = torch.version.cuda
    return described


def cpu_name() -> str:
    """The processor's name as the kernel reports it."""
    file = Path("/proc/cpuinfo")
    if file.is_file():
        for line in file.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work. Call it before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def write_result(result: dict[str, Any], file: Path) -> None:
    """Write a result as JSON; creates the directory."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


class PeakMemory:
    """
    Peak memory of a block of code in bytes, minus the memory held at its start.

    On a GPU it counts torch's allocations; on Linux without a GPU the resident memory of the process, whose high-water
    mark the kernel can reset. Freed memory is returned to the system first, because reused memory would not be
    counted. The value is `None` on other systems.

    Args:
        device (`torch.device`): Device of the model.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            return_freed_memory()
            try:
                Path("/proc/self/clear_refs").write_text("5")
                self.resettable = True
            except OSError:
                self.resettable = False
            self.before = _status("VmRSS")
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before
        elif self.resettable:
            self.bytes = max(_status("VmHWM") - self.before, 0)


def return_freed_memory() -> None:
    """Return freed memory to the system, if the C library supports it (glibc)."""
    gc.collect()
    if platform.system() == "Linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _status(field: str) -> int:
    file = Path("/proc/self/status")
    if not file.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in file.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
