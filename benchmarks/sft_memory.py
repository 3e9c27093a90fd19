"""Peak GPU memory of the jnana SFT recipe at full size.

    python -m benchmarks.sft_memory                                          # a GPU; 12 GB of disk while it runs
    python -m benchmarks.sft_memory --output results.json --dtype float16 --bf16 false --fp16 true      # as on a T4
    python -m benchmarks.sft_memory --quantization none                      # without 4-bit weights, for comparison
    python -m benchmarks.sft_memory --scale tiny                             # a test run on a CPU

The peak is printed beside the forecast that run_sft makes before it reads weights. On a CPU the measured peak is the
growth of the process, most of which is not tensors at the tiny size: benchmarks/memory_forecast.py compares tensors.

The script runs `run_sft.py` on `recipes/jnana/sft.yaml` and overrides only paths, the number of steps and what is
written to disk. It then merges the adapter as the recipe says. The base checkpoint has random weights in full shapes:
CLIP ViT-B/32, the recipe's projector and Phi-2. Images and conversations have the lengths of the real data. Options
that this script does not know are passed to `run_sft.py`. The full size needs a GPU.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import release_memory
from transformers import CLIPVisionConfig, PhiConfig, TrainingArguments

from benchmarks.machine import PeakMemory, describe_machine, write_result
from benchmarks.workloads import SCALES, Scale, built_as, make_images, make_processor, make_rows
from jnana import run_sft
from jnana.modeling import PROJECTOR_FIELDS, JnanaConfig, JnanaForConditionalGeneration, quantized_weight_count
from jnana.training.adapters import quantization_settings
from jnana.training.data import load_conversations
from jnana.training.loading import load_model
from jnana.training.merging import merge_adapter
from jnana.training.model_setup import frozen_dtype, prepare_processor
from jnana.training.options.arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    PartArguments,
    RunArguments,
)
from jnana.training.options.recipes import as_command_line, parse_arguments, read_recipe, typed
from jnana.training.profiling.forecast import forecast_run
from jnana.training.stages import part_of


RECIPES = Path(__file__).parents[1] / "recipes" / "jnana"
LIMIT_GB = 15  # usable memory of a T4, on which the original system was trained
IMAGE_TOKENS = {"phi2": 49, "tiny": 4}
# Values that the tiny scale overrides in the recipe.
TINY = {"lora_r": 2, "dtype": "float32", "bf16": "false", "use_cpu": "true", "dataloader_num_workers": 0}


def save_base(folder: Path, scale: Scale, image_tokens: int, device: torch.device) -> None:
    """Save a checkpoint as the align recipe does, but with random weights."""
    processor = make_processor(scale, image_tokens)
    align = read_recipe(RECIPES / "align.yaml")
    fields = {name: typed(align[name]) for name in PROJECTOR_FIELDS if name in align}
    config = JnanaConfig.from_vision_text_configs(
        CLIPVisionConfig(**scale.vision[image_tokens]),
        PhiConfig(**scale.text[image_tokens]),
        image_token_id=processor.image_token_id,
        **fields,
    )
    with built_as(scale, device):
        model = JnanaForConditionalGeneration(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_data(folder: Path, count: int) -> Path:
    """Write a LLaVA-Instruct file beside its images; returns the file."""
    images = make_images(folder, count)
    records = []
    for number, (row, image) in enumerate(zip(make_rows("sft", images), images, strict=True)):
        turns = []
        for (_, question), (answer,) in (tuple(turn["content"] for turn in chat) for chat in row["conversations"]):
            mark = "" if turns else "<image>\n"
            turns.append({"from": "human", "value": mark + question["text"]})
            turns.append({"from": "gpt", "value": answer["text"]})
        records.append({"id": str(number), "image": image.name, "conversations": turns})
    file = folder / "instruct.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    return file


def command_line(args: argparse.Namespace, folder: Path, base: Path, data: Path) -> list[str]:
    """The recipe, and the options that this measurement sets: paths, steps, and no checkpoints."""
    values = {
        "model_name_or_path": base,
        "train_data": data,
        "image_folder": data.parent,
        "output_dir": folder / "sft",
        "max_steps": args.steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "merge_adapter": "false",  # measured separately
        "disable_tqdm": "true",
    }
    if args.scale == "tiny":
        values |= {**TINY, "max_row_tokens": SCALES["tiny"].max_row_tokens[IMAGE_TOKENS["tiny"]]}
    return [str(RECIPES / "sft.yaml"), *as_command_line(values), *args.run_sft_options]


def forecast_of(command: list[str]) -> dict[str, Any] | None:
    """What run_sft forecasts for a command line, by part, before it reads weights."""
    classes = (ModelArguments, DataArguments, LoraArguments, PartArguments, RunArguments, TrainingArguments)
    model_args, data_args, lora_args, part_args, run_args, training_args = parse_arguments(classes, command)
    model_args.dtype = frozen_dtype(model_args)
    processor = prepare_processor(model_args)
    rows = load_conversations(data_args, processor, training_args.output_dir, seed=training_args.seed)
    arguments = (model_args, data_args, run_args, part_args, lora_args, quantization_settings(lora_args, model_args))
    found = forecast_run("sft", training_args, *arguments, processor=processor, rows=rows, fewest_weights=0)
    return None if found is None else {"peak_gb": found.total / 1e9, "parts": {**found.weights, **found.step.parts}}


def peak(memory: PeakMemory, device: torch.device) -> dict[str, Any]:
    """The peak in GB (10^9 bytes): of allocated tensors, and of the memory that torch's allocator reserved."""
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    return {
        "peak_gb": None if memory.bytes is None else memory.bytes / 1e9,
        "peak_reserved_gb": None if reserved is None else reserved / 1e9,
    }


