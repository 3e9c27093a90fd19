"""The price of the ways to show an image to a language model: tokens in the row, a resampler, cross-attention.

    python -m benchmarks.fusion_price                        # one CPU thread, a small Phi
    python -m benchmarks.fusion_price --scale phi2           # a GPU, full Phi-2 from random weights
    python -m benchmarks.fusion_price --cases sft-576 --rounds 9

    tokens             `projector_type: mlp`: each patch takes a token of the row
    perceiver          `projector_type: perceiver`: 64 tokens an image
    cross_attention    `fusion: cross_attention`: one token an image, a gated block before every fourth layer
    narrow             the same, with MLPs in the blocks no wider than the language model

All arms train on the same images and texts, with `packing: shared_image`. They take turns within each round; figures
are medians over rounds, ratios are computed within a round. A step is one forward and backward pass, without reading
the images and without the optimizer. On one CPU thread the clock is the CPU time of the process. The losses differ
between the arms, because their models do; how well each learns is not measured here.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, PhiConfig

from benchmarks.machine import PeakMemory, describe_machine, synchronize, write_result
from benchmarks.train_throughput import clock, plan_step
from benchmarks.workloads import SCALES, Scale, built_as, make_images, make_processor, make_rows
from jnana.modeling import JnanaConfig, JnanaForConditionalGeneration
from jnana.processing.data import JnanaCollator
from jnana.training.options.arguments import LoraArguments
from jnana.training.stages import apply_stage, count_parameters


RESAMPLER = {"projector_type": "perceiver"}
BLOCKS = {**RESAMPLER, "fusion": "cross_attention"}
ARMS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "perceiver": RESAMPLER,
    "cross_attention": BLOCKS,
    "narrow": {**BLOCKS, "cross_attention_intermediate_size": "hidden_size"},
}


def make_model(fields: dict[str, Any], stage: str, scale: Scale, num_tokens: int, token_id: int, device) -> nn.Module:
    """One arm's model, with random weights, ready for the stage."""
    text = PhiConfig(**scale.text[num_tokens])
    fields = {name: text.hidden_size if value == "hidden_size" else value for name, value in fields.items()}
    config = JnanaConfig.from_vision_text_configs(
        CLIPVisionConfig(**scale.vision[num_tokens]), text, image_token_id=token_id, vision_feature_layer=-1, **fields
    )
    torch.manual_seed(0)
    with built_as(scale, device):
        model = JnanaForConditionalGeneration(config)
    return apply_stage(model, stage, LoraArguments(lora_r=scale.lora_r) if stage == "sft" else None).train()


def make_arms(case: str, scale: Scale, folder: Path, device: torch.device) -> dict[str, tuple[nn.Module, dict]]:
    """Model and one batch for each arm of a case (`align-576`, ...)."""
    stage, tokens = case.split("-")
    rows = make_rows(stage, make_images(folder / case, scale.images_per_step[int(tokens)]))
    arms = {}
    for arm, fields in ARMS.items():
        processor = make_processor(scale, int(tokens))
        model = make_model(fields, stage, scale, int(tokens), processor.image_token_id, device)
        if fields:
            processor.tokens_per_view = model.config.num_image_tokens
        planned = plan_step(rows, processor, scale.max_row_tokens[int(tokens)])
        batch = JnanaCollator(processor, packing="shared_image")(planned)
        arms[arm] = model, send_to_device(batch, device)
    return arms


def step(model: nn.Module, batch: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    device = batch["input_ids"].device.type
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        loss = model(**batch).loss
    loss.backward()
    model.zero_grad()


def facts_of(model: nn.Module, batch: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Tokens, parameters and floating-point operations of one step; also the warm-up."""
    counter = FlopCounterMode(display=False)
    with counter:
        step(model, batch, dtype)
    counts = count_parameters(model).values()
    return {
        "tokens": int((batch["segment_ids"] >= 0).sum()),
        "parameters": sum(count.total for count in counts),
        "trained_parameters": sum(count.trainable for count in counts),
        "flops_per_step": counter.get_total_flops(),
    }


def measure_case(case: str, scale: Scale, args: argparse.Namespace, device: torch.device, folder: Path) -> dict:
    """All rounds of one case."""
    arms = make_arms(case, scale, folder, device)
    found: dict[str, dict] = {arm: facts_of(*given, scale.dtype) for arm, given in arms.items()}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    now, names = clock(device), list(arms)
    for number in range(args.rounds):
        for arm in names[number % len(names) :] + names[: number % len(names)]:
            synchronize(device)
            begun = now()
            for _ in range(args.steps):
                step(*arms[arm], scale.dtype)
            synchronize(device)
            seconds[arm].append((now() - begun) / args.steps)
    for arm, (model, batch) in arms.items():
        with PeakMemory(device) as memory:
            step(model, batch, scale.dtype)
        ratios = [own / tokens for own, tokens in zip(seconds[arm], seconds["tokens"], strict=True)]
        found[arm] |= {
            "seconds_per_step": statistics.median(seconds[arm]),
            "time_over_tokens": [statistics.median(ratios), min(ratios), max(ratios)],
            "peak_memory_bytes": memory.bytes,
        }
    return {"case": case, "images": scale.images_per_step[int(case.split("-")[1])], "arms": found}


def table(result: dict[str, Any]) -> str:
    """One line for each arm of each case."""
    lines = [f"{'case':<12}{'arm':<17}{'tokens':>8}{'trained':>14}{'GFLOP':>9}{'s/step':>9}  time, tokens = 1"]
    for case in result["cases"]:
        for arm, found in case["arms"].items():
            middle, least, most = found["time_over_tokens"]
            lines.append(
                f"{case['case']:<12}{arm:<17}{found['tokens']:>8}{found['trained_parameters']:>14,}"
                f"{found['flops_per_step'] / 1e9:>9.1f}{found['seconds_per_step']:>9.3f}"
                f"  {middle:.2f} ({least:.2f}-{most:.2f})"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=sorted(SCALES), default="small")
    parser.add_argument("--cases", nargs="+", help="default: align and sft with each number of image tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "fusion_price_cpu.json")
    args = parser.parse_args(argv)
    device, scale = torch.device(args.device), SCALES[args.scale]
    if device.type == "cpu":
        torch.set_num_threads(1)
    cases = args.cases or [f"{stage}-{tokens}" for stage in ("align", "sft") for tokens in scale.text]
    result: dict[str, Any] = {"machine": describe_machine(device), "scale": args.scale, "cases": []}
    result |= {"rounds": args.rounds, "steps": args.steps}
    with tempfile.TemporaryDirectory(prefix="jnana-") as folder:
        for case in cases:
            result["cases"].append(measure_case(case, scale, args, device, Path(folder)))
            write_result(result, args.output)
    print(table(result))
    return result


if __name__ == "__main__":
    main()
