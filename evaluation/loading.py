"""Reads the test sets that the arguments of run_evaluate.py name."""

import logging
from pathlib import Path

from jnana.processing.data import load_rows

from .arguments import EvaluationArguments
from .benchmarks import BENCHMARKS, BenchmarkFiles, BenchmarkQuestions
from .questions import QuestionSet


logger = logging.getLogger(__name__)


def load_questions(args: EvaluationArguments) -> dict[str, QuestionSet]:
    """Read all test sets.

    Args:
        args (`EvaluationArguments`): Checked arguments of run_evaluate.py.

    Returns:
        `dict[str, QuestionSet]`: Name of each test set -> its questions.

    Raises:
        ValueError, FileNotFoundError: as `jnana.load_rows` and `BenchmarkQuestions`, and if a test set holds no
            question.
    """
    questions: dict[str, QuestionSet] = {}
    for name, source in args.test_sets.items():
        if args.benchmark is not None:
            questions[name] = BenchmarkQuestions(args.benchmark, benchmark_files(args), args.max_rows)
        else:
            rows = load_rows(
                source,
                format=args.eval_format,
                image_folder=args.image_folders[name],
                split=args.eval_split or "train",
                streaming=args.streaming,
                independent_turns=args.independent_turns,
                prompt=args.prompt,
                max_rows=args.max_rows,
                **({} if args.text_column is None else {"text_column": args.text_column}),
            )
            questions[name] = QuestionSet(rows)
        logger.info(f"{name}: {len(questions[name])} questions in {source}")
    return questions


def benchmark_files(args: EvaluationArguments) -> BenchmarkFiles:
    """The files of the benchmark that the arguments name.

    Args:
        args (`EvaluationArguments`): Checked arguments with a `benchmark`.
    """
    questions = Path(str(args.questions_file))
    folder = args.image_folders[str(args.benchmark)]
    return BenchmarkFiles(
        questions=questions,
        annotations=None if args.annotations_file is None else Path(args.annotations_file),
        ocr=None if args.ocr_file is None else Path(args.ocr_file),
        images=questions if folder is None else Path(folder),
        split=args.eval_split or BENCHMARKS[str(args.benchmark)].split,
    )
