"""Runs the whole demo: makes the data, trains every part from random weights, and answers the test questions.

    python examples/chess_demo/run_demo.py
    python examples/chess_demo/run_demo.py --seed 1 --output_dir outputs/chess_demo_1

Each stage is one of the package's scripts in a separate process, started by `accelerate launch` with a recipe of
recipes/chess_demo/. The vision tower and the language model are independent and train in parallel, on one core each. A
complete stage is not run again, so an interrupted demo resumes; --fresh starts from the beginning.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RECIPES = Path("recipes/chess_demo")
POLL_SECONDS = 0.5
STATUS_SECONDS = 15


@dataclass
class Job:
    """One process: its name, command line and number of threads."""

    name: str
    command: list[str]
    threads: int


@dataclass
class Stage:
    """Jobs that run in parallel."""

    title: str
    jobs: list[Job]


def launch(script: str, recipe: str | Path, **options: object) -> list[str]:
    """`accelerate launch script.py recipe.yaml --option value ...` on one process without a GPU.

    Args:
        script (`str`): A script of the package.
        recipe (`str` or `Path`): A file of recipes/chess_demo/, or the absolute path of another recipe.
        options (`object`): Options that override the recipe.
    """
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    accelerate += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [*accelerate, script, str(RECIPES / recipe), *words]


def example(script: str | Path, **options: object) -> list[str]:
    """The command line of a script in this directory, or of one that is given by its absolute path."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, str(HERE / script), *words]


def assistant_commands(
    data: Path,
    clip: Path,
    text_model: Path,
    output: Path,
    seed: int,
    align_options: dict | None = None,
    evaluate_options: dict | None = None,
    sft_options: dict | None = None,
) -> dict[str, list[str]]:
    """The command lines of align, sft and evaluate, once the vision tower `clip` and `text_model` are trained."""
    images = {"image_folder": data / "train", "seed": seed}
    align = launch(
        "run_align.py",
        "align.yaml",
        vision_model=clip,
        text_model=text_model,
        train_data=data / "captions_train.json",
        output_dir=output / "align",
        **images,
        **(align_options or {}),
    )
    sft = launch(
        "run_sft.py",
        "sft.yaml",
        model_name_or_path=output / "align",
        train_data=data / "instruct_train.json",
        output_dir=output / "sft",
        **images,
        **(sft_options or {}),
    )
    evaluate = launch(
        "run_evaluate.py",
        "evaluate.yaml",
        model_name_or_path=output / "sft" / "merged",
        eval_data=json.dumps({name: str(data / f"instruct_{name}.json") for name in ("test", "unseen")}),
        image_folder=json.dumps({name: str(data / name) for name in ("test", "unseen")}),
        output_dir=output / "evaluation",
        **(evaluate_options or {}),
    )
    return {"align": align, "sft": sft, "evaluate": evaluate}


def demo_stages(output: Path, seed: int, cores: int) -> list[Stage]:
    """The stages in order.

    Args:
        output (`Path`): Directory of this run.
        seed (`int`): Seed of data, weights and order; the test images have a seed that no other part uses.
        cores (`int`): Threads of a job that runs alone.
    """
    data = output / "data"
    seeds = {"output_dir": data, "seed": seed, "test_seed": 1_000_000 + seed}
    parts = [Job(part, example("make_data.py", part=part, **seeds), 1) for part in ("images", "text")]
    clip = example("train_clip.py", data_dir=data, output_dir=output / "clip", seed=seed)
    pretrain = launch(
        "run_pretrain.py", "pretrain.yaml", train_data=data / "corpus.txt", output_dir=output / "pretrain", seed=seed
    )
    later = assistant_commands(data, output / "clip", output / "pretrain", output, seed)
    return [
        Stage("draw images, write captions, questions and text", parts),
        Stage("train the vision tower and the language model", [Job("clip", clip, 1), Job("pretrain", pretrain, 1)]),
        Stage("align: train the projector on captions", [Job("align", later["align"], cores)]),
        Stage("sft: LoRA and projector on questions and answers", [Job("sft", later["sft"], cores)]),
        Stage("evaluate on new images, and blind", [Job("evaluate", later["evaluate"], cores)]),
    ]


def last_line(log: Path) -> str:
    """The last line of a log. Progress bars separate their updates by carriage returns."""
    text = log.read_text(encoding="utf-8", errors="replace")[-2000:].replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:110] if lines else "starting"


