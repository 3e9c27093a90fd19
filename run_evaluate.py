"""Evaluation: answer test sets, and say how good the answers are and how much of that the pictures are worth.

Every question is answered greedily, once with its pictures and once blind (with grey ones). In `output_dir`:

    results.json         all scores with intervals, overall and by question type, and how they are defined
    report.html          the same for people, with pictures, questions, true and given answers
    examples.png         a contact sheet of such examples
    predictions.jsonl    every single answer (predictions_blind.jsonl: the blind ones); an interrupted run that is
                         started again goes on from here

    python run_evaluate.py recipes/chess_demo/evaluate.yaml
    python run_evaluate.py recipes/chess_demo/evaluate.yaml --eval_data '{"test": "a.json", "unseen": "b.json"}'
    python run_evaluate.py --model_name_or_path outputs/sft --eval_data a.json --image_folder images --output_dir out
    accelerate launch --num_processes 4 run_evaluate.py recipes/chess_demo/evaluate.yaml --dtype bfloat16

With several test sets the predictions and examples.png are in a folder each. `python run_evaluate.py --help` lists
all options.
"""

import dataclasses
import json
import logging
import os
import sys
from pathlib import Path

import torch
import transformers

from jnana.evaluation import (
    QuestionSet,
    SplitResult,
    answer_questions,
    format_table,
    model_fingerprint,
    process_state,
    summarise,
    write_contact_sheet,
    write_report,
)
from jnana.evaluation.arguments import EvaluationArguments
from jnana.processing.data import load_rows
from jnana.training.arguments import parse_arguments
from jnana.training.loading import load_model
from jnana.training.option_checks import check_output_dir, check_quantization, check_source


logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    # 1. Arguments and logging
    (args,) = parse_arguments([EvaluationArguments], argv)
    state = process_state()
    level = logging.INFO if state.is_main_process else logging.WARNING
    logging.basicConfig(stream=sys.stdout, level=level, format="%(message)s", force=True)
    logger.info(f"{state.num_processes} process{'es' if state.num_processes > 1 else ''} on {state.device}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it is the dataloader workers that work in parallel

    # 2. Everything that can be refused before the model is loaded, the test sets included
    args.check()
    for source in args.test_sets.values():
        check_source("eval_data", source)
    check_source("model_name_or_path", args.model_name_or_path)
    check_output_dir(args.output_dir)
    check_quantization({"quantization": args.quantization or "none", "compute_dtype": args.dtype}, state.device)
    questions = {name: load_questions(args, name) for name in args.test_sets}

    # 3. Model
    loading = {"trust_remote_code": args.trust_remote_code, "dtype": args.dtype, "quantization": args.quantization}
    if args.attn_implementation is not None:
        loading["attn_implementation"] = args.attn_implementation
    # straight to its device: a quantised model cannot be moved afterwards
    model, processor = load_model(args.model_name_or_path, device_map={"": state.device}, **loading)

    # 4. Answers, with pictures and blind
    results = [answer_test_set(args, model, processor, name, asked) for name, asked in questions.items()]

    # 5. Results
    if state.is_main_process:
        write_results(args, results, model_fingerprint(model))
    state.wait_for_everyone()


def load_questions(args: EvaluationArguments, name: str) -> QuestionSet:
    """Read one test set."""
    rows = load_rows(
        args.test_sets[name],
        format=args.eval_format,
        image_folder=args.image_folders[name],
        split=args.eval_split,
        streaming=args.streaming,
        independent_turns=args.independent_turns,
        prompt=args.prompt,
        max_rows=args.max_rows,
    )
    questions = QuestionSet(rows)
    logger.info(f"{name}: {len(questions)} questions in {args.test_sets[name]}")
    return questions


def answer_test_set(args: EvaluationArguments, model, processor, name: str, questions: QuestionSet) -> SplitResult:
    """Answer one test set with its pictures and, if asked for, blind."""
    options = {"num_workers": args.num_workers, "max_image_pixels": args.max_image_pixels}
    folder = args.folder_of(name)

    def answers(blind: bool) -> list[dict]:
        file = folder / ("predictions_blind.jsonl" if blind else "predictions.jsonl")
        return answer_questions(
            model, processor, questions, args.batch_size, args.max_new_tokens, blind, predictions_file=file, **options
        )

    records = answers(blind=False)
    blind_records = answers(blind=True) if args.blind else None
    return SplitResult(name, questions, records, blind_records, summarise(records, blind_records))


def write_results(args: EvaluationArguments, results: list[SplitResult], fingerprint: str) -> None:
    """Write results.json, the pages and the pictures, and log the tables."""
    folder = Path(args.output_dir)
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
        write_contact_sheet(args.folder_of(result.name) / "examples.png", result.questions, result.records)
        logger.info(f"\n{format_table(result.summary, f'{result.name} ({args.test_sets[result.name]})')}")
    settings = {
        "model": args.model_name_or_path,
        "data": ", ".join(args.test_sets.values()),
        "decoding": f"greedy, at most {args.max_new_tokens} new tokens",
        "weights": fingerprint,
    }
    title = args.title or Path(args.model_name_or_path).name
    report = write_report(
        folder / "report.html", results, title=title, settings=settings, max_examples=args.max_examples
    )
    logger.info(f"\nPictures and answers: {report}\nAll numbers: {folder / 'results.json'}")


if __name__ == "__main__":
    main(sys.argv[1:])
