"""Answers all test sets of a run, and writes results.json, the report and the contact sheets."""

import dataclasses
import importlib.util
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from .arguments import EvaluationArguments
from .contact_sheet import write_contact_sheet
from .generation import answer_questions
from .questions import QuestionSet
from .report import SplitResult, write_report
from .summary import format_table, summarise


logger = logging.getLogger(__name__)


def answer_test_set(
    model: torch.nn.Module, processor: Any, args: EvaluationArguments, name: str, questions: QuestionSet
) -> SplitResult:
    """Answer one test set with its images and, with `blind`, with grey ones.

    Args:
        model (`PreTrainedModel`): As [`answer_questions`] takes it.
        processor (`ProcessorMixin`): Its processor.
        args (`EvaluationArguments`): How to answer, and the output directory.
        name (`str`): Name of the test set.
        questions (`QuestionSet`): The test set.

    Returns:
        `SplitResult`: Answers and scores.
    """

    def answers(blind: bool) -> list[dict[str, Any]]:
        return answer_questions(
            model,
            processor,
            questions,
            args.batch_size,
            args.max_new_tokens,
            blind,
            predictions_file=args.folder_of(name) / ("predictions_blind.jsonl" if blind else "predictions.jsonl"),
            num_workers=args.num_workers,
            max_image_pixels=args.max_image_pixels,
        )

    records = answers(blind=False)
    blind_records = answers(blind=True) if args.blind else None
    return SplitResult(name, questions, records, blind_records, summarise(records, blind_records))


def write_results(args: EvaluationArguments, results: Sequence[SplitResult], fingerprint: str) -> None:
    """Write all files of a run to `output_dir`, and log a table for each test set.

    Args:
        args (`EvaluationArguments`): The arguments of the run; stored in results.json.
        results (`list[SplitResult]`): One for each test set.
        fingerprint (`str`): Return value of `model_fingerprint`.
    """
    folder = Path(str(args.output_dir))
    written = {
        "model": args.model_name_or_path,
        "model_fingerprint": fingerprint,
        "settings": dataclasses.asdict(args),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "splits": {result.name: result.summary for result in results},
    }
    text = json.dumps(written, indent=2, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    for result in results:
        logger.info(f"\n{format_table(result.summary, f'{result.name} ({args.test_sets[result.name]})')}")
        if importlib.util.find_spec("matplotlib") is None:
            logger.warning("examples.png is not drawn, because matplotlib is not installed: pip install matplotlib")
            continue
        write_contact_sheet(args.folder_of(result.name) / "examples.png", result.questions, result.records)
    settings = {
        "model": args.model_name_or_path,
        "data": ", ".join(args.test_sets.values()),
        "decoding": f"greedy, at most {args.max_new_tokens} new tokens",
        "weights": fingerprint,
    }
    title = args.title or Path(str(args.model_name_or_path)).name
    report = write_report(
        folder / "report.html", results, title=title, settings=settings, max_examples=args.max_examples
    )
    logger.info(f"\nQuestions, images and answers: {report}\nAll scores: {folder / 'results.json'}")
