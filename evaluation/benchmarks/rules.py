"""The official rules of each benchmark for one answer, and the measures made of them.

The rules are those of the benchmarks' own evaluation programs (docs/benchmarks.md names them), their oddities
included, because scores are compared across papers.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..measures import Record, Scoring, Share, Statistic, each
from ..metrics.captions import bleu_4, bleu_counts, cider_d, rouge_l, tokenize_caption
from ..metrics.scoring import agreement, normalize_answer
from .readers import LETTERS


# ---------------------------------------------------------------------- answers of ten people


def vqav2_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQAv2's accuracy of one answer, by its evaluation script, of the answer as LLaVA-1.5 sent it to the server.

    The script normalises prediction and answers alike, but neither where all ten people gave the same answer. LLaVA
    sent its answers in the form of [`normalize_evalai`], so they have that form in either case.

    Args:
        prediction (`str`): The model's answer.
        answers (`Sequence[str]`): The answers of all people, as the annotations hold them.
    """
    answer = normalize_evalai(prediction)
    given = [text.replace("\n", " ").replace("\t", " ").strip() for text in answers]
    if len(set(given)) > 1:
        answer, given = normalize_answer(answer), [normalize_answer(text) for text in given]
    return agreement([text == answer for text in given])


def normalize_evalai(text: str) -> str:
    """The normalisation of TextVQA's evaluation: VQAv2's, after lower case and without commas and question marks.

    `'s` becomes a word of its own. (The form in which LLaVA-1.5 sent its answers to VQAv2's server, too.)

    Args:
        text (`str`): A prediction or a reference.
    """
    return normalize_answer(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def textvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """TextVQA's accuracy of one answer: the rule of VQAv2, prediction and answers normalised alike.

    Args:
        prediction (`str`): The model's answer.
        answers (`Sequence[str]`): The answers of all people.
    """
    answer = normalize_evalai(prediction)
    return agreement([normalize_evalai(text) == answer for text in answers])


def _people_scoring(accuracy: Callable[[str, Sequence[str]], float], normalisation: str) -> Scoring:
    def score(record: Record) -> float:
        return accuracy(record["prediction"], record["references"])

    definition = (
        "min(people who gave the answer among the other nine / 3, 1), averaged over leaving out each of the ten; "
        f"{normalisation}"
    )
    return Scoring(
        measures=(Share(name="vqa_accuracy", label="VQA accuracy", definition=definition, values=each(score)),),
        is_right=lambda record: score(record) >= 0.5,
        right_means="a VQA accuracy of at least 50 %",
        credit=score,
    )


VQAV2 = _people_scoring(
    vqav2_accuracy,
    "the prediction normalised by EvalAI's rule, as LLaVA-1.5 sent it; then prediction and answers by VQAv2's script, "
    "which leaves them as they are where all ten answers are equal",
)
TEXTVQA = _people_scoring(
    textvqa_accuracy,
    "predictions and answers normalised by EvalAI's rule, with which TextVQA is scored",
)


# ---------------------------------------------------------------------- GQA


def gqa_prediction(text: str) -> str:
    """An answer as LLaVA-1.5 hands it to GQA's evaluation: lower case, without periods at its end."""
    return text.rstrip(".").lower()


def _gqa_right(record: Record) -> bool:
    return gqa_prediction(record["prediction"]) == record["references"][0]


def _gqa_part(open_questions: bool) -> Callable[[Sequence[Record]], list[float]]:
    return lambda records: [float(_gqa_right(record)) for record in records if record["open"] is open_questions]


GQA = Scoring(
    measures=(
        Share(
            name="accuracy",
            label="accuracy",
            definition="answers equal to the true one, in lower case and without periods at the end",
            values=each(_gqa_right),
        ),
        Share(
            name="accuracy_binary",
            label="binary",
            definition="accuracy on questions of the structural types verify, logical, choose and compare",
            values=_gqa_part(open_questions=False),
        ),
        Share(
            name="accuracy_open",
            label="open",
            definition="accuracy on questions of the structural type query",
            values=_gqa_part(open_questions=True),
        ),
    ),
    is_right=_gqa_right,
    right_means="equal to the true answer, in lower case and without periods at the end",
)


# ---------------------------------------------------------------------- POPE


def pope_answer(text: str) -> str:
    """`no` if the first sentence has the word `No`, `no` or `not`, else `yes`: the rule of POPE's evaluate.py."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def _pope_pairs(records: Sequence[Record]) -> list[tuple[bool, bool]]:
    """(predicted yes, truly yes) of each question."""
    return [(pope_answer(record["prediction"]) == "yes", record["references"][0] == "yes") for record in records]


def _pope_f1(sums: np.ndarray) -> np.ndarray:
    """F1 of the sums of true positives, false positives and false negatives; 0 where all three are 0."""
    true, false, missed = np.moveaxis(np.asarray(sums, dtype=np.float64), -1, 0)
    return 2 * true / np.maximum(2 * true + false + missed, 1)


POPE = Scoring(
    measures=(
        Share(
            name="accuracy",
            label="accuracy",
            definition=(
                "share of right answers; an answer is `no` if its first sentence has the word No, no or not, else "
                "`yes` (POPE's evaluate.py)"
            ),
            values=lambda records: [float(said == true) for said, true in _pope_pairs(records)],
        ),
        Share(
            name="precision",
            label="precision",
            definition="share of `yes` answers that are right; none without a `yes` answer",
            values=lambda records: [float(true) for said, true in _pope_pairs(records) if said],
        ),
        Share(
            name="recall",
            label="recall",
            definition="share of questions to be answered with `yes` that are",
            values=lambda records: [float(said) for said, true in _pope_pairs(records) if true],
        ),
        Statistic(
            name="f1",
            label="F1",
            definition="harmonic mean of precision and recall; 0 if no `yes` is right",
            table=lambda records: np.array(
                [(said and true, said and not true, true and not said) for said, true in _pope_pairs(records)],
                dtype=np.float64,
            ),
            value=_pope_f1,
        ),
        Share(
            name="yes_share",
            label="yes share",
            definition="share of `yes` answers",
            values=lambda records: [float(said) for said, _ in _pope_pairs(records)],
        ),
    ),
    is_right=lambda record: pope_answer(record["prediction"]) == record["references"][0],
    right_means="the answer, read as yes or no by POPE's rule, is the true one",
    tie_break="f1",  # with as many questions to be answered with no as with yes, both have the same accuracy
)


# ---------------------------------------------------------------------- ScienceQA


def chosen_letter(text: str, choices: int) -> str | None:
    """The letter that an answer to a multiple-choice question names, by the rule of LLaVA's eval_science_qa.py.

    A letter alone; a letter, a period, a space and more text (`B. because`); or `The answer is B` with a character
    behind it, once in the whole answer. `B.` names none.

    Args:
        text (`str`): The model's answer.
        choices (`int`): The number of choices; a letter beyond them is none.

    Returns:
        `str` or `None`: `None` without such a letter. Nothing is guessed: the answer is wrong.
    """
    text = text.strip()
    if text[:1] in set(LETTERS) and (len(text) == 1 or text[1:3] == ". "):
        letter = text[0]
    else:
        named = re.findall(r"The answer is ([A-Z]).", text)
        letter = named[0] if len(named) == 1 else None
    return letter if letter in set(LETTERS[:choices]) else None


def _letter_right(record: Record) -> bool:
    return chosen_letter(record["prediction"], record["choices"]) == record["references"][0]


SCIENCEQA = Scoring(
    measures=(
        Share(
            name="accuracy",
            label="accuracy",
            definition=(
                "share of answers that name the right letter: alone; with a period, a space and more text (`B.` alone "
                "is wrong); or in `The answer is B.`, once; an answer without a letter is wrong"
            ),
            values=each(_letter_right),
        ),
        Share(
            name="without_letter",
            label="no letter",
            definition="share of answers without the letter of a choice; they are wrong",
            values=each(lambda record: chosen_letter(record["prediction"], record["choices"]) is None),
        ),
    ),
    is_right=_letter_right,
    right_means="the answer names the right letter",
    headline=("accuracy",),
)


# ---------------------------------------------------------------------- MME

MME_PERCEPTION = frozenset("existence count position color posters celebrity scene landmark artwork OCR".split())
MME_COGNITION = frozenset("commonsense_reasoning numerical_calculation text_translation code_reasoning".split())


def mme_answer(text: str) -> str:
    """`yes`, `no` or `other`: the answer in lower case, or what its first four characters contain (MME's rule)."""
    start = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def _mme_right(record: Record) -> bool:
    return mme_answer(record["prediction"]) == record["references"][0]


def _mme_images(records: Sequence[Record]) -> list[tuple[str, int]]:
    """(task, right answers) of each image whose two questions were answered."""
    pairs: dict[str, list[Record]] = {}
    for record in records:
        pairs.setdefault(record["image_id"], []).append(record)
    return [(pair[0]["category"], sum(map(_mme_right, pair))) for pair in pairs.values() if len(pair) == 2]


def _mme_points(tasks: frozenset[str] | None) -> Callable[[Sequence[Record]], np.ndarray]:
    """For each image its points (accuracy + accuracy+, in percent) and 1, in the columns of its task."""

    def table(records: Sequence[Record]) -> np.ndarray:
        images = [(task, right) for task, right in _mme_images(records) if tasks is None or task in tasks]
        columns = {task: 2 * number for number, task in enumerate(sorted({task for task, _ in images}))}
        points = np.zeros((len(images), 2 * len(columns)))
        for row, (task, right) in enumerate(images):
            points[row, columns[task]] = 50 * right + 100 * (right == 2)
            points[row, columns[task] + 1] = 1
        return points

    return table


def _mme_sum(sums: np.ndarray) -> np.ndarray:
    """The sum over tasks of the mean points of their images."""
    return np.sum(sums[..., 0::2] / np.maximum(sums[..., 1::2], 1), axis=-1)


def _mme_statistic(name: str, label: str, definition: str, tasks: frozenset[str] | None) -> Statistic:
    return Statistic(
        name=name, label=label, definition=definition, percent=False, table=_mme_points(tasks), value=_mme_sum
    )


MME = Scoring(
    measures=(
        Share(
            name="accuracy",
            label="accuracy",
            definition="share of right answers: `yes` or `no` within the first four characters (MME's rule)",
            values=each(_mme_right),
        ),
        Share(
            name="accuracy_plus",
            label="accuracy+",
            definition="share of images whose two questions are both answered right",
            values=lambda records: [float(right == 2) for _, right in _mme_images(records)],
        ),
        _mme_statistic("sum", "sum", "sum over tasks of accuracy + accuracy+, in percent: at most 200 a task", None),
        _mme_statistic(
            "perception", "perception", "the sum over MME's ten tasks of perception: at most 2,000", MME_PERCEPTION
        ),
        _mme_statistic(
            "cognition", "cognition", "the sum over MME's four tasks of cognition: at most 800", MME_COGNITION
        ),
    ),
    is_right=_mme_right,
    right_means="yes or no as the first four characters have it, equal to the true answer",
)


# ---------------------------------------------------------------------- captions


def _tokens(records: Sequence[Record]) -> tuple[list[tuple[str, ...]], list[list[tuple[str, ...]]]]:
    """The tokens of the predictions and of their references."""
    return (
        [tokenize_caption(record["prediction"]) for record in records],
        [[tokenize_caption(reference) for reference in record["references"]] for record in records],
    )


def _with_ones(scores: Any) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    return np.stack([scores, np.ones_like(scores)], axis=1)


def _mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


CAPTIONS = Scoring(
    measures=(
        Statistic(
            name="cider_d",
            label="CIDEr-D",
            definition="CIDEr-D (Vedantam et al., 2015) as in pycocoevalcap: 0 to 10; papers often give it times 100",
            percent=False,
            table=lambda records: _with_ones(cider_d(*_tokens(records))),
            value=_mean,
        ),
        Statistic(
            name="bleu_4",
            label="BLEU-4",
            definition="BLEU-4 (Papineni et al., 2002) of the whole set as in pycocoevalcap, closest reference length",
            table=lambda records: bleu_counts(*_tokens(records)),
            value=bleu_4,
        ),
        Statistic(
            name="rouge_l",
            label="ROUGE-L",
            definition="ROUGE-L (Lin, 2004) as in pycocoevalcap: beta 1.2, mean over images",
            table=lambda records: _with_ones(
                [rouge_l(caption, references) for caption, references in zip(*_tokens(records), strict=True)]
            ),
            value=_mean,
        ),
    ),
    is_right=lambda record: tokenize_caption(record["prediction"]) in map(tokenize_caption, record["references"]),
    right_means="the words of one of the captions of the image",
    constants=1,  # to score each takes long, and hardly any caption has two images
)
