"""Measures a model on a test set: batched answers, metrics, baselines, and pages to look at.

`run_evaluate.py` is these functions in a row; each is of use alone:

```python
from evaluation import VQAAccuracy, answer_questions, summarise

records = answer_questions(model, processor, rows, batch_size=16, max_new_tokens=32)
print(summarise(records)["overall"]["exact_match"])
```
"""

from evaluation.contact_sheet import write_contact_sheet
from evaluation.generation import answer_questions, model_fingerprint, process_state
from evaluation.questions import Question, QuestionSet
from evaluation.report import SplitResult, write_report
from evaluation.summary import format_table, majority_answers, summarise, wilson_interval
from evaluation.vqa_accuracy import ExactMatch, VQAAccuracy, exact_match, normalize_answer, vqa_accuracy


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
