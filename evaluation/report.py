"""The HTML report of an evaluation: scores, a chart, and the questions with images and answers.

The report is a single file that needs no network: styles and script are inlined, images are small JPEGs in data URLs.
Text of models and data sets is untrusted. The template engine escapes every value, and the page's content security
policy blocks every request.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from jnana.processing.data import BadSampleError, thumbnail

from .questions import QuestionSet
from .summary import as_text, category_of, figure


THUMBNAIL_SIDE = 224  # pixels of the longer side; smaller images keep their size


@dataclass
class SplitResult:
    """Questions, answers and scores of one test set.

    Attributes:
        name (`str`): Its name in the arguments: test, unseen ...
        questions (`QuestionSet`): The test set.
        records (`list[dict]`): Return value of `answer_questions` on it.
        blind_records (`list[dict]`, *optional*): Return value of `answer_questions(..., blind=True)`.
        summary (`dict`): Return value of `summarise`; without references (`questions.scored`) a short form of it.
    """

    name: str
    questions: QuestionSet
    records: list[dict[str, Any]]
    blind_records: list[dict[str, Any]] | None
    summary: dict[str, Any]


def write_report(
    path: str | Path,
    splits: Sequence[SplitResult],
    *,
    title: str,
    settings: Mapping[str, Any],
    max_examples: int = 400,
) -> Path:
    """Write the report.

    Args:
        path (`str` or `Path`): The HTML file; its directory must exist.
        splits (`list[SplitResult]`): One or more test sets with references.
        title (`str`): Heading, for example the model's name.
        settings (`dict`): Names and values shown below the heading.
        max_examples (`int`): Questions shown with their images for each test set, drawn at random. Scores always
            cover all questions, and the report states how many questions it shows.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: if `max_examples` is negative.
    """
    if max_examples < 0:
        raise ValueError(f"max_examples is {max_examples}; it must be 0 (no examples) or more")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["percent"] = lambda share: as_text(share, percent=True)
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    environment.globals.update(figure=figure, ends=_ends)
    cards = [card for split in splits for card in _cards(split, max_examples)]
    page = environment.get_template("report.html").render(
        title=title,
        settings=settings,
        splits=splits,
        cards=cards,
        categories=sorted({card["category"] for card in cards}),
        total=sum(len(split.records) for split in splits),
        definitions={name: text for split in splits for name, text in split.summary["definitions"].items()},
        right_means=" / ".join(dict.fromkeys(split.questions.scoring.right_means for split in splits)),
        thumbnail_side=THUMBNAIL_SIDE,
    )
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def drawn_at_random(count: int, limit: int) -> list[int]:
    """A random sample of at most `limit` of the indices below `count`, sorted; the same sample in every call.

    Taking every k-th index instead could miss question types, because test sets often list them in rotation.
    """
    return sorted(random.Random(0).sample(range(count), min(count, limit)))


def _ends(scores: Mapping[str, Any], measure: Mapping[str, Any]) -> str:
    """The ends of a measure's interval as text."""
    ends = scores[f"{measure['name']}_interval"] or (None, None)
    return "–".join(as_text(end, measure["percent"]) for end in ends)


def _cards(split: SplitResult, limit: int) -> list[dict[str, Any]]:
    """The values that the template shows for single questions."""
    blind = {} if split.blind_records is None else dict(enumerate(split.blind_records))
    cards = []
    for index in drawn_at_random(len(split.records), limit):
        record = split.records[index]
        question = split.questions.questions[index]
        scoring = split.questions.scoring
        answered = record["prediction"] is not None
        credit = scoring.credit(record) if answered and scoring.credit is not None else None
        cards.append(
            {
                "split": split.name,
                "category": category_of(record),
                "source": record["source"],
                "history": record["history"],
                "question": record["question"],
                "truth": _truth(record["references"]),
                "prediction": record["prediction"],
                "blind": blind[index]["prediction"] if index in blind else None,
                "right": answered and scoring.is_right(record),
                "partial": None if credit in (None, 0.0, 1.0) else credit,
                "error": record.get("error"),
                "images": _thumbnails(split.questions, question) if "error" not in record else [],
            }
        )
    return cards


def _truth(references: Sequence[str]) -> str:
    """All references in one line, repeated ones with their count."""
    counts = Counter(reference.strip() for reference in references)
    return " / ".join(text if number == 1 else f"{text} ×{number}" for text, number in counts.most_common())


def _thumbnails(questions: QuestionSet, question) -> list[dict[str, Any]]:
    """The images of a question as small JPEGs in data URLs, with their sizes in pixels."""
    try:
        images = questions.images(question)
    except BadSampleError:  # the file was removed after the question was answered
        return []
    return [thumbnail(image, THUMBNAIL_SIDE) for image in images]
