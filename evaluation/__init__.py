"""Measures a model on a test set: batched answers, metrics, baselines, and an HTML report.

`run_evaluate.py` calls these functions in order; each can also be used alone:

```python
from jnana.evaluation import answer_questions, summarise

records = answer_questions(model, processor, rows, batch_size=16, max_new_tokens=32)
print(summarise(records)["overall"]["exact_match"])
```
"""

if __name__ != "jnana.evaluation":  # a second copy of every class would be registered
    raise ImportError(f"{__name__!r} is part of the package jnana; import jnana.evaluation instead")


from importlib import import_module
from typing import TYPE_CHECKING, Any

from .benchmarks import BENCHMARKS, BenchmarkFiles, BenchmarkQuestions
from .contact_sheet import write_contact_sheet
from .generation import answer_questions, model_fingerprint, process_state
from .loading import load_questions
from .measures import wilson_interval
from .metrics.scoring import exact_match, normalize_answer, vqa_accuracy
from .questions import Question, QuestionSet
from .report import SplitResult, write_report
from .results import answer_test_set, card_scores, find_card, write_results
from .summary import format_table, majority_answers, summarise


if TYPE_CHECKING:
    from .metrics.exact_match import ExactMatch
    from .metrics.vqa_accuracy import VQAAccuracy


# Classes whose modules need the package `evaluate`: imported on first use.
_LAZY = {"ExactMatch": ".metrics.exact_match", "VQAAccuracy": ".metrics.vqa_accuracy"}

__all__ = [
    "BENCHMARKS",
    "BenchmarkFiles",
    "BenchmarkQuestions",
    "ExactMatch",
    "Question",
    "QuestionSet",
    "SplitResult",
    "VQAAccuracy",
    "answer_questions",
    "answer_test_set",
    "card_scores",
    "exact_match",
    "find_card",
    "format_table",
    "load_questions",
    "majority_answers",
    "model_fingerprint",
    "normalize_answer",
    "process_state",
    "summarise",
    "vqa_accuracy",
    "wilson_interval",
    "write_contact_sheet",
    "write_report",
    "write_results",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
