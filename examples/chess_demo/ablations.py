"""Ablations: the demo's later stages in variants that share vision tower and language model.

    python examples/chess_demo/run_demo.py --seed 0 --output_dir outputs/seed_0
    python examples/chess_demo/ablations.py --demo_dir outputs/seed_0 --output_dir outputs/ablations_0

Each variant writes a directory with `result.json`; a variant that has this file is not run again. Data, seeds,
fine-tuning steps and test questions are the demo's.
"""

import argparse
import json
import os
import time
from pathlib import Path

from run_demo import Job, Stage, assistant_commands, launch, run_stage


# Options of run_align.py that override the recipe. With `align_steps` 0, sft starts from a random projector.
VARIANTS: dict[str, dict] = {
    "no align": {"align_steps": 0},
    "linear projector": {"projector_type": "linear"},
    "mlp projector": {"projector_type": "mlp"},
    "last layer only": {"vision_feature_layer": "-1"},
    "second to last layer only": {"vision_feature_layer": "-2"},
    "language model from random weights": {"random_text_model": True},
}


def variant_stages(name: str, demo: Path, output: Path, seed: int) -> list[Stage]:
    """The stages of one variant, single-threaded, so that two can run side by side on two cores."""
    options = dict(VARIANTS[name])
    data = demo / "data"
    text_model = demo / "pretrain"
    stages = []
    if options.pop("random_text_model", False):
        text_model = output / "pretrain"
        corpus = {"train_data": data / "corpus.txt", "seed": seed}
        # One step with learning rate 0 writes the checkpoint of a random language model with its tokenizer.
        random_start = {"max_steps": 1, "learning_rate": 0.0, "output_dir": text_model}
        command = launch("run_pretrain.py", "pretrain.yaml", **corpus, **random_start)
        stages.append(Stage("pretrain", [Job("pretrain", command, 1)]))
    steps = options.pop("align_steps", None)
    if steps == 0:
        options |= {"max_steps": 1, "learning_rate": 0.0}  # joins the backbones without training
    commands = assistant_commands(data, demo / "clip", text_model, output, seed, options, {"blind": "false"})
    return stages + [Stage(job, [Job(job, command, 1)]) for job, command in commands.items()]


def run_variant(name: str, demo: Path, output: Path, seed: int) -> dict:
    """Train and test one variant; returns and writes its result."""
    result_file = output / "result.json"
    if result_file.is_file():
        return json.loads(result_file.read_text(encoding="utf-8"))
    for folder in ("logs", "done"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for stage in variant_stages(name, demo, output, seed):
        run_stage(stage, output)
    result = {"variant": name, "seed": seed, "seconds": time.monotonic() - started}
    result |= scores_of(output / "evaluation")
    result_file.write_text(json.dumps(result, indent=2), encoding="utf-8")
    return result


def scores_of(evaluation: Path) -> dict[str, dict]:
    """Exact match and number of questions of both splits, from the output directory of run_evaluate.py."""
    splits = json.loads((evaluation / "results.json").read_text(encoding="utf-8"))["splits"]
    overall = {split: splits[split]["overall"] for split in ("test", "unseen")}
    return {split: {"exact_match": s["exact_match"], "questions": s["n"]} for split, s in overall.items()}


def describe(result: dict) -> str:
    return ", ".join(f"{split} {100 * result[split]['exact_match']:.1f} %" for split in ("test", "unseen"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo_dir", type=Path, required=True, help="a complete run of run_demo.py")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    whole = scores_of(arguments.demo_dir / "evaluation")
    print(f"the demo: {describe(whole)}", flush=True)
    for name in arguments.variants:
        folder = arguments.output_dir.resolve() / name.replace(" ", "_")
        result = run_variant(name, arguments.demo_dir.resolve(), folder, arguments.seed)
        print(f"{name}: {describe(result)}", flush=True)


if __name__ == "__main__":
    main()
