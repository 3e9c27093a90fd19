"""Questions per second of an evaluation: one by one, in batches, and with the prefix of each image read once.

    python -m benchmarks.evaluate_throughput                                # one CPU thread, a small Phi
    python -m benchmarks.evaluate_throughput --scale phi2 --device cuda     # full Phi-2, random weights in bfloat16

The questions have the shape of POPE's: six about each image, each a row of its own, answered by two tokens. All three
methods are `jnana.evaluation.answer_questions` on the same questions:

    one by one   `batch_size` 1, `share_prefix` false
    batches      `batch_size` 16, `share_prefix` false: each question is a padded row with its own image
    shared       `batch_size` 16, `share_prefix` true, the default

They take turns in rotating order within each round; ratios are computed within a round, of the CPU time of the process
and of wall-clock time. Reading and preparing the images, and tokenising, is part of both (`num_workers` 0). In float32
the answers must be equal in every round, or the run ends.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.answering import measure_cases
from benchmarks.machine import synchronize
from benchmarks.throughput_report import spread
from benchmarks.workloads import SCALES, make_images, make_models, make_processor, words
from jnana.evaluation import QuestionSet, answer_questions
from jnana.processing.data.rows import IMAGE_PART, make_row, message, text_part


QUESTIONS = 6  # about each image
QUESTION_WORDS = (20, 24)  # "Is there a snowboard in the image? Answer the question using a single word or phrase."
NEW_TOKENS = 2  # "Yes" and the end token
METHODS: dict[str, dict[str, Any]] = {
    "one by one": {"batch_size": 1, "share_prefix": False},
    "batches": {"batch_size": 16, "share_prefix": False},
    "shared": {"batch_size": 16, "share_prefix": True},
}


def make_questions(images: list[Path], seed: int = 0) -> QuestionSet:
    """Six rows for each image, in an order that mixes the images."""
    rng = random.Random(seed)
    rows = []
    for image in images:
        for number in range(QUESTIONS):
            text = " ".join(rng.choice(words()) for _ in range(rng.randint(*QUESTION_WORDS)))
            chat = [message("user", IMAGE_PART, text_part(text)), message("assistant", text_part("yes"))]
            rows.append(make_row([{"path": str(image), "bytes": None}], [chat], f"{image.name} {number}"))
    rng.shuffle(rows)
    return QuestionSet(rows)


def widen(model: torch.nn.Module) -> None:
    """Draw the matrices wider: the answers of a fresh model hardly depend on what it reads, and would all be equal."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=1.6 / weight.shape[1] ** 0.5)


def measure(arguments: argparse.Namespace, tokens: int, device: torch.device) -> dict[str, Any]:
    """Measure one number of image tokens."""
    scale = SCALES[arguments.scale]
    processor = make_processor(scale, tokens)
    model = make_models(scale, tokens, processor, device)[1]
    widen(model)
    # Only entries of the tokenizer are generated, and no end tokens, so that every answer has its full length
    model.lm_head.weight.data[len(processor.tokenizer) :] = 0
    model.generation_config.suppress_tokens = processor.tokenizer.all_special_ids
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        questions = make_questions(make_images(Path(folder), arguments.images))
        for number in range(arguments.rounds + 1):  # the first round is a warm-up
            turn, answers = {}, {}
            for shift in range(len(METHODS)):
                method = list(METHODS)[(number + shift) % len(METHODS)]
                synchronize(device)
                wall, cpu = time.perf_counter(), time.process_time()
                records = answer_questions(
                    model,
                    processor,
                    questions,
                    max_new_tokens=NEW_TOKENS,
                    num_workers=0,
                    progress_bar=False,
                    **METHODS[method],
                )
                synchronize(device)
                turn[method] = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
                answers[method] = [record["prediction"] for record in records]
            check_answers(answers, scale.dtype)
            if number > 0:
                rounds.append(turn)
    facts = {"image_tokens": tokens, "images": arguments.images, "questions": len(questions)}
    facts["different_answers"] = len(set(answers["shared"]))
    return {**facts, **summarize(rounds, len(questions))}


def check_answers(answers: dict[str, list[str]], dtype: torch.dtype) -> None:
    """In float32 all methods must have given the same answers; in lower precision ties may differ."""
    if dtype == torch.float32 and not answers["one by one"] == answers["batches"] == answers["shared"]:
        raise SystemExit(f"The answers differ, so the times cannot be compared: {answers}")


def summarize(rounds: list[dict[str, dict[str, float]]], count: int) -> dict[str, Any]:
    """Questions per second of each method, and ratios within rounds."""

    def ratio(slow: str, clock: str) -> dict[str, Any]:
        return spread([turn[slow][clock] / turn["shared"][clock] for turn in rounds])

    return {
        "methods": {
            method: {
                f"questions_per_{clock}_second": spread([count / turn[method][clock] for turn in rounds])
                for clock in ("cpu", "wall")
            }
            for method in METHODS
        },
        "ratios": {f"shared/{slow}, {clock}": ratio(slow, clock) for slow in METHODS for clock in ("cpu", "wall")},
    }


def table(case: dict[str, Any]) -> str:
    """Questions per second of each method, and how many times as many the shared prefix gives."""
    lines = [f"{case['image_tokens']} image tokens, {case['questions']} questions about {case['images']} images"]
    head = f"{'questions/CPU s':>18}{'questions/s':>14}{'shared is, CPU time':>26}{'shared is, wall':>26}"
    lines.append(f"{'':12}{head}")
    for method, measured in case["methods"].items():
        speeds = [measured[f"questions_per_{clock}_second"]["median"] for clock in ("cpu", "wall")]
        ratios = [case["ratios"][f"shared/{method}, {clock}"] for clock in ("cpu", "wall")]
        cells = [f"{found['median']:.2f} x ({found['min']:.2f}-{found['max']:.2f})" for found in ratios]
        lines.append(f"{method:12}{speeds[0]:>18.2f}{speeds[1]:>14.2f}{cells[0]:>26}{cells[1]:>26}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return measure_cases(argv, __doc__, {"images": 4, "rounds": 7}, measure, table)


if __name__ == "__main__":
    main()