def held_bytes(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of the weights by part; trainable weights separately, with their gradients and AdamW moments."""
    held = {"quantised": 0, "quantised_weights": 0, "trains": 0}
    for name, weight in model.named_parameters():
        size = weight.numel() * weight.element_size()
        if type(weight).__name__ in ("Params4bit", "Int8Params"):
            held["quantised"] += size
            held["quantised_weights"] += quantized_weight_count(weight)
        elif weight.requires_grad:
            held["trains"] += size
        else:
            held[part_of(name)] = held.get(part_of(name), 0) + size
    held["gradients_and_adamw"] = 3 * held["trains"]  # one gradient and two moments for each weight, all in float32
    return held


def measure(args: argparse.Namespace, folder: Path, device: torch.device) -> dict[str, Any]:
    """Measure training, then merging."""
    scale, image_tokens = SCALES[args.scale], IMAGE_TOKENS[args.scale]
    save_base(folder / "base", scale, image_tokens, device)
    data = save_data(folder / "data", args.images)
    command = command_line(args, folder, folder / "base", data)
    expected = forecast_of(command)
    release_memory()
    with PeakMemory(device) as training:
        run_sft.main(command)
    phases = {"training": {**peak(training, device), "forecast": expected}}
    release_memory()
    with PeakMemory(device) as merging:
        merge_adapter(str(folder / "sft"), folder / "merged", device=device)
    phases["merging"] = peak(merging, device)
    model, _ = load_model(str(folder / "sft"), trainable_adapter=True, device_map={"": device})
    log = json.loads((folder / "sft" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return {
        "machine": describe_machine(device),
        "scale": args.scale,
        "recipe": read_recipe(RECIPES / "sft.yaml"),
        "run_sft_options": args.run_sft_options,
        "steps": args.steps,
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "phases": phases,
        "held_bytes": held_bytes(model),
    }


def table(result: dict[str, Any]) -> str:
    """The result as text. The limit applies to reserved memory; CUDA's context takes about half a GB more."""
    lines = [f"jnana SFT at {result['scale']} size, {result['steps']} steps; GB of 10^9 bytes"]
    for phase, measured in result["phases"].items():
        tensors, reserved = measured["peak_gb"], measured["peak_reserved_gb"]
        line = f"  {phase}: " + ("peak unknown on this system" if tensors is None else f"peak {tensors:.2f}")
        if reserved is not None:
            verdict = "under" if reserved < LIMIT_GB else "NOT under"
            line += f", reserved {reserved:.2f}: {verdict} {LIMIT_GB}"
        if measured.get("forecast") is not None:
            line += f"; forecast {measured['forecast']['peak_gb']:.2f} of tensors"
        lines.append(line)
    held = ", ".join(
        f"{name} {size / 1e9:.3f}" for name, size in result["held_bytes"].items() if name != "quantised_weights"
    )
    return "\n".join([*lines, f"  of which held throughout: {held}"])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--scale", choices=sorted(IMAGE_TOKENS), default="phi2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=96, help="number of images, with four or five pairs each")
    parser.add_argument("--folder", help="temporary directory for the checkpoint; default: the system's")
    parser.add_argument("--output", type=Path, help="JSON file for the result; default: none is written")
    args, args.run_sft_options = parser.parse_known_args(argv)
    if args.steps < 1 or args.images < 1:
        parser.error("--steps and --images must be at least 1")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    if args.scale != "tiny" and not torch.cuda.is_available():
        sys.exit(
            "There is no CUDA GPU here, and the full size can be measured on a GPU only. Run this on a machine with "
            "one, or make a test run with --scale tiny."
        )
    device = torch.device("cpu" if args.scale == "tiny" else "cuda")
    with tempfile.TemporaryDirectory(prefix="jnana-", dir=args.folder) as folder:
        result = measure(args, Path(folder), device)
    print(table(result), flush=True)
    if args.output is not None:
        write_result(result, args.output)
    return result


if __name__ == "__main__":
    main()
