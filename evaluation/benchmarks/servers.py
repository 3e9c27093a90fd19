"""Writes answers in the form that each benchmark's server or evaluation program takes.

A question whose image could not be read gets an empty answer, because servers want an answer to every question.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..measures import Record
from .readers import LETTERS
from .rules import chosen_letter, gqa_prediction, normalize_evalai


def write_vqav2(records: Sequence[Record], folder: Path) -> list[Path]:
    """EvalAI's list of `question_id` and `answer`; answers normalised, as LLaVA-1.5 sent them."""
    return _write_json(
        folder / "vqav2_results.json",
        [{"question_id": record["question_id"], "answer": normalize_evalai(_text(record))} for record in records],
    )


def write_textvqa(records: Sequence[Record], folder: Path) -> list[Path]:
    """EvalAI's list of `question_id` and `answer`, which the server normalises."""
    return _write_json(
        folder / "textvqa_results.json",
        [{"question_id": record["question_id"], "answer": _text(record)} for record in records],
    )


def write_gqa(records: Sequence[Record], folder: Path) -> list[Path]:
    """The predictions file of GQA's eval.py: a list of `questionId` and `prediction`."""
    return _write_json(
        folder / "gqa_predictions.json",
        [{"questionId": record["question_id"], "prediction": gqa_prediction(_text(record))} for record in records],
    )


def write_pope(records: Sequence[Record], folder: Path) -> list[Path]:
    """For each split a JSON Lines file of `question` and `answer`, in the order of the label file."""
    paths = []
    for split in dict.fromkeys(record["category"] for record in records):
        lines = [
            json.dumps({"question": record["asked"], "answer": _text(record)}, ensure_ascii=False)
            for record in records
            if record["category"] == split
        ]
        paths += _write(folder / f"pope_{split}_answers.jsonl", "".join(f"{line}\n" for line in lines))
    return paths


def write_scienceqa(records: Sequence[Record], folder: Path) -> list[Path]:
    """The results file of ScienceQA's evaluate_acc.py: the number of the choice (-1 for none) by problem."""
    letters = {record["question_id"]: chosen_letter(_text(record), record["choices"]) for record in records}
    results = {problem: -1 if letter is None else LETTERS.index(letter) for problem, letter in letters.items()}
    outputs = {record["question_id"]: _text(record) for record in records}
    return _write_json(folder / "scienceqa_results.json", {"results": results, "outputs": outputs})


def write_mme(records: Sequence[Record], folder: Path) -> list[Path]:
    """For each task the file of MME's calculation.py: image file, question, true answer and answer, between tabs."""
    tasks: dict[str, list[str]] = {}
    for record in records:
        answer = " ".join(_text(record).split())  # one line, without tabs
        cells = [record["file"], record["asked"], record["references"][0].capitalize(), answer]
        tasks.setdefault(record["category"], []).append("\t".join(cells) + "\n")
    return [path for task, lines in tasks.items() for path in _write(folder / "mme" / f"{task}.txt", "".join(lines))]


def write_coco_captions(records: Sequence[Record], folder: Path) -> list[Path]:
    """The results file of COCO's caption evaluation: a list of `image_id` and `caption`."""
    return _write_json(
        folder / "captions_results.json",
        [{"image_id": record["question_id"], "caption": _text(record)} for record in records],
    )


def _text(record: Record) -> str:
    return record["prediction"] or ""


def _write_json(path: Path, content: Any) -> list[Path]:
    return _write(path, json.dumps(content, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> list[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return [path]