def run_stage(stage: Stage, output: Path) -> dict[str, float]:
    """Run the jobs of a stage in parallel, and print their progress every `STATUS_SECONDS`.

    Args:
        stage (`Stage`): The stage.
        output (`Path`): Logs are written to `output/logs`, and a note for each complete job to `output/done`.

    Returns:
        `dict[str, float]`: Seconds of each job.

    Raises:
        SystemExit: with the end of the log, if a job fails. The other job is stopped.
    """
    logs, running, seconds = output / "logs", {}, {}
    for job in stage.jobs:
        environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
        log = (logs / f"{job.name}.log").open("w", encoding="utf-8")
        process = subprocess.Popen(job.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        log.close()
        running[job.name] = process
    started = shown = time.monotonic()
    try:
        while running:
            time.sleep(POLL_SECONDS)
            for job in stage.jobs:
                process = running.get(job.name)
                if process is None or process.poll() is None:
                    continue
                del running[job.name]
                seconds[job.name] = time.monotonic() - started
                if process.returncode != 0:
                    raise SystemExit(failure(job, process.returncode, logs / f"{job.name}.log"))
                note = {"seconds": seconds[job.name], "command": job.command}
                (output / "done" / f"{job.name}.json").write_text(json.dumps(note), encoding="utf-8")
            if running and time.monotonic() - shown > STATUS_SECONDS:
                shown = time.monotonic()
                for name in running:
                    print(f"    {shown - started:4.0f} s  {name}: {last_line(logs / f'{name}.log')}", flush=True)
    finally:
        for process in running.values():
            process.terminate()
            process.wait()
    return seconds


def failure(job: Job, code: int, log: Path) -> str:
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
    advice = "When the cause is removed, the same command resumes here."
    return f"{tail}\n\nThe stage {job.name!r} failed (exit code {code}); its log is {log}. {advice}"


def is_complete(job: Job, output: Path) -> bool:
    """Whether exactly this command has completed in this directory."""
    note = output / "done" / f"{job.name}.json"
    return note.is_file() and json.loads(note.read_text(encoding="utf-8"))["command"] == job.command


def run_all(stages: list[Stage], output: Path) -> dict[str, float]:
    """Run all incomplete stages, and every stage after one that ran. Returns the seconds of each job."""
    for folder in ("logs", "done"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    must_run = False
    for number, stage in enumerate(stages, start=1):
        if not must_run and all(is_complete(job, output) for job in stage.jobs):
            print(f"[{number}/{len(stages)}] {stage.title}: already complete", flush=True)
            for job in stage.jobs:
                note = json.loads((output / "done" / f"{job.name}.json").read_text(encoding="utf-8"))
                seconds[job.name] = note["seconds"]
            continue
        print(f"[{number}/{len(stages)}] {stage.title}", flush=True)
        pending = [job for job in stage.jobs if must_run or not is_complete(job, output)]
        must_run = True
        for job in pending:
            (output / "done" / f"{job.name}.json").unlink(missing_ok=True)
        seconds |= run_stage(Stage(stage.title, pending), output)
        print("    " + ", ".join(f"{job.name}: {seconds[job.name]:.0f} s" for job in pending), flush=True)
    return seconds


def accuracy_table(results: dict) -> str:
    """Exact match of both splits, by question type, beside the blind run and the majority answer, in percent."""
    header = f"{'':10}" + "".join(f"{name:>{3 * 10}}" for name in ("held-out images", "unseen combinations"))
    lines = [header, f"{'type':10}" + f"{'right':>10}{'blind':>10}{'majority':>10}" * 2 + f"{'questions':>14}"]
    splits = [results["splits"][name] for name in ("test", "unseen")]
    kinds = list(splits[0]["categories"])
    for kind in [*kinds, "all"]:
        cells, counts = [], []
        for split in splits:
            scores = split["overall"] if kind == "all" else split["categories"].get(kind)
            if scores is None:
                cells += ["-"] * 3
                counts.append("0")
                continue
            parts = (scores, scores["blind"], scores["majority"])
            cells += [f"{100 * part['exact_match']:.1f}" for part in parts]
            counts.append(str(scores["n"]))
        lines.append(f"{kind:10}" + "".join(f"{cell:>10}" for cell in cells) + f"{' + '.join(counts):>14}")
    rule = "-" * len(lines[1])
    return "\n".join([*lines[:2], rule, *lines[2:-1], rule, lines[-1]])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/chess_demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="delete output_dir first")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    output = arguments.output_dir.resolve()
    if arguments.fresh and output.exists():
        if not (output / "done").is_dir():
            raise SystemExit(
                f"--fresh would delete {output}, which is not a directory of this demo; choose another --output_dir"
            )
        shutil.rmtree(output)
    started = time.monotonic()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    seconds = run_all(demo_stages(output, arguments.seed, cores), output)
    results = json.loads((output / "evaluation" / "results.json").read_text(encoding="utf-8"))
    print("\n" + accuracy_table(results))
    print("\nseconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()), end="")
    print(f"; this call {time.monotonic() - started:.0f}")
    print(f"images, questions, answers: {output / 'evaluation' / 'report.html'}")


if __name__ == "__main__":
    main()
