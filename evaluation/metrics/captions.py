"""Caption metrics in plain Python: CIDEr-D, BLEU-4 and ROUGE-L, with the figures of `pycocoevalcap` on equal tokens.

- CIDEr-D: Vedantam et al., CIDEr: Consensus-based Image Description Evaluation, CVPR 2015.
- BLEU-4: Papineni et al., ACL 2002; over the whole test set, with the closest reference length.
- ROUGE-L: Lin, 2004; with beta = 1.2.

COCO's evaluation tokenises with Stanford's PTBTokenizer, a Java program. `tokenize_caption` follows its rules for
captions without Java; docs/benchmarks.md says where the two differ.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np


Tokens = Sequence[str]

MAX_ORDER = 4  # of the n-grams of BLEU-4 and CIDEr-D
LENGTH_SIGMA = 6.0  # of CIDEr-D's penalty on length differences
RECALL_WEIGHT = 1.2  # ROUGE-L's beta
# Added to n-gram counts, as the reference program adds them, so that a count of zero does not make BLEU undefined.
BLEU_TINY, BLEU_SMALL = 1e-15, 1e-9

ABBREVIATIONS = "mr mrs ms dr prof st jr sr vs etc ave blvd rd mt ft inc co corp ltd dept gov gen sgt capt rev"
WORD = re.compile(
    rf"""
    (?:[a-z]\.)+[a-z]\.                             # abbreviations: u.s. p.m.
    | (?:{ABBREVIATIONS.replace(" ", "|")})\.       # ... and those of several letters
    | no\.(?=\s*\d)                                 # no. 42, but not `no.` alone
    | '\d\ds\b                                      # '90s
    | \d+(?::\d\d)?(?=[ap]m\b)                      # 10:30am is two tokens
    | \d+(?:[.,:/-]\d+)*(?![^\W_]|[-/.'@&_][^\W_])  # numbers, times, fractions, types: 1,000 10:30 1/2 747-400
    | [^\W_]+(?:[-/.'@&_][^\W_]+)*                  # words, and what is joined to them without a space
    | [?!]{{2,}} | \.\.\. | --                      # marks of several characters
    | \S                                            # everything else: one mark
    """,
    re.VERBOSE,
)
CONTRACTION = re.compile(r"^(.+?)(n't|'(?:s|m|d|ll|re|ve))$")
SPLIT_WORDS = {
    "cannot": ("can", "not"),
    "gimme": ("gim", "me"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "lemme": ("lem", "me"),
    "wanna": ("wan", "na"),
}
# PTBTokenizer's names of brackets. COCO's evaluation means to remove them, but writes them with capital letters.
BRACKETS = dict(zip("()[]{}", ("-lrb-", "-rrb-", "-lsb-", "-rsb-", "-lcb-", "-rcb-"), strict=True))
# COCO's evaluation removes these tokens. Two and more question or exclamation marks are another token, which stays.
REMOVED = {".", "?", "!", ",", ":", ";", "-", "--", "...", "'", "''", "`", "``", '"'}


@functools.lru_cache(maxsize=1 << 18)
def tokenize_caption(text: str) -> tuple[str, ...]:
    """Split a caption into lower-case words, without punctuation, as COCO's caption evaluation does.

    Args:
        text (`str`): A caption.

    Returns:
        `tuple[str, ...]`: E.g. `"A man's dog, isn't it?"` -> `("a", "man", "'s", "dog", "is", "n't", "it")`.
    """
    tokens: list[str] = []
    for word in WORD.findall(text.lower().replace("’", "'").replace("“", '"').replace("”", '"')):
        endings: list[str] = []
        while (found := CONTRACTION.match(word)) is not None:  # couldn't've has two
            word, ending = found.groups()
            endings.insert(0, ending)
        tokens += [*SPLIT_WORDS.get(word, (BRACKETS.get(word, word),)), *endings]
    return tuple(token for token in tokens if token not in REMOVED)


def ngram_counts(tokens: Tokens) -> Counter:
    """How often each n-gram of one to four tokens occurs; keys are tuples of tokens."""
    return Counter(
        tuple(tokens[start : start + order])
        for order in range(1, MAX_ORDER + 1)
        for start in range(len(tokens) - order + 1)
    )


def cider_d(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """CIDEr-D of each image: how many n-grams a caption shares with the references, rare ones weighing more.

    The weight of an n-gram falls with the number of images whose references hold it, so the score of an image depends
    on the whole test set. With one image every weight is 0, and so is the score.

    Args:
        candidates (`Sequence[Tokens]`): The tokens of one caption for each image.
        references (`Sequence[Sequence[Tokens]]`): For each image the tokens of its references, at least one.

    Returns:
        `np.ndarray` of shape `(images,)`: 0 to 10; the score of a test set is the mean.
    """
    counted = [[ngram_counts(reference) for reference in group] for group in references]
    images_with = Counter(ngram for group in counted for ngram in set().union(*group))
    log_images = math.log(len(counted)) if counted else 0.0

    def vector(counts: Counter) -> tuple[list[dict], list[float], int]:
        """Weights by order and n-gram, their norm by order, and the number of pairs of words."""
        weights: list[dict] = [{} for _ in range(MAX_ORDER)]
        for ngram, count in counts.items():
            weights[len(ngram) - 1][ngram] = count * (log_images - math.log(max(1, images_with[ngram])))
        norms = [math.sqrt(sum(weight * weight for weight in order.values())) for order in weights]
        return weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2)

    scores = []
    for candidate, group in zip(candidates, counted, strict=True):
        weights, norms, pairs = vector(ngram_counts(candidate))
        total = 0.0
        for reference in group:
            others, other_norms, other_pairs = vector(reference)
            # the reference program measures lengths in pairs of words
            penalty = math.exp(-((pairs - other_pairs) ** 2) / (2 * LENGTH_SIGMA**2))
            for order in range(MAX_ORDER):
                if norms[order] == 0 or other_norms[order] == 0:
                    continue
                other = others[order]
                shared = sum(
                    min(weight, other[ngram]) * other[ngram]
                    for ngram, weight in weights[order].items()
                    if ngram in other
                )
                total += penalty * shared / (norms[order] * other_norms[order])
        scores.append(10 * total / MAX_ORDER / len(group))
    return np.array(scores)


def bleu_counts(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """What BLEU-4 sums over a test set.

    Args:
        candidates (`Sequence[Tokens]`): The tokens of one caption for each image.
        references (`Sequence[Sequence[Tokens]]`): For each image the tokens of its references, at least one.

    Returns:
        `np.ndarray` of shape `(images, 10)`: the n-grams that a reference holds too, for n from 1 to 4; all n-grams,
        for n from 1 to 4; tokens of the caption; tokens of the reference whose length is closest (the shorter of two).
    """
    rows = []
    for candidate, group in zip(candidates, references, strict=True):
        most: Counter = Counter()
        for reference in group:
            most |= ngram_counts(reference)
        found = [0] * MAX_ORDER
        for ngram, count in (ngram_counts(candidate) & most).items():
            found[len(ngram) - 1] += count
        length = len(candidate)
        total = [max(0, length - order) for order in range(MAX_ORDER)]
        closest = min((abs(len(reference) - length), len(reference)) for reference in group)[1]
        rows.append([*found, *total, length, closest])
    return np.array(rows, dtype=np.float64).reshape(-1, 2 * MAX_ORDER + 2)


def bleu_4(sums: np.ndarray) -> np.ndarray:
    """BLEU-4 of a test set.

    Args:
        sums (`np.ndarray` of shape `(..., 10)`): Sums over images of `bleu_counts`.

    Returns:
        `np.ndarray` of shape `(...)`: 0 to 1.
    """
    sums = np.asarray(sums, dtype=np.float64)
    found, total = sums[..., :MAX_ORDER], sums[..., MAX_ORDER : 2 * MAX_ORDER]
    length, closest = sums[..., -2] + BLEU_TINY, sums[..., -1] + BLEU_SMALL
    precision = np.prod((found + BLEU_TINY) / (total + BLEU_SMALL), axis=-1) ** (1 / MAX_ORDER)
    return precision * np.exp(np.minimum(0.0, 1 - closest / length))


def rouge_l(candidate: Tokens, references: Sequence[Tokens]) -> float:
    """ROUGE-L of one caption: the longest common subsequence with a reference, as precision and recall.

    The largest precision and the largest recall may belong to different references, as in the reference program.

    Args:
        candidate (`Tokens`): The tokens of the caption.
        references (`Sequence[Tokens]`): The tokens of each reference, at least one.

    Returns:
        `float`: 0 to 1.
    """
    words = candidate or ("",)  # the reference program reads no text as one empty word
    common = [(_common_subsequence(words, reference or ("",)), len(reference or ("",))) for reference in references]
    precision = max(length for length, _ in common) / len(words)
    recall = max(length / total for length, total in common)
    if precision == 0 or recall == 0:
        return 0.0
    squared = RECALL_WEIGHT**2
    return (1 + squared) * precision * recall / (recall + squared * precision)


def _common_subsequence(first: Tokens, second: Tokens) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for token in first:
        diagonal = 0
        for position, other in enumerate(second, start=1):
            above = row[position]
            row[position] = diagonal + 1 if token == other else max(above, row[position - 1])
            diagonal = above
    return row[-1]
