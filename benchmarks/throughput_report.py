"""Summarises the rounds of the throughput benchmark: medians, ratios, a table and a plot."""

import statistics
from pathlib import Path
from typing import Any


LABELS = {
    "llava": "stock LLaVA, padded rows",
    "padded": "packing: none",
    "shared_image": "packing: shared_image",
    "feature_cache": "shared_image + feature_cache",
}
COLOURS = {"llava": "#9aa0a6", "padded": "#8ab4f8", "shared_image": "#1a73e8", "feature_cache": "#0b3d91"}


def spread(values: list[float]) -> dict[str, Any]:
    """Median, smallest, largest and all values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": values}


def summarize(
    name: str, facts: dict[str, Any], rounds: list[dict[str, dict]], arms: tuple[str, ...], peak: float
) -> dict[str, Any]:
    """
    The entry of one case in the JSON file.

    Args:
        name (`str`): Name of the case.
        facts (`dict`): Untimed counts of the case; those of each arm in `facts["arms"]`.
        rounds (`list[dict[str, dict]]`): Return values of `run_arm`, by round and arm.
        arms (`tuple[str, ...]`): The baseline first.
        peak (`float`): Return value of `peak_flops`.
    """
    summary: dict[str, Any] = {"case": name, **{key: value for key, value in facts.items() if key != "arms"}}
    summary["arms"] = {}
    for arm in arms:
        turns = [turn[arm] for turn in rounds]
        steps = len(turns[0]["losses"]) - 1
        flops = facts["arms"][arm]["flops_per_step"]
        memory = [turn["peak_memory_bytes"] for turn in turns]
        summary["arms"][arm] = {
            **facts["arms"][arm],
            "samples_per_second": spread([turn["samples_per_second"] for turn in turns]),
            "supervised_tokens_per_second": spread([turn["supervised_tokens_per_second"] for turn in turns]),
            "share_of_peak_flops": spread([flops * steps / turn["seconds"] / peak for turn in turns]),
            "peak_memory_bytes": None if None in memory else max(memory),
            "losses": turns[0]["losses"],
        }
    base = arms[0]
    summary["ratios"] = {
        f"{arm}/{base}": spread(
            [turn[arm]["samples_per_second"] / turn[base]["samples_per_second"] for turn in rounds]
        )
        for arm in arms[1:]
    }
    summary["wall_ratios"] = {
        f"{arm}/{base}": spread([turn[base]["wall_seconds"] / turn[arm]["wall_seconds"] for turn in rounds])
        for arm in arms[1:]
    }
    tokens = {arm: facts["arms"][arm]["tokens"] for arm in arms}
    summary["ratio_by_token_count"] = tokens[base] / tokens["shared_image"]
    return summary


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = [
        "| case | arm | samples/s | supervised tokens/s | times stock LLaVA (spread) | tokens per step | padding | "
        "peak memory | share of peak FLOP/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        for arm, found in case["arms"].items():
            ratio = next((value for key, value in case["ratios"].items() if key.split("/")[0] == arm), None)
            times = f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio else "1"
            memory = found["peak_memory_bytes"]
            lines.append(
                f"| {case['case']} | {LABELS[arm]} | {found['samples_per_second']['median']:.3g} | "
                f"{found['supervised_tokens_per_second']['median']:.3g} | {times} | {found['tokens']:,} | "
                f"{found['padded_share']:.0%} | {'-' if memory is None else f'{memory / 1e6:,.0f} MB'} | "
                f"{found['share_of_peak_flops']['median']:.0%} |"
            )
    return "\n".join(lines)


def draw(result: dict[str, Any], file: Path) -> None:
    """Plot throughput relative to stock LLaVA, its spread over rounds, and the ratio of the token counts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = result["cases"]
    figure = Figure(figsize=(max(8.5, 1.7 * len(cases)), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    arms = list(cases[0]["arms"])
    width = 0.8 / len(arms)
    for index, arm in enumerate(arms):
        positions = [number + (index - (len(arms) - 1) / 2) * width for number in range(len(cases))]
        ratios = [case["ratios"].get(f"{arm}/{arms[0]}", {"median": 1, "min": 1, "max": 1}) for case in cases]
        heights = [ratio["median"] for ratio in ratios]
        errors = [
            [ratio["median"] - ratio["min"] for ratio in ratios],
            [ratio["max"] - ratio["median"] for ratio in ratios],
        ]
        axes.bar(positions, heights, width * 0.92, label=LABELS[arm], color=COLOURS[arm])
        if arm != arms[0]:
            axes.errorbar(positions, heights, errors, fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
        for x, ratio in zip(positions, ratios, strict=True):
            axes.text(x, ratio["max"], f" {ratio['median']:.1f}", ha="center", va="bottom", fontsize=8)
    for number, case in enumerate(cases):
        label = "ratio of token counts" if number == 0 else None
        ratio = case["ratio_by_token_count"]
        axes.plot([number - 0.42, number + 0.42], [ratio, ratio], color="#d93025", linestyle="--", lw=1, label=label)
    names = [case["case"].split("-") for case in cases]
    labels = {"align": "5 captions per image", "sft": "4-5 question/answer\npairs per image, LoRA"}
    images = [f"\n{more[0].removeprefix('x')} images per row" if more else "" for _, _, *more in names]
    described = [f"{labels[name[0]]}\n{name[1]} image tokens{more}" for name, more in zip(names, images, strict=True)]
    axes.set_xticks(range(len(cases)), described, fontsize=8)
    machine = result["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['torch_threads']} thread(s)"
    axes.set(ylabel="samples/s, stock LLaVA = 1", title=f"Training throughput, stock Trainer, {where}")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.08)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=130)
