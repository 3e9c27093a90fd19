"""Summarises answers: scores with intervals, overall and by question type, beside two baselines.

The first baseline is the same model *blind*: it sees grey images, so that only the wording of the question helps. The
second is the best constant answer for each question type.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from .measures import GENERAL, Scoring


UNCATEGORISED = "(no type)"

DEFINITIONS = {
    "blind": "the same model and questions, every image replaced by a grey one (128, 128, 128) of the same size",
    "majority": (
        "a constant answer to every question of a type: of the ten answers that are accepted for most questions of "
        "that type in this test set, the one with the highest score (the first measure; for POPE ties go to the "
        "higher F1). It is chosen with the references, which a model does not have. Captions: that of most images. "
        "Questions without a type form one type; remaining ties go to the alphabetically first answer"
    ),
    "interval": (
        "Wilson's 95 % interval for a share of n independent questions; too wide rather than too narrow for scores "
        "between 0 and 1, such as VQA accuracy. Of other measures: the 2.5 and 97.5 percentiles of 1,000 bootstrap "
        "resamples of the questions (of the images, where a measure counts images)"
    ),
    "n": "answered questions; questions whose images could not be read are listed as unanswered and not scored",
}


def majority_answers(records: Sequence[dict[str, Any]], scoring: Scoring = GENERAL) -> dict[str, str]:
    """For each question type the constant answer with the highest score (see `DEFINITIONS["majority"]`).

    Args:
        records (`list[dict]`): With `category` and `references`, as `answer_questions` returns them.
        scoring (`Scoring`): The measures.

    Returns:
        `dict[str, str]`: Question type (`UNCATEGORISED` for none) -> answer.
    """
    members: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        members.setdefault(category_of(record), []).append(record)
    return {category: _best_constant(part, scoring) for category, part in sorted(members.items())}


def _best_constant(records: Sequence[dict[str, Any]], scoring: Scoring) -> str:
    votes = Counter(answer for record in records for answer in {text.strip() for text in record["references"]})
    tried = sorted(votes, key=lambda answer: (-votes[answer], answer))[: scoring.constants]
    if len(tried) == 1:
        return tried[0]

    def scores(answer: str) -> list[float]:
        constant = [{**record, "prediction": answer} for record in records]
        return [measure.estimate(constant) or 0.0 for measure in scoring.deciding]

    ranks = {answer: [-score for score in scores(answer)] for answer in tried}
    return min(tried, key=lambda answer: (ranks[answer], answer))


def summarise(
    records: Sequence[dict[str, Any]],
    blind_records: Sequence[dict[str, Any]] | None = None,
    scoring: Scoring = GENERAL,
) -> dict[str, Any]:
    """Score a test set.

    Args:
        records (`list[dict]`): Return value of `answer_questions`.
        blind_records (`list[dict]`, *optional*): Its return value for the same questions with `blind=True`.
        scoring (`Scoring`): The measures.

    Returns:
        `dict`: `overall` and `categories` (question type -> the same), each holding `n`, each measure by name
        (`exact_match`, `exact_match_normalized` and `vqa_accuracy` by default, shares of 1) with its interval
        (`exact_match_interval` ...), `blind` and `majority` (same measures; `blind` is `None` without a blind run);
        then `majority_answers`, `measures` (name, label and whether tables show it in percent), `unanswered` (source
        and reason), `cut_off` (answers that reached `max_new_tokens`) and `definitions`. A measure in which no
        question has part is `None`.

    Raises:
        ValueError: if no question was answered, or the blind run holds other questions.
    """
    answered = answered_records(records)
    guesses = majority_answers(answered, scoring)
    constant = [{**record, "prediction": guesses[category_of(record)]} for record in answered]
    blind = None
    if blind_records is not None:
        blind = _same_questions(answered, blind_records)

    def part(indices: Sequence[int]) -> dict[str, Any]:
        return {
            **_scores([answered[index] for index in indices], scoring),
            "blind": None if blind is None else _scores([blind[index] for index in indices], scoring),
            "majority": _scores([constant[index] for index in indices], scoring),
        }

    members: dict[str, list[int]] = {}
    for index, record in enumerate(answered):
        members.setdefault(category_of(record), []).append(index)
    overall = part(range(len(answered)))
    alone = len(members) == 1  # nothing is computed twice
    return {
        "overall": overall,
        "categories": {category: overall if alone else part(indices) for category, indices in sorted(members.items())},
        "majority_answers": guesses,
        "measures": scoring.describe(),
        **unfinished(records),
        "definitions": {**{measure.name: measure.definition for measure in scoring.measures}, **DEFINITIONS},
    }


def answered_records(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records that hold an answer.

    Args:
        records (`list[dict]`): Return value of `answer_questions`.

    Raises:
        ValueError: if there is none; the first reasons are named.
    """
    answered = [record for record in records if record["prediction"] is not None]
    if not answered:
        reasons = "; ".join(record["error"] for record in records[:3])
        raise ValueError(f"none of the {len(records)} questions could be answered: {reasons}")
    return answered


