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
from .benchmarks import BenchmarkQuestions
from .contact_sheet import write_contact_sheet
from .generation import answer_questions
from .questions import QuestionSet
from .report import SplitResult, write_report
from .summary import answered_records, format_table, summarise, unfinished


logger = logging.getLogger(__name__)


def answer_test_set(
    model: torch.nn.Module, processor: Any, args: EvaluationArguments, name: str, questions: QuestionSet
) -> SplitResult:
    """Answer one test set with its images and, with `blind`, with grey ones, and score the answers.

    Without references (the test split of a benchmark) there are no scores, and no blind answers.

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
        records = answer_questions(
            model,
            processor,
            questions,
            args.batch_size,
            args.max_new_tokens,
            blind,
            share_prefix=args.share_prefix,
            predictions_file=args.folder_of(name) / ("predictions_blind.jsonl" if blind else "predictions.jsonl"),
            num_workers=args.num_workers,
            max_image_pixels=args.max_image_pixels,
        )
        return [{**record, **question.details} for record, question in zip(records, questions.questions, strict=True)]

    records = answers(blind=False)
    blind_records = answers(blind=True) if args.blind and questions.scored else None
    if questions.scored:
        summary = summarise(records, blind_records, questions.scoring)
    else:
        summary = {"n": len(answered_records(records)), "scored": False, **unfinished(records)}
    if isinstance(questions, BenchmarkQuestions):
        summary["benchmark"] = questions.describe()
    return SplitResult(name, questions, records, blind_records, summary)


def write_results(args: EvaluationArguments, results: Sequence[SplitResult], fingerprint: str) -> None:
    """Write all files of a run to `output_dir`, and log a table for each test set.

    The answers to a benchmark are also written in the form of its server, to the directory `server`. Test sets without
    references have no table, no examples.png and no part in the report.

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
    for result in results:
        if isinstance(result.questions, BenchmarkQuestions):
            files = result.questions.write_for_server(result.records, args.folder_of(result.name) / "server")
            result.summary["benchmark"]["server_files"] = [str(file.relative_to(folder)) for file in files]
            logger.info(f"{result.name}, for its server: {', '.join(map(str, files))}")
    text = json.dumps(written, indent=2, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    scored = [result for result in results if result.questions.scored]
    for result in scored:
        logger.info(f"\n{format_table(result.summary, f'{result.name} ({args.test_sets[result.name]})')}")
        if importlib.util.find_spec("matplotlib") is None:
            logger.warning("examples.png is not drawn, because matplotlib is not installed: pip install matplotlib")
            continue
        write_contact_sheet(args.folder_of(result.name) / "examples.png", result.questions, result.records)
    for result in results:
        if not result.questions.scored:
            logger.info(f"{result.name}: no scores, because its files hold no answers")
    if scored:
        _write_report(args, scored, fingerprint)
    logger.info(f"All scores: {folder / 'results.json'}")


def _write_report(args: EvaluationArguments, results: Sequence[SplitResult], fingerprint: str) -> None:
    settings = {
        "model": args.model_name_or_path,
        "data": ", ".join(args.test_sets.values()),
        "decoding": f"greedy, at most {args.max_new_tokens} new tokens",
        "weights": fingerprint,
    }
    prompts = {result.summary["benchmark"]["prompt"] for result in results if "benchmark" in result.summary}
    if prompts:
        settings["prompt"] = " | ".join(sorted(prompts))
    report = write_report(
        Path(str(args.output_dir)) / "report.html",
        results,
        title=args.title or Path(str(args.model_name_or_path)).name,
        settings=settings,
        max_examples=args.max_examples,
    )
    logger.info(f"\nQuestions, images and answers: {report}")


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
        `list[dict]`: Arguments of `jnana.training.cards.EvaluationResult`, one for each test set and metric, and for
        each split of a benchmark that is reported by split. A local test set is named by the last part of its path, a
        benchmark by its title.
    """
    scores = []
    for result in (result for result in results if result.questions.scored):
        source = args.test_sets[result.name]
        on_hub = is_hub_id(source)
        dataset, split = (source, args.eval_split or "train") if on_hub else (Path(source).name, result.name)
        parts, prompt = {split: result.summary["overall"]}, None
        if isinstance(result.questions, BenchmarkQuestions):
            benchmark = result.questions.benchmark
            dataset, prompt = benchmark.title, benchmark.prompt
            parts = {result.questions.files.split or Path(source).stem: result.summary["overall"]}
            if benchmark.by_split:
                splits = result.summary["categories"]
                parts = {**splits, **({"all splits": result.summary["overall"]} if len(splits) > 1 else {})}
        for part, values in parts.items():
            for measure in result.questions.scoring.shown:
                if values[measure.name] is not None:
                    scores.append(
                        {
                            "dataset": dataset,
                            "split": part,
                            "metric": measure.name,
                            "value": values[measure.name],
                            "interval": tuple(values[f"{measure.name}_interval"]),
                            "num_questions": values["n"],
                            "blind": None if values["blind"] is None else values["blind"][measure.name],
                            "majority": values["majority"][measure.name],
                            "percent": measure.percent,
                            "prompt": prompt,
                        }
                    )
    return scores
