"""Scores of one answer: VQA accuracy and exact match, in plain Python.

VQA accuracy is the measure of VQA v2 (Goyal et al., 2017; https://visualqa.org/evaluation.html): ten people answered
each question, and an answer scores 1 when at least three of them gave it. Prediction and references are normalised
first. The rules and their order are those of the official evaluation script, errors included, because scores are
compared across papers.

`vqa_accuracy.py` and `exact_match.py` beside this file offer the scores as `evaluate.Metric`. `evaluate.load` copies
this file together with either script, so it imports only the standard library.
"""

import functools
import re
from collections.abc import Sequence


# Punctuation that the official rule removes. It keeps the apostrophe and the colon, as in "it's" and "10:30".
PUNCTUATION = ';/[]"{}()=+\\_->@<`,?!'
# The official pattern has a mistyped look-behind that always matches: only the character after the period counts.
PERIOD = re.compile(r"\.(?!\d)")
COMMA_BETWEEN_DIGITS = re.compile(r"\d,\d")

NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
ARTICLES = {"a", "an", "the"}

# Contractions whose missing apostrophe is restored. The list leaves out those that become another word without it
# (he'll, I'll, we're, it's), and those with a capital I: the official table has some, but it is searched with words in
# lower case.
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
    """Maps each contraction that lacks one of its apostrophes to the full contraction."""
    table = {}
    for word in CONTRACTIONS_IN_FULL:
        for position in (match.start() for match in re.finditer("'", word)):
            table[word[:position] + word[position + 1 :]] = word
    table["somebody'd"] = "somebodyd"  # the official table has this entry reversed
    return table


CONTRACTIONS = _contractions()


@functools.lru_cache(maxsize=1 << 16)  # the answers of a test set repeat
def normalize_answer(text: str) -> str:
    """Bring an answer to the form in which VQA v2 compares answers.

    The steps, in this order:

    1. Line breaks and tabs become spaces.
    2. A punctuation mark (other than apostrophe, colon, period) is deleted if the text contains it next to a space,
       or if the text contains a comma between digits ("1,000"); otherwise it becomes a space.
    3. Periods are deleted unless a digit follows.
    4. The text becomes lower case.
    5. Number words up to ten become digits; "none" becomes 0.
    6. Articles are deleted, and contractions get their apostrophe back.

    Args:
        text (`str`): A prediction or a reference.

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
    """VQA accuracy of one answer. The references are votes: one for each person who answered.

    With n references of which m equal the prediction (both normalised):

    - n >= 4 (VQA v2 has ten): the official rule. Each person is left out in turn, the answer scores `min(matches among
      the others / 3, 1)`, and the n scores are averaged.
    - n <= 3: leaving one out would leave fewer than the three matches that a score of 1 needs, so the score is
      `m / n`, which is also what the official rule gives for n = 4. With one reference it is 1 if equal, 0 if not.

    The official script normalises neither the references nor the prediction where all ten people gave the same
    answer. This function always normalises both, so it works with any data set.

    Args:
        prediction (`str`): The model's answer.
        references (`Sequence[str]`): The answers of all people, repeated ones included.

    Returns:
        `float`: Between 0 and 1.

    Raises:
        ValueError: if there are no references.
    """
    if not references:
        raise ValueError("references is empty; give at least one reference to compare the answer with")
    answer = normalize_answer(prediction)
    return agreement([normalize_answer(reference) == answer for reference in references])


def agreement(matches: Sequence[bool]) -> float:
    """The rule of [`vqa_accuracy`], given whether each person's answer equals the prediction.

    Args:
        matches (`Sequence[bool]`): One for each person, at least one.
    """
    total, count = sum(matches), len(matches)
    if count <= 3:
        return total / count
    return sum(min((total - match) / 3, 1.0) for match in matches) / count


def exact_match(prediction: str, references: Sequence[str], normalize: bool = False) -> bool:
    """Whether the answer equals one of the references. The references are all accepted answers.

    Args:
        prediction (`str`): The model's answer.
        references (`Sequence[str]`): Every accepted answer.
        normalize (`bool`): Compare both after `normalize_answer`, instead of after stripping outer white space.
    """
    form = normalize_answer if normalize else str.strip
    return form(prediction) in {form(reference) for reference in references}
