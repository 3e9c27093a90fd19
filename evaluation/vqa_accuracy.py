"""The two ways an answer is judged: VQA accuracy and exact match, as `evaluate.Metric`s that need no download.

VQA accuracy is the measure of VQA v2 (Goyal et al., 2017; https://visualqa.org/evaluation.html): ten people answered
each question, and an answer is fully right when three of them gave it. Both sides are first brought to one form; the
rules of that form and their order are those of the official evaluation script, odd corners included, since scores
are compared across papers. `evaluate.load("...")` would fetch a script from the Hub and run it, hence the
subclasses.
"""

import re
from collections.abc import Sequence

import datasets
import evaluate


# Punctuation that the official rule takes out. The apostrophe and the colon stay: "it's" and "10:30" mean something.
PUNCTUATION = ';/[]"{}()=+\\_->@<`,?!'
# The official pattern has a mistyped look-behind that is always true: what counts is the digit *behind* the period.
PERIOD = re.compile(r"\.(?!\d)")
COMMA_BETWEEN_DIGITS = re.compile(r"\d,\d")

NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
ARTICLES = {"a", "an", "the"}

# Words that get a forgotten apostrophe back. Those whose bare form is another word (he'll, I'll, we're, it's) are
# not among them, nor are those with a capital I: the official table lists some, but words are in lower case when
# they are looked up.
CONTRACTIONS_IN_FULL = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's
    there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't
    what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def _contractions() -> dict[str, str]:
    """Every contraction with one of its apostrophes forgotten -> the contraction."""
    table = {}
    for word in CONTRACTIONS_IN_FULL:
        for position in (match.start() for match in re.finditer("'", word)):
            table[word[:position] + word[position + 1 :]] = word
    table["somebody'd"] = "somebodyd"  # the official table has this one the wrong way round
    return table


CONTRACTIONS = _contractions()


def normalize_answer(text: str) -> str:
    """The form in which VQA v2 compares answers.

    In this order: line breaks and tabs become spaces; punctuation (all but apostrophe, colon, period) is deleted
    where the text has it next to a space, or anywhere if the text has a comma between digits ("1,000"), and becomes
    a space otherwise; periods go unless a digit follows; lower case; number words up to ten become digits ("none" is
    0); articles go; contractions get their apostrophe back.

    Args:
        text (`str`): An answer, of a model or of a person.

    Returns:
        `str`: E.g. `"The two dogs."` -> `"2 dogs"`, `"1,000"` -> `"1000"`, `"black-white"` -> `"black white"`.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    without_space = COMMA_BETWEEN_DIGITS.search(text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        delete = without_space or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if delete else " ")
    cleaned = PERIOD.sub("", cleaned)
    words = [NUMBERS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """VQA accuracy of one answer; the references are read as *votes*, one a person.

    With n references of which m equal the prediction (both normalised):

    - n >= 4 (VQA v2 has ten): the official rule. Each person is left out in turn, the answer gets `min(matches among
      the others / 3, 1)`, and the n results are averaged.
    - n <= 3: leaving one out would leave fewer than the three that make an answer fully right, so the score is
      `m / n`, which is also what the official rule gives for n = 4. One reference: 1 if equal, 0 if not.

    The official script leaves references as they are when all ten agree and never touches their articles and number
    words, as its data files are already in that form. Here every reference is normalised like the prediction, so any
    data set will do.

    Args:
        prediction (`str`): The model's answer.
        references (`Sequence[str]`): People's answers, repeated as often as they were given.

    Returns:
        `float`: Between 0 and 1.

    Raises:
        ValueError: if there are no references.
    """
    if not references:
        raise ValueError("references is empty; an answer is judged against at least one reference")
    answer = normalize_answer(prediction)
    matches = [normalize_answer(reference) == answer for reference in references]
    total, count = sum(matches), len(matches)
    if count <= 3:
        return total / count
    return sum(min((total - match) / 3, 1.0) for match in matches) / count


def exact_match(prediction: str, references: Sequence[str], normalize: bool = False) -> bool:
    """Whether the answer equals one of the references, here read as *accepted answers*.

    Args:
        prediction (`str`): The model's answer.
        references (`Sequence[str]`): Every answer that counts as right.
        normalize (`bool`): Compare `normalize_answer` of both, instead of both stripped of outer white space.
    """
    form = normalize_answer if normalize else str.strip
    return form(prediction) in {form(reference) for reference in references}


class VQAAccuracy(evaluate.Metric):
    """Mean `vqa_accuracy` over a test set.

    ```python
    >>> VQAAccuracy().compute(predictions=["Two."], references=[["2"] * 9 + ["3"]])
    {'vqa_accuracy': 1.0}
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return _metric_info(
            description="VQA v2: min(people who gave the same answer / 3, 1), leaving each person out in turn.",
            citation="Goyal et al., Making the V in VQA Matter, CVPR 2017",
            reference_url="https://visualqa.org/evaluation.html",
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        scores = [vqa_accuracy(*pair) for pair in zip(predictions, references, strict=True)]
        return {"vqa_accuracy": sum(scores) / len(scores)}


class ExactMatch(evaluate.Metric):
    """Share of answers that equal a reference, stripped (`exact_match`) and normalised (`exact_match_normalized`)."""

    def _info(self) -> evaluate.MetricInfo:
        return _metric_info(description="Share of answers equal to one of their references.")

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        return {
            "exact_match": sum(exact_match(*pair) for pair in pairs) / len(pairs),
            "exact_match_normalized": sum(exact_match(*pair, normalize=True) for pair in pairs) / len(pairs),
        }


def _metric_info(description: str, citation: str = "", reference_url: str | None = None) -> evaluate.MetricInfo:
    features = {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description="predictions: one string a question; references: a list of strings a question.",
        features=datasets.Features(features),
        reference_urls=[] if reference_url is None else [reference_url],
    )
