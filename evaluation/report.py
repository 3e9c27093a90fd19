"""One HTML page with everything an evaluation found: scores, a chart, and the questions with pictures and answers.

The page is a single file that needs no network: styles and script are inside it, pictures are small JPEGs in data
URLs. What models and data sets wrote is untrusted text; the template engine escapes every value, and the page's own
policy forbids it to load anything.
"""

import base64
import io
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from jnana.processing.data import BadSampleError

from .questions import QuestionSet
from .summary import category_of, is_right
from .vqa_accuracy import vqa_accuracy


THUMBNAIL_SIDE = 224  # pixels of the longer side; larger pictures are made smaller
THUMBNAIL_QUALITY = 85


@dataclass
class SplitResult:
    """All there is to tell about one test set.

    Attributes:
        name (`str`): As people call it: test, unseen ...
        questions (`QuestionSet`): The test set.
        records (`list[dict]`): Of `answer_questions` on it.
        blind_records (`list[dict]`, *optional*): Of `answer_questions(..., blind=True)`.
        summary (`dict`): Of `summarise`.
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
    """Write the page.

    Args:
        path (`str` or `Path`): The HTML file; its folder must exist.
        splits (`list[SplitResult]`): One or more test sets.
        title (`str`): Heading, say the model's name.
        settings (`dict`): Shown under the heading as they are.
        max_examples (`int`): Questions shown with their pictures per test set, drawn at random; scores are always of
            all questions, and the page says how many of how many it shows.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: if `max_examples` is negative.
    """
    if max_examples < 0:
        raise ValueError(f"max_examples is {max_examples}; it must be 0 (no pictures) or more")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}"
    cards = [card for split in splits for card in _cards(split, max_examples)]
    page = environment.get_template("report.html").render(
        title=title,
        settings=settings,
        splits=splits,
        cards=cards,
        categories=sorted({card["category"] for card in cards}),
        total=sum(len(split.records) for split in splits),
        definitions=splits[0].summary["definitions"],
        thumbnail_side=THUMBNAIL_SIDE,
    )
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def drawn_at_random(count: int, limit: int) -> list[int]:
    """At most `limit` of the indices below `count`, in order: the same draw each time, and nobody's choice.

    Every k-th would not do: test sets often list the question types in turns.
    """
    return sorted(random.Random(0).sample(range(count), min(count, limit)))


def _cards(split: SplitResult, limit: int) -> list[dict[str, Any]]:
    """What the page shows of single questions."""
    blind = {} if split.blind_records is None else dict(enumerate(split.blind_records))
    cards = []
    for index in drawn_at_random(len(split.records), limit):
        record = split.records[index]
        question = split.questions.questions[index]
        score = None if record["prediction"] is None else vqa_accuracy(record["prediction"], record["references"])
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
                "right": is_right(record),
                "partial": None if score in (None, 0.0, 1.0) else score,
                "error": record.get("error"),
                "pictures": _pictures(split.questions, question) if "error" not in record else [],
            }
        )
    return cards


def _truth(references: Sequence[str]) -> str:
    """All references in one line, repeated ones with their number."""
    counts = Counter(reference.strip() for reference in references)
    return " / ".join(text if number == 1 else f"{text} ×{number}" for text, number in counts.most_common())


def _pictures(questions: QuestionSet, question) -> list[dict[str, Any]]:
    """The thumbnails of a question, with the size they have."""
    try:
        images = questions.images(question)
    except BadSampleError:  # readable when it was asked about, gone since
        return []
    return [thumbnail(image) for image in images]


def thumbnail(image: Image.Image) -> dict[str, Any]:
    """A picture as a small JPEG in a data URL: `{"url": str, "width": int, "height": int}` (pixels)."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=THUMBNAIL_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"url": f"data:image/jpeg;base64,{data}", "width": small.width, "height": small.height}
