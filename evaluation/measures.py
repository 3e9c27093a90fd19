"""What a test set is scored by: named measures, each with a 95 % interval.

A measure takes the records of answered questions (see `answer_questions`) and returns one number. A `Share` is the
mean of values between 0 and 1, with Wilson's interval. A `Statistic` is a function of sums over questions or images
(F1, a sum of points, BLEU), with a bootstrap interval. `GENERAL` scores every test set that is no benchmark.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .metrics.scoring import exact_match, vqa_accuracy


Record = dict[str, Any]
Scored = tuple[float | None, tuple[float, float] | None]

RESAMPLES = 1000
RESAMPLES_AT_ONCE = 50  # bounds the memory: this many counts for each unit


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


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A named score of a test set.

    Attributes:
        name (`str`): Key in results.json, and the metric's name in a model card.
        label (`str`): Heading in tables.
        definition (`str`): How it is computed, for results.json and the report.
        percent (`bool`): Whether tables show the value times 100.
    """

    name: str
    label: str
    definition: str
    percent: bool = True

    def score(self, records: Sequence[Record]) -> Scored:
        """The value and the ends of its 95 % interval; both `None` where no question has part in the measure.

        Args:
            records (`list[dict]`): Answered questions.
        """
        raise NotImplementedError

    def estimate(self, records: Sequence[Record]) -> float | None:
        """The value alone, without the cost of an interval; as [`score`]."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Share(Measure):
    """A mean of values between 0 and 1, with Wilson's interval.

    Attributes:
        values (`Callable`): Records -> one value for each unit that counts: each question, each image, or each
            question with a certain answer.
    """

    values: Callable[[Sequence[Record]], Sequence[float]]

    def score(self, records: Sequence[Record]) -> Scored:
        values = self.values(records)
        if not values:
            return None, None
        share = math.fsum(values) / len(values)
        return share, wilson_interval(share, len(values))

    def estimate(self, records: Sequence[Record]) -> float | None:
        values = self.values(records)
        return math.fsum(values) / len(values) if values else None


@dataclass(frozen=True, kw_only=True)
class Statistic(Measure):
    """A function of sums over units, with the percentile interval of 1,000 bootstrap resamples of the units (seed 0).

    Attributes:
        table (`Callable`): Records -> array of shape `(units, columns)`; a unit is a question or an image.
        value (`Callable`): Sums of shape `(..., columns)` -> values of shape `(...)`.
    """

    table: Callable[[Sequence[Record]], np.ndarray]
    value: Callable[[np.ndarray], np.ndarray]

    def score(self, records: Sequence[Record]) -> Scored:
        table = np.asarray(self.table(records), dtype=np.float64)
        units = len(table)
        if units == 0:
            return None, None
        random = np.random.default_rng(0)
        values = []
        for start in range(0, RESAMPLES, RESAMPLES_AT_ONCE):
            size = min(RESAMPLES_AT_ONCE, RESAMPLES - start)
            counts = random.multinomial(units, np.full(units, 1 / units), size=size)
            values.append(self.value(counts @ table))  # => (size,)
        low, high = np.quantile(np.concatenate(values), [0.025, 0.975])
        return float(self.value(table.sum(axis=0))), (float(low), float(high))

    def estimate(self, records: Sequence[Record]) -> float | None:
        table = np.asarray(self.table(records), dtype=np.float64)
        return float(self.value(table.sum(axis=0))) if len(table) else None


@dataclass(frozen=True)
class Scoring:
    """The measures of a kind of test set, and which answers its report marks as right.

    Attributes:
        measures (`tuple[Measure, ...]`): The first one leads tables, charts and the report.
        is_right (`Callable`): Record with a prediction -> whether the report marks it as right.
        right_means (`str`): That rule in words.
        headline (`tuple[str, ...]`, *optional*): Names of the measures in the terminal's table and in the model card;
            default: all.
        credit (`Callable`, *optional*): Record -> share of the full mark, shown where it lies between 0 and 1.
        constants (`int`): How many of the answers accepted for most questions are tried as the constant answer
            (`DEFINITIONS["majority"]`).
        tie_break (`str`, *optional*): Name of the measure that decides between constant answers which the first one
            values alike.
    """

    measures: tuple[Measure, ...]
    is_right: Callable[[Record], bool]
    right_means: str
    headline: tuple[str, ...] = ()
    credit: Callable[[Record], float] | None = None
    constants: int = 10
    tie_break: str | None = None

    @property
    def deciding(self) -> list[Measure]:
        """The measures that choose the constant answer: the first one, then that of `tie_break`."""
        return [self.measures[0], *(measure for measure in self.measures if measure.name == self.tie_break)]

    @property
    def shown(self) -> list[Measure]:
        """The measures of the terminal's table and the model card."""
        return [measure for measure in self.measures if not self.headline or measure.name in self.headline]

    def describe(self) -> list[dict[str, Any]]:
        """Name, label, unit and place of each measure, for results.json and the report."""
        return [
            {"name": m.name, "label": m.label, "percent": m.percent, "shown": m in self.shown} for m in self.measures
        ]


def each(score: Callable[[Record], float]) -> Callable[[Sequence[Record]], list[float]]:
    """The values of a `Share` of all questions: one score for each record."""
    return lambda records: [float(score(record)) for record in records]


def equals_a_reference(record: Record) -> bool:
    """Whether the answer equals one of the references after the normalisation of VQA v2."""
    return exact_match(record["prediction"], record["references"], normalize=True)


def _vqa_accuracy(record: Record) -> float:
    return vqa_accuracy(record["prediction"], record["references"])


GENERAL = Scoring(
    measures=(
        Share(
            name="exact_match",
            label="exact match",
            definition="share of answers that equal one of their references, both stripped of outer white space",
            values=each(lambda record: exact_match(record["prediction"], record["references"])),
        ),
        Share(
            name="exact_match_normalized",
            label="normalised",
            definition="exact match after the answer normalisation of VQA v2",
            values=each(equals_a_reference),
        ),
        Share(
            name="vqa_accuracy",
            label="VQA accuracy",
            definition=(
                "VQA v2: min(equal references among the others / 3, 1), averaged over leaving out each reference in "
                "turn; with fewer than four references the share of equal ones; answers and references normalised"
            ),
            values=each(_vqa_accuracy),
        ),
    ),
    is_right=equals_a_reference,
    right_means="equal to a true answer after VQA normalisation",
    headline=("exact_match", "vqa_accuracy"),
    credit=_vqa_accuracy,
)
