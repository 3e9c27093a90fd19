"""Draws one PNG with test images, questions (Q), true answers (T) and predictions (P), for a README or a talk."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .measures import Scoring
from .questions import QuestionSet
from .report import drawn_at_random
from .summary import normalize_space


RIGHT, WRONG, INK = "#12752f", "#c3281c", "#1d1f23"
CELL_WIDTH, IMAGE_HEIGHT, LINE_HEIGHT = 1.9, 1.5, 0.135  # inches
CHARACTERS_A_LINE = 27
MAX_LINES = 8  # of text below one image


def write_contact_sheet(
    path: str | Path,
    questions: QuestionSet,
    records: Sequence[dict[str, Any]],
    *,
    columns: int = 6,
    max_examples: int = 30,
) -> Path | None:
    """Draw a contact sheet. Needs matplotlib.

    The examples are a random sample of the answered questions with exactly one image, whether right or wrong.

    Args:
        path (`str` or `Path`): The PNG file; its directory must exist.
        questions (`QuestionSet`): The test set.
        records (`list[dict]`): Return value of `answer_questions` on it.
        columns (`int`): Images in each row.
        max_examples (`int`): Largest number of images.

    Returns:
        `Path` or `None`: The file; `None`, and no file is written, if there is no such question.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    usable = [
        index
        for index, question in enumerate(questions.questions)
        if records[index]["prediction"] is not None and len(questions.rows[question.row]["images"]) == 1
    ]
    chosen = [usable[position] for position in drawn_at_random(len(usable), max_examples)]
    if not chosen:
        return None
    texts = [_lines(records[index], questions.scoring) for index in chosen]
    rows = [range(start, min(start + columns, len(chosen))) for start in range(0, len(chosen), columns)]
    heights = [IMAGE_HEIGHT + 0.25 + LINE_HEIGHT * max(len(texts[cell]) for cell in row) for row in rows]

    figure = Figure(figsize=(CELL_WIDTH * columns, sum(heights)), facecolor="white")
    FigureCanvasAgg(figure)
    width, height = figure.get_size_inches()
    top = height
    for row, row_height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            image = questions.images(questions.questions[chosen[cell]])
            left = (column + 0.04) * CELL_WIDTH
            box = (
                left / width,
                (top - IMAGE_HEIGHT) / height,
                0.92 * CELL_WIDTH / width,
                0.96 * IMAGE_HEIGHT / height,
            )
            axes = figure.add_axes(box, anchor="NW")
            axes.imshow(image[0])
            axes.set_axis_off()
            for number, (line, colour) in enumerate(texts[cell]):
                y = top - IMAGE_HEIGHT - 0.06 - number * LINE_HEIGHT
                # parse_math=False: a dollar sign in an answer does not start a formula
                figure.text(
                    left / width, y / height, line, color=colour, fontsize=7.5, va="top", ha="left", parse_math=False
                )
        top -= row_height
    path = Path(path)
    figure.savefig(path, dpi=110)
    return path


def _lines(record: dict[str, Any], scoring: Scoring) -> list[tuple[str, str]]:
    """The text below one image: wrapped lines with their colours."""
    parts = [
        (f"Q: {record['question']}", INK),
        (f"T: {record['references'][0]}", INK),
        (f"P: {record['prediction']}", RIGHT if scoring.is_right(record) else WRONG),
    ]
    lines = []
    for text, colour in parts:
        printable = "".join(character if character.isprintable() else "\ufffd" for character in normalize_space(text))
        wrapped = textwrap.wrap(printable, CHARACTERS_A_LINE, max_lines=MAX_LINES // 2, placeholder=" …")
        lines += [(line, colour) for line in wrapped]
    return lines
