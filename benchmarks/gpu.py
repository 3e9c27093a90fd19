"""Everything that is to be measured on a GPU, in one command: under nine minutes on an H100 or H200, no network.

    make bench-gpu                              # writes benchmarks/results/gpu_<card>.jsonl
    python -m benchmarks.gpu --minutes 5        # parts that would begin later than that are left out, by name
    python -m benchmarks.gpu --tiny             # a test run on a CPU; what needs CUDA is skipped, by name

Full Phi-2 and CLIP from random weights. In this order:

    attention      which attention packed rows get on this card, and why
    nf4-bf16       tokens/s of the LoRA recipe on 4-bit and on 16-bit weights
    qlora-memory   peak memory of the QLoRA recipe, beside its forecast
    <case>         throughput beside stock LLaVA with the stock Trainer, and the share of the card's peak FLOP/s (MFU)

Each line is appended to the file as soon as it is measured, so a run that is cut off has left what it measured. A part
that fails is a line too; the others still run, and the exit code is 1.
"""

import argparse
import functools
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import release_memory
from torch import nn

from benchmarks import sft_memory, train_throughput
from benchmarks.machine import describe_machine, synchronize
from benchmarks.train_throughput import plan_step
from benchmarks.workloads import SCALES, Scale, make_images, make_rows
from jnana.modeling.packed_kernels_jnana import varlen_problem
from jnana.processing.data import JnanaCollator
from jnana.training.loading import load_model
from jnana.training.options.arguments import LoraArguments
from jnana.training.stages import apply_stage


SHAPES = ("align-49", "align-576", "sft-49", "sft-576")
TINY_SHAPES = ("align-4", "align-16", "sft-4", "sft-16")
RATE_STEPS = 6


class Skipped(Exception):
    """A part that can't run here; the message says why."""


class Log:
    """
    Appends lines to a file and prints them.

    Args:
        file (`Path`): JSON Lines; begun anew.
    """

    def __init__(self, file: Path):
        self.file, self.begun = file, time.perf_counter()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("", encoding="utf-8")

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begun

    def write(self, part: str, **values: Any) -> None:
        """Append one line, with the seconds since the start of the run."""
        line = {"part": part, **values, "at_seconds": round(self.seconds, 1)}
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        print(", ".join(f"{key} {value}" for key, value in line.items() if not isinstance(value, dict)), flush=True)


def measure_attention(log: Log, scale: Scale, device: torch.device, folder: Path) -> None:
    """The probe that a run makes before it trains packed rows: whether torch's `varlen_attn` is right here."""
    if device.type != "cuda":
        raise Skipped("needs CUDA; a CPU has one attention for packed rows")
    _, jnana = train_throughput.make_models(
        scale, 49, train_throughput.make_processor(scale, 49), torch.device("meta")
    )
    config = jnana.config.text_config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    problem = varlen_problem(device, heads, kv_heads, head_dim, has_window=False)
    log.write("attention", varlen_attn=problem is None, reason=problem or "equal to the pieces on a CPU")


def measure_rate(model: nn.Module, batch: dict[str, Any], device: torch.device, dtype: torch.dtype) -> float:
    """Tokens without padding a second: forward, backward and AdamW, after two steps to warm up."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-5)
    begun = 0.0
    for number in range(2 + RATE_STEPS):
        if number == 2:
            synchronize(device)
            begun = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    synchronize(device)
    return RATE_STEPS * int((batch["segment_ids"] >= 0).sum()) / (time.perf_counter() - begun)


def measure_quantization(log: Log, scale: Scale, device: torch.device, folder: Path) -> None:
    """Tokens/s of LoRA on nf4 and on unquantised weights, on the packed rows of the sft workload."""
    tokens = min(scale.text)
    base = folder / "base"
    sft_memory.save_base(base, scale, tokens, device)
    rows = make_rows("sft", make_images(folder / "images", scale.images_per_step[tokens]))
    rates = {}
    name = str(scale.dtype).removeprefix("torch.")
    for method in ("nf4", "none"):
        model, processor = load_model(str(base), dtype=scale.dtype, quantization=method, device_map={"": device})
        model = apply_stage(model, "sft", LoraArguments(lora_r=scale.lora_r), "shared_image").train()
        planned = plan_step(rows, processor, scale.max_row_tokens[tokens])
        batch = JnanaCollator(processor, packing="shared_image")(planned)
        batch = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        rates[method] = measure_rate(model, batch, device, scale.dtype)
        weights = "nf4" if method == "nf4" else name
        log.write("nf4-bf16", weights=weights, tokens_per_second=round(rates[method], 1))
        del model, batch
        release_memory()
    log.write("nf4-bf16", nf4_over_unquantised=round(rates["nf4"] / rates["none"], 3))


def measure_memory(log: Log, scale: Scale, device: torch.device, folder: Path) -> None:
    """The QLoRA recipe's peak, as benchmarks/sft_memory.py measures it."""
    size = "tiny" if scale is SCALES["tiny"] else "phi2"
    args = sft_memory.parse(["--scale", size, "--steps", "4", "--images", "24", "--folder", str(folder)])
    result = sft_memory.measure(args, folder / "memory", device)
    for phase, measured in result["phases"].items():
        log.write("qlora-memory", phase=phase, **measured)
        if device.type == "cuda" and measured.get("forecast"):  # on a CPU the peak is the whole process's growth
            expected = measured["forecast"]["peak_gb"]
            ratio = round(expected / measured["peak_gb"], 3)
            log.write("qlora-memory", phase=phase, forecast_gb=expected, forecast_over_measured=ratio)


