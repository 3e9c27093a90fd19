"""Measures a model on a test set: batched answers, metrics, baselines, and pages to look at.

`run_evaluate.py` is these functions in a row; each is of use alone:

```python
from jnana.evaluation import VQAAccuracy, answer_questions, summarise

records = answer_questions(model, processor, rows, batch_size=16, max_new_tokens=32)
print(summarise(records)["overall"]["exact_match"])
```
"""

if __name__ != "jnana.evaluation":  # a second copy of every class would be registered
    raise ImportError(f"{__name__!r} is part of the package jnana; import jnana.evaluation instead")


from .contact_sheet import write_contact_sheet
from .generation import answer_questions, model_fingerprint, process_state
from .questions import Question, QuestionSet
from .report import SplitResult, write_report
from .summary import format_table, majority_answers, summarise, wilson_interval
from .vqa_accuracy import ExactMatch, VQAAccuracy, exact_match, normalize_answer, vqa_accuracy


__all__ = [
    "ExactMatch",
    "Question",
    "QuestionSet",
    "SplitResult",
    "VQAAccuracy",
    "answer_questions",
    "exact_match",
    "format_table",
    "majority_answers",
    "model_fingerprint",
    "normalize_answer",
    "process_state",
    "summarise",
    "vqa_accuracy",
    "wilson_interval",
    "write_contact_sheet",
    "write_report",
]
