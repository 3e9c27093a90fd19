"""Peak memory and time of the loss over the head, fused in chunks and plain.

    python -m benchmarks.loss_memory                              # one CPU thread, 8 GB of memory
    python -m benchmarks.loss_memory --labels 1024                # a quicker look
    python -m benchmarks.loss_memory --device cuda --dtype bfloat16

Only the head and the loss run, on random hidden states: forward and backward pass at the sizes of Phi-2's head (with a
bias) and Qwen2-0.5B's, frozen and trained. Each run is a fresh process, because memory that a process has freed is
reused and would not be counted. The arms alternate; figures are medians over the rounds. `plain` is what
`forward(labels=...)` computes, `fused` what training computes, `liger` the same by Liger's kernel, where it is
installed and the device is a GPU. The losses of the arms are compared.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import is_liger_kernel_available

from benchmarks.machine import PeakMemory, describe_machine, synchronize, write_result
from jnana.modeling.loss_jnana import head_loss


RESULT = Path(__file__).parent / "results" / "loss_memory_cpu.json"
# Words, hidden size, bias; `tiny` is for a test.
HEADS = {"phi-2": (51_200, 2560, True), "qwen2-0.5b": (151_936, 896, False), "tiny": (500, 8, True)}
TRAINED = {"frozen": False, "trained": True}
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def measure(arm: str, words: int, width: int, bias: bool, trained: bool, args: argparse.Namespace) -> dict[str, Any]:
    """One forward and backward pass in this process.

    Args:
        arm (`str`): `plain`, `fused` or `liger`.
        words, width (`int`): Size of the head.
        bias (`bool`): Whether the head has a bias.
        trained (`bool`): Whether the head gets a gradient.
        args (`argparse.Namespace`): `labels`, `device`, `dtype`.

    Returns:
        `dict[str, Any]`: `peak_bytes` beyond weights and inputs, `seconds` and the `loss`. On a CPU the seconds are
            those that this process computed.
    """
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    head = nn.Linear(width, words, bias=bias, device=device, dtype=dtype).requires_grad_(trained)
    hidden_states = torch.randn(args.labels, width, device=device, dtype=dtype, requires_grad=True)
    labels = torch.randint(words, (args.labels,), device=device)

    def step(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if arm == "plain":
            loss = ForCausalLMLoss(head(states), None, words, shift_labels=targets, num_items_in_batch=len(targets))
        else:
            loss = head_loss(states, head, targets, len(targets), use_liger_kernel=arm == "liger")
        loss.backward()
        return loss.detach()

    step(hidden_states[:16].detach().requires_grad_(), labels[:16])  # libraries are loaded, kernels compiled
    head.zero_grad(set_to_none=True)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    with PeakMemory(device) as memory:
        synchronize(device)
        start = clock()
        loss = step(hidden_states, labels)
        synchronize(device)
        seconds = clock() - start
    return {"peak_bytes": memory.bytes, "seconds": seconds, "loss": loss.item()}


def measure_apart(arm: str, name: str, state: str, args: argparse.Namespace) -> dict[str, Any]:
    """[`measure`] in a fresh process."""
    options = ["--labels", args.labels, "--device", args.device, "--dtype", args.dtype, "--threads", args.threads]
    command = [sys.executable, "-m", "benchmarks.loss_memory", *map(str, options), "--one", arm, name, state]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise RuntimeError(f"{arm}, {name}, {state} ended with {ended.returncode}:\n{ended.stderr[-2000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def compare(arms: dict[str, list[dict[str, Any]]], dtype: torch.dtype) -> dict[str, Any]:
    """
    The medians of each arm, and what they are relative to `plain`.

    Raises:
        RuntimeError: if the losses differ.
    """
    found = {}
    for arm, runs in arms.items():
        peaks = [run["peak_bytes"] for run in runs]
        found[arm] = {
            "peak_megabytes": None if None in peaks else round(statistics.median(peaks) / 1e6),
            "seconds": round(statistics.median(run["seconds"] for run in runs), 2),
            "time_ratios": [
                round(run["seconds"] / plain["seconds"], 2) for run, plain in zip(runs, arms["plain"], strict=True)
            ],
            "loss": runs[0]["loss"],
        }
        expected = arms["plain"][0]["loss"]
        if abs(runs[0]["loss"] - expected) > TOLERANCE[dtype] * expected:
            raise RuntimeError(f"the loss of {arm} is {runs[0]['loss']}, that of the plain path {expected}")
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=4096, help="supervised tokens")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--heads", nargs="+", default=["phi-2", "qwen2-0.5b"], choices=list(HEADS))
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--one", nargs=3, metavar=("ARM", "HEAD", "STATE"), help="one run in this process")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.one is not None:
        arm, name, state = args.one
        result = measure(arm, *HEADS[name], TRAINED[state], args)
        print(json.dumps(result))
        return result

    device = torch.device(args.device)
    arms = ["plain", "fused"] + ["liger"] * (device.type == "cuda" and is_liger_kernel_available())
    result = {"machine": describe_machine(device), "labels": args.labels, "dtype": args.dtype, "heads": {}}
    for name in args.heads:
        words, width, _ = HEADS[name]
        for state in TRAINED:
            runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
            for turn in range(args.rounds):
                for arm in arms if turn % 2 == 0 else reversed(arms):
                    runs[arm].append(measure_apart(arm, name, state, args))
            found = compare(runs, getattr(torch, args.dtype))
            result["heads"][f"{name}, {state}"] = {"words": words, "hidden_size": width, **found}
            for arm, figures in found.items():
                ratios = ", ".join(map(str, figures["time_ratios"]))
                print(
                    f"{name} ({words:,} words), head {state}, {arm}: {figures['peak_megabytes']} MB, "
                    f"{figures['seconds']} s, {ratios} times plain",
                    flush=True,
                )
            write_result(result, args.output)
    return result


if __name__ == "__main__":
    main()
