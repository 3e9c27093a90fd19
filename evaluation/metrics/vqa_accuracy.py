"""VQA accuracy as an `evaluate.Metric`. Load it from a clone; neither jnana nor the network is needed:

    import evaluate

    metric = evaluate.load("evaluation/metrics/vqa_accuracy.py")
    metric.compute(predictions=["Two."], references=[["2"] * 9 + ["3"]])  # {'vqa_accuracy': 1.0}

With jnana installed, `from jnana.evaluation import VQAAccuracy` gives the same class.
"""

import datasets
import evaluate

from .scoring import vqa_accuracy


class VQAAccuracy(evaluate.Metric):
    """Mean VQA accuracy of a test set (Goyal et al., 2017), between 0 and 1."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="VQA v2: min(people who gave the same answer / 3, 1), leaving each person out in turn.",
            citation="Goyal et al., Making the V in VQA Matter, CVPR 2017",
            inputs_description="predictions: one string a question; references: a list of strings a question.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
            reference_urls=["https://visualqa.org/evaluation.html"],
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        scores = [vqa_accuracy(*pair) for pair in zip(predictions, references, strict=True)]
        return {"vqa_accuracy": sum(scores) / len(scores)}
