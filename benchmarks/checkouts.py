"""Compares the training throughput of two checkouts of this repository in one run.

Each side runs its own `benchmarks.train_throughput` in a process of its own, one round of one case at a time. The
sides take turns, and swap their order from round to round, so that a slower machine slows both. Ratios are computed
within a round.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import write_result
from benchmarks.throughput_report import spread


logger = logging.getLogger(__name__)

HERE = Path(__file__).parents[1]
SIDES = ("old", "new")


def compare_checkouts(args: argparse.Namespace) -> dict[str, Any]:
    """
    Run all rounds; writes `<results>/<name>_against.json` after each case.

    Args:
        args (`argparse.Namespace`): Of `benchmarks.train_throughput`. With `profile` the last round of each case is
            profiled.

    Raises:
        SystemExit: if `against` is not a checkout, or one of the sides fails.
    """
    sides = {"new": HERE, "old": args.against.resolve()}
    if not (sides["old"] / "benchmarks" / "train_throughput.py").is_file():
        raise SystemExit(f"--against {args.against}: there is no benchmarks/train_throughput.py in it")
    commits = {side: commit_of(folder) for side, folder in sides.items()}
    result: dict[str, Any] = {"commits": commits, "rounds": args.rounds, "steps": args.steps, "cases": []}
    for case in args.cases:
        rounds: list[dict[str, dict]] = []
        for number in range(args.rounds):
            order = list(sides) if number % 2 == 0 else list(sides)[::-1]
            profiled = args.profile and number == args.rounds - 1
            turns = {side: run_side(sides[side], case, args, profiled) for side in order}
            result["machine"] = turns["new"]["machine"]
            rounds.append({side: turn["cases"][0] for side, turn in turns.items()})
        result["cases"].append(summarize_sides(case, rounds))
        logger.info(describe(result["cases"][-1]))
        write_result(result, args.results / f"{args.name}_against.json")
    return result


def run_side(checkout: Path, case: str, args: argparse.Namespace, profiled: bool) -> dict[str, Any]:
    """The result file of one round of one case in one checkout."""
    with tempfile.TemporaryDirectory(prefix="jnana-") as folder:
        options = {"--cases": case, "--rounds": 1, "--steps": args.steps, "--scale": args.scale}
        options |= {"--device": args.device, "--results": folder, "--name": "side"}
        words = [str(word) for pair in options.items() for word in pair] + ["--profile"] * profiled
        command = [sys.executable, "-m", "benchmarks.train_throughput", *words]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        ran = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
        if ran.returncode != 0:
            raise SystemExit(f"{case} failed in {checkout}:\n{(ran.stdout + ran.stderr)[-3000:]}")
        return json.loads((Path(folder) / "side.json").read_text(encoding="utf-8"))


def commit_of(checkout: Path) -> str:
    """The commit that a checkout is at, marked if files differ from it; `unknown` where git does not tell."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return ran.stdout.strip() or "unknown"


def summarize_sides(case: str, rounds: list[dict[str, dict]]) -> dict[str, Any]:
    """For each arm the throughput of the new side over the old side's, and each side's over stock LLaVA's."""
    summary: dict[str, Any] = {"case": case, "new_over_old": {}, "over_llava": {}}

    def speed(turn: dict[str, dict], side: str, arm: str) -> float:
        return turn[side]["arms"][arm]["samples_per_second"]["median"]

    for arm in rounds[0]["new"]["arms"]:
        values = [speed(turn, "new", arm) / speed(turn, "old", arm) for turn in rounds]
        summary["new_over_old"][arm] = spread(values)
        summary["over_llava"][arm] = {
            side: spread([speed(turn, side, arm) / speed(turn, side, "llava") for turn in rounds]) for side in SIDES
        }
    profiles = {side: rounds[-1][side]["profile"] for side in SIDES if "profile" in rounds[-1][side]}
    return summary | ({"profile": profiles} if profiles else {})


def describe(summary: dict[str, Any]) -> str:
    """One line for each arm of a case."""
    lines = []
    for arm, ratio in summary["new_over_old"].items():
        before, after = (summary["over_llava"][arm][side]["median"] for side in SIDES)
        lines.append(
            f"{summary['case']:<12} {arm:<14} new/old {ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f}), "
            f"times stock LLaVA {before:.2f} -> {after:.2f}"
        )
    return "\n".join(lines)
