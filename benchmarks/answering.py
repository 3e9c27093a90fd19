"""What the benchmarks of answering share: their options, a case for each number of image tokens, the result."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine, write_result
from benchmarks.workloads import SCALES


def measure_cases(
    argv: list[str] | None,
    description: str | None,
    counts: dict[str, int],
    measure: Callable[[argparse.Namespace, int, torch.device], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    """
    Measure each case of the command line, print its table, and write the result if a file is named.

    Args:
        argv (`list[str]`, *optional*): The command line; by default that of the process.
        description (`str`, *optional*): For `--help`.
        counts (`dict[str, int]`): Options of the benchmark that are numbers, with their defaults.
        measure (`Callable`): Measures a case, given the options, the number of image tokens and the device.
        table (`Callable`): A case as text.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=sorted(SCALES), default="small")
    parser.add_argument("--image_tokens", type=int, nargs="+", help="default: all of the scale without tiles")
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="JSON file for the result; default: none is written")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    result: dict[str, Any] = {"machine": describe_machine(device), "scale": arguments.scale, "cases": []}
    scale = SCALES[arguments.scale]
    for tokens in arguments.image_tokens or sorted(set(scale.text) - {scale.tiles}):
        result["cases"].append(measure(arguments, tokens, device))
        print(table(result["cases"][-1]), flush=True)
    result["load_average_at_the_end"] = describe_machine(device)["load_average"]
    if arguments.output is not None:
        write_result(result, arguments.output)
    return result
