"""A benchmark's questions in the form that `answer_questions` asks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jnana.processing.data.rows import IMAGE_PART, message, text_part

from ..questions import Question, QuestionSet, image_state
from .files import BenchmarkFiles, check_images
from .table import BENCHMARKS, Benchmark


class BenchmarkQuestions(QuestionSet):
    """The questions of one benchmark. All questions about an image have the same row.

    Args:
        name (`str`): A key of `BENCHMARKS`.
        files (`BenchmarkFiles`): Its official files.
        max_rows (`int`, *optional*): Use only the first questions.

    Attributes:
        benchmark (`Benchmark`): Its prompt, measures and server format.
        scored (`bool`): Whether the files hold the answers. Those of test splits are kept by the server.

    Raises:
        ValueError, FileNotFoundError: naming file, record and field, if a file is missing or has another form, or an
            image is missing.
    """

    def __init__(self, name: str, files: BenchmarkFiles, max_rows: int | None = None):
        self.name, self.files = name, files
        self.benchmark: Benchmark = BENCHMARKS[name]
        self.scoring = self.benchmark.scoring
        items = self.benchmark.read(files)[:max_rows]
        check_images(items)
        unanswered = [item for item in items if not item.references]
        if 0 < len(unanswered) < len(items):
            raise ValueError(
                f"{files.questions} has no answers to {len(unanswered)} of {len(items)} questions (first: "
                f"{unanswered[0].source}); give a file with all answers, or, for a test split, with none"
            )
        self.scored = not unanswered
        self.rows: list[dict[str, Any]] = []
        self.questions: list[Question] = []
        row_of: dict[Path, int] = {}
        for item in items:
            if item.image not in row_of:
                row_of[item.image] = len(self.rows)
                self.rows.append({"images": [{"path": str(item.image), "bytes": None}]})
            asked = [message("user", IMAGE_PART, text_part(self.benchmark.prompt.format(**item.fields)))]
            row = row_of[item.image]
            question = Question(item.source, row, asked, item.references, item.category)
            question.details = {"question_id": item.question_id, **item.details}
            self.questions.append(question)
        self._set_keys([image_state(row["images"]) for row in self.rows])

    def describe(self) -> dict[str, Any]:
        """What results.json says about the benchmark: its name, its prompt, and its files."""
        files = {"questions_file": self.files.questions, "annotations_file": self.files.annotations}
        files |= {"ocr_file": self.files.ocr, "image_folder": self.files.images}
        return {
            "name": self.name,
            "title": self.benchmark.title,
            "prompt": self.benchmark.prompt,
            "prompt_of": self.benchmark.prompt_of,
            **{option: None if path is None else str(path) for option, path in files.items()},
        }

    def write_for_server(self, records: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
        """Write the answers in the form that the benchmark's server takes.

        Args:
            records (`list[dict]`): One record for each question, with its details.
            folder (`Path`): Where; made if it does not exist.

        Returns:
            `list[Path]`: The files.
        """
        return self.benchmark.write(records, folder)
