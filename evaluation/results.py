"""Answers the test sets of a run, writes results.json, report and contact sheets, and selects scores for the card."""

import dataclasses
import importlib.util
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import ModelCard

from jnana.processing.data.paths import is_hub_id

from .arguments import EvaluationArguments
from .contact_sheet import write_contact_sheet
from .generation import answer_questions
from .questions import QuestionSet
from .report import SplitResult, write_report
from .summary import format_table, summarise


logger = logging.getLogger(__name__)

CARD_METRICS = ("exact_match", "vqa_accuracy")


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


def find_card(args: EvaluationArguments) -> Path | None:
    """The model card to add the scores to.

    Args:
        args (`EvaluationArguments`): The arguments of the run.

    Returns:
        `Path` or `None`: README.md of the evaluated checkpoint. `None` without `update_card`, for a Hub id, for a
        checkpoint without a card, for a file of the Hub's cache (a link), for a card that can't be written, and if
        `max_rows` limits the test sets.

    Raises:
        ValueError: if the metadata of the card is not valid YAML.
    """
    card = Path(str(args.model_name_or_path)) / "README.md"
    if not args.update_card or not card.is_file() or card.is_symlink():
        return None
    if args.max_rows is not None:
        logger.info(f"The scores will not be added to {card}, because max_rows={args.max_rows} limits the test sets")
        return None
    if not os.access(card, os.W_OK):
        logger.info(f"The scores will not be added to {card}, because the file is not writable")
        return None
    try:
        ModelCard.load(card)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{card} has invalid metadata; correct it, or pass --update_card false: {error}") from error
    return card


def card_scores(args: EvaluationArguments, results: Sequence[SplitResult]) -> list[dict[str, Any]]:
    """The scores for the model card.

    Args:
        args (`EvaluationArguments`): The arguments of the run.
        results (`list[SplitResult]`): One for each test set.

    Returns:
        `list[dict]`: Arguments of `jnana.training.cards.EvaluationResult`, one for each test set and metric. A local
        test set is named by the last part of its path.
    """
    scores = []
    for result in results:
        source, overall = args.test_sets[result.name], result.summary["overall"]
        on_hub = is_hub_id(source)
        for metric in CARD_METRICS:
            scores.append(
                {
                    "dataset": source if on_hub else Path(source).name,
                    "split": args.eval_split if on_hub else result.name,
                    "metric": metric,
                    "value": overall[metric],
                    "interval": tuple(overall[f"{metric}_interval"]),
                    "num_questions": overall["n"],
                }
            )
    return scores
