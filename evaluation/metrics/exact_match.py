"""Exact match with several references as an `evaluate.Metric`. Load it from a clone; jnana is not needed:

    import evaluate

    metric = evaluate.load("evaluation/metrics/exact_match.py")
    metric.compute(predictions=["A cat"], references=[["cat", "kitten"]])
    # {'exact_match': 0.0, 'exact_match_normalized': 1.0}

The Hub's metric of the same name takes one reference for each prediction and has no VQA normalisation. With jnana
installed, `from jnana.evaluation import ExactMatch` gives the same class.
"""

import datasets
import evaluate

from .scoring import exact_match


class ExactMatch(evaluate.Metric):
    """Share of answers that equal a reference: stripped (`exact_match`) and normalised (`exact_match_normalized`)."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of answers equal to one of their references.",
            citation="",
            inputs_description="predictions: one string a question; references: a list of strings a question.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        return {
            "exact_match": sum(exact_match(*pair) for pair in pairs) / len(pairs),
            "exact_match_normalized": sum(exact_match(*pair, normalize=True) for pair in pairs) / len(pairs),
        }