def unfinished(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`unanswered` and `cut_off` of a summary: questions without an answer, and the number of truncated answers."""
    return {
        "unanswered": [
            {"source": record["source"], "question": record["question"], "error": record["error"]}
            for record in records
            if record["prediction"] is None
        ],
        "cut_off": sum(record["complete"] is False for record in records),
    }


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
    measures = [measure for measure in summary["measures"] if measure["shown"]]
    main, *others = measures
    header = ["type", "n", main["label"], "95 % interval", *(measure["label"] for measure in others)]
    header += ["blind", "majority", "constant answer"]
    lines = []
    for name, scores in [*summary["categories"].items(), ("all", summary["overall"])]:
        ends = scores[f"{main['name']}_interval"] or (None, None)
        lines.append(
            [
                name,
                str(scores["n"]),
                figure(scores, main),
                " - ".join(as_text(end, main["percent"]) for end in ends),
                *(figure(scores, measure) for measure in others),
                figure(scores["blind"], main),
                figure(scores["majority"], main),
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
    notes = [f"blind and majority: {main['label']}; definitions: results.json"]
    if "benchmark" in summary:
        notes.append(f"asked as: {summary['benchmark']['prompt']!r}")
    if summary["unanswered"]:
        first = summary["unanswered"][0]
        notes.append(f"{len(summary['unanswered'])} not answered and not scored, first: {first['error']}")
    if summary["cut_off"]:
        notes.append(f"{summary['cut_off']} answers were truncated at max_new_tokens")
    return "\n".join(
        [title, rule, joined(header), rule, *map(joined, lines[:-1]), rule, joined(lines[-1]), rule, *notes]
    )


def _scores(records: Sequence[dict[str, Any]], scoring: Scoring) -> dict[str, Any]:
    """The measures of answered questions, each with its interval."""
    scores = {measure.name: measure.score(records) for measure in scoring.measures}
    values = {name: value for name, (value, _) in scores.items()}
    intervals = {f"{name}_interval": None if ends is None else list(ends) for name, (_, ends) in scores.items()}
    return {"n": len(records), **values, **intervals}


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


def figure(scores: dict[str, Any] | None, measure: dict[str, Any]) -> str:
    """A measure of some questions as text, in percent where the measure is shown so; `-` where there is none.

    Args:
        scores (`dict`, *optional*): `overall` of a summary, one of its categories, or a baseline of these.
        measure (`dict`): One of the summary's `measures`.
    """
    return "-" if scores is None else as_text(scores[measure["name"]], measure["percent"])


def as_text(value: float | None, percent: bool) -> str:
    """A value as tables show it: in percent with one decimal, or with five significant digits."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if percent else f"{value:.5g}"


def _shortened(text: str, width: int = 28) -> str:
    text = normalize_space(text)
    return text if len(text) <= width else text[: width - 1] + "…"


def normalize_space(text: str) -> str:
    """Replace each run of white space by one space, so that a text fits on one line."""
    return " ".join(text.split())
