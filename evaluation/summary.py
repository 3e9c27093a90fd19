"""Summarises answers: scores with intervals, overall and by question type, beside two baselines.

The first baseline is the same model *blind*: it sees grey images, so that only the wording of the question helps. The
second is one constant answer for each question type.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from .metrics.scoring import exact_match, vqa_accuracy


UNCATEGORISED = "(no type)"

DEFINITIONS = {
    "exact_match": "share of answers that equal one of their references, both stripped of outer white space",
    "exact_match_normalized": "exact match after the answer normalisation of VQA v2",
    "vqa_accuracy": (
        "VQA v2: min(equal references among the others / 3, 1), averaged over leaving out each reference in turn; "
        "with fewer than four references the share of equal ones; answers and references normalised"
    ),
    "blind": "the same model and questions, every image replaced by a grey one (128, 128, 128) of the same size",
    "majority": (
        "a constant answer to every question of a type: the answer that is correct (exact match) for most questions "
        "of that type in this test set; an upper bound for constant answers, as it is chosen with the references. "
        "Questions without a type form one type; ties go to the alphabetically first answer"
    ),
    "interval": (
        "Wilson's 95 % interval for a share of n independent questions; too wide rather than too narrow for VQA "
        "accuracy, whose single scores may lie between 0 and 1"
    ),
    "n": "answered questions; questions whose images could not be read are listed as unanswered and not scored",
}


def wilson_interval(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share of `count` trials.

    Args:
        share (`float`): Observed share, 0 to 1.
        count (`int`): Trials, at least 1.
        z (`float`): Quantile of the normal distribution; 1.96 gives 95 %.

    Returns:
        `tuple[float, float]`: Lower and upper end, both within 0 and 1.
    """
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def majority_answers(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """For each question type the answer that is correct for most of its questions (see `DEFINITIONS["majority"]`).

    Args:
        records (`list[dict]`): With `category` and `references`, as `answer_questions` returns them.

    Returns:
        `dict[str, str]`: Question type (`UNCATEGORISED` for none) -> answer.
    """
    votes: dict[str, Counter] = {}
    for record in records:
        accepted = {reference.strip() for reference in record["references"]}
        votes.setdefault(category_of(record), Counter()).update(accepted)
    return {
        category: min(counts, key=lambda answer: (-counts[answer], answer))
        for category, counts in sorted(votes.items())
    }


def summarise(
    records: Sequence[dict[str, Any]], blind_records: Sequence[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Score a test set.

    Args:
        records (`list[dict]`): Return value of `answer_questions`.
        blind_records (`list[dict]`, *optional*): Its return value for the same questions with `blind=True`.

    Returns:
        `dict`: `overall` and `categories` (question type -> the same), each holding `n`, `exact_match`,
        `exact_match_normalized`, `vqa_accuracy` (shares of 1), `exact_match_interval` ..., `blind` and
        `majority` (same measures; `blind` is `None` without a blind run); then `majority_answers`, `unanswered`
        (source and reason), `cut_off` (answers that reached `max_new_tokens`) and `definitions`.

    Raises:
        ValueError: if no question was answered, or the blind run holds other questions.
    """
    answered = [record for record in records if record["prediction"] is not None]
    if not answered:
        reasons = "; ".join(record["error"] for record in records[:3])
        raise ValueError(f"none of the {len(records)} questions could be answered: {reasons}")
    guesses = majority_answers(answered)
    constant = [{**record, "prediction": guesses[category_of(record)]} for record in answered]
    blind = None
    if blind_records is not None:
        blind = _same_questions(answered, blind_records)

    def part(indices: Sequence[int]) -> dict[str, Any]:
        return {
            **_scores([answered[index] for index in indices]),
            "blind": None if blind is None else _scores([blind[index] for index in indices]),
            "majority": _scores([constant[index] for index in indices]),
        }

    members: dict[str, list[int]] = {}
    for index, record in enumerate(answered):
        members.setdefault(category_of(record), []).append(index)
    return {
        "overall": part(range(len(answered))),
        "categories": {category: part(indices) for category, indices in sorted(members.items())},
        "majority_answers": guesses,
        "unanswered": [
            {"source": record["source"], "question": record["question"], "error": record["error"]}
            for record in records
            if record["prediction"] is None
        ],
        "cut_off": sum(record["complete"] is False for record in answered),
        "definitions": DEFINITIONS,
    }


def is_right(record: dict[str, Any]) -> bool:
    """Whether the report and the contact sheet mark an answer as right: exact match after normalisation."""
    return record["prediction"] is not None and exact_match(record["prediction"], record["references"], normalize=True)


def category_of(record: dict[str, Any]) -> str:
    """The question type of a record; `UNCATEGORISED` if it has none."""
    return record["category"] or UNCATEGORISED


def format_table(summary: dict[str, Any], title: str) -> str:
    """The summary as a table for a terminal, in percent.

    Args:
        summary (`dict`): Return value of `summarise`.
        title (`str`): First line.

    Returns:
        `str`: Lines without a trailing line break.
    """
    header = ["type", "n", "exact match", "95 % interval", "VQA acc.", "blind", "majority", "constant answer"]
    lines = []
    for name, scores in [*summary["categories"].items(), ("all", summary["overall"])]:
        low, high = scores["exact_match_interval"]
        lines.append(
            [
                name,
                str(scores["n"]),
                _percent(scores["exact_match"]),
                f"{_percent(low)} - {_percent(high)}",
                _percent(scores["vqa_accuracy"]),
                "-" if scores["blind"] is None else _percent(scores["blind"]["exact_match"]),
                _percent(scores["majority"]["exact_match"]),
                _shortened(summary["majority_answers"].get(name, "")),
            ]
        )
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    left_aligned = (0, len(header) - 1)

    def joined(line: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if column in left_aligned else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    rule = "-" * len(joined([*header[:-1], "x" * widths[-1]]))
    notes = ["blind and majority: exact match; definitions: results.json"]
    if summary["unanswered"]:
        first = summary["unanswered"][0]
        notes.append(f"{len(summary['unanswered'])} not answered and not scored, first: {first['error']}")
    if summary["cut_off"]:
        notes.append(f"{summary['cut_off']} answers were truncated at max_new_tokens")
    return "\n".join(
        [title, rule, joined(header), rule, *map(joined, lines[:-1]), rule, joined(lines[-1]), rule, *notes]
    )


def _scores(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The scores of answered questions, each with its interval."""
    count = len(records)
    pairs = [(record["prediction"], record["references"]) for record in records]
    means = {
        "exact_match": sum(exact_match(*pair) for pair in pairs) / count,
        "exact_match_normalized": sum(exact_match(*pair, normalize=True) for pair in pairs) / count,
        "vqa_accuracy": sum(vqa_accuracy(*pair) for pair in pairs) / count,
    }
    intervals = {f"{name}_interval": list(wilson_interval(mean, count)) for name, mean in means.items()}
    return {"n": count, **means, **intervals}


def _same_questions(answered: Sequence[dict], blind_records: Sequence[dict]) -> list[dict[str, Any]]:
    """The blind records of the answered questions, in their order."""
    # a key is "run-question"; the two runs have different run keys
    by_question = {record["key"].split("-", 1)[1]: record for record in blind_records}
    found = [by_question.get(record["key"].split("-", 1)[1]) for record in answered]
    missing = [
        record for record, twin in zip(answered, found, strict=True) if twin is None or twin["prediction"] is None
    ]
    if missing:
        raise ValueError(
            f"blind_records has no answer to {len(missing)} of {len(answered)} questions (first: "
            f"{missing[0]['source']}); run answer_questions on the same rows with blind=True"
        )
    return [record for record in found if record is not None]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _shortened(text: str, width: int = 28) -> str:
    text = normalize_space(text)
    return text if len(text) <= width else text[: width - 1] + "…"


def normalize_space(text: str) -> str:
    """Replace each run of white space by one space, so that a text fits on one line."""
    return " ".join(text.split())