def measure_case(case: str, log: Log, scale: Scale, device: torch.device, folder: Path) -> None:
    """One shape beside stock LLaVA: two rounds of three steps, or one of two at tiny size."""
    size, rounds, steps = ("tiny", "1", "2") if scale is SCALES["tiny"] else ("phi2", "2", "3")
    options = ["--scale", size, "--cases", case, "--rounds", rounds, "--steps", steps, "--device", str(device)]
    args = train_throughput.parse(options)
    (result,) = train_throughput.measure(args)
    (found,) = result["cases"]
    for arm, values in found["arms"].items():
        ratio = found["ratios"].get(f"{arm}/llava", {"median": 1.0})["median"]
        log.write(
            case,
            arm=arm,
            times_llava=round(ratio, 3),
            samples_per_second=round(values["samples_per_second"]["median"], 3),
            supervised_tokens_per_second=round(values["supervised_tokens_per_second"]["median"], 1),
            mfu=round(values["share_of_peak_flops"]["median"], 4),
            peak_memory_gb=None if values["peak_memory_bytes"] is None else values["peak_memory_bytes"] / 1e9,
        )
    log.write(case, peak_flops_by_matmul=result["machine"]["peak_flops_by_matmul"])


def parts_of_run(scale: Scale) -> dict[str, Callable[..., None]]:
    """All parts by name, in their order."""
    shapes = TINY_SHAPES if scale is SCALES["tiny"] else SHAPES
    cases = {case: functools.partial(measure_case, case) for case in shapes}
    return {
        "attention": measure_attention,
        "nf4-bf16": measure_quantization,
        **dict(list(cases.items())[:2]),
        "qlora-memory": measure_memory,
        **dict(list(cases.items())[2:]),
    }


def run(log: Log, scale: Scale, device: torch.device, minutes: float) -> bool:
    """Run all parts; returns whether none failed."""
    good = True
    log.write("machine", **describe_machine(device))
    for name, part in parts_of_run(scale).items():
        if log.seconds > 60 * minutes:
            log.write(name, skipped=f"{minutes:g} minutes are over")
            continue
        begun = log.seconds
        try:
            with tempfile.TemporaryDirectory(prefix="jnana-") as folder:
                part(log, scale, device, Path(folder))
            log.write(name, done_in_seconds=round(log.seconds - begun, 1))
        except Skipped as reason:
            log.write(name, skipped=str(reason))
        except Exception as error:  # the other parts can still be measured
            good = False
            log.write(name, failed=f"{type(error).__name__}: {error}")
        release_memory()
    return good


def main(argv: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models, on a CPU")
    parser.add_argument("--minutes", type=float, default=7.5, help="no part begins later than this")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu_<card>.jsonl")
    args = parser.parse_args(argv)
    if not args.tiny and not torch.cuda.is_available():
        sys.exit("There is no CUDA GPU here. Run this on a machine with one, or make a test run with --tiny.")
    device = torch.device("cpu" if args.tiny else "cuda")
    card = "tiny" if args.tiny else torch.cuda.get_device_name(device).replace(" ", "_")
    for name in ("jnana.training.stages", "jnana.training.feature_cache", "PIL"):
        logging.getLogger(name).setLevel(logging.WARNING)
    file = args.output or Path(__file__).parent / "results" / f"gpu_{card}.jsonl"
    if not run(Log(file), SCALES["tiny" if args.tiny else "phi2"], device, args.minutes):
        sys.exit(1)
    return file


if __name__ == "__main__":
    main()
