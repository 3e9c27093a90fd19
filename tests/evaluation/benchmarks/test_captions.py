"""The caption metrics against pycocoevalcap's figures and values computed by hand."""

import importlib.util
import json
import math

import numpy as np
import pytest

from jnana.evaluation.metrics.captions import bleu_4, bleu_counts, cider_d, rouge_l, tokenize_caption
from tests.evaluation.benchmarks.caption_figures import FIGURES, TOKENS, made_up_captions, pycocoevalcap_figures


def figures(candidates, references):
    """Ours, of the same tokens: the words between spaces."""
    words = [caption.split() for caption in candidates]
    truth = [[caption.split() for caption in group] for group in references]
    ciders = cider_d(words, truth)
    rouges = [rouge_l(caption, group) for caption, group in zip(words, truth, strict=True)]
    return {
        "cider_d": float(ciders.mean()),
        "cider_d_each": ciders.tolist(),
        "bleu_4": float(bleu_4(bleu_counts(words, truth).sum(axis=0))),
        "rouge_l": float(np.mean(rouges)),
        "rouge_l_each": rouges,
    }


def test_figures_are_those_of_pycocoevalcap():
    candidates, references = made_up_captions()
    expected = json.loads(FIGURES.read_text(encoding="utf-8"))
    ours = figures(candidates, references)
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, abs=1e-6), name
    assert 0.1 < ours["bleu_4"] < 0.9 and 0.5 < ours["cider_d"] < 9 and 0.1 < ours["rouge_l"] < 0.9
    # the control: another word changes every figure
    candidates[5] += " street"
    changed = figures(candidates, references)
    assert all(abs(changed[name] - expected[name]) > 1e-6 for name in ("cider_d", "bleu_4", "rouge_l"))


@pytest.mark.skipif(importlib.util.find_spec("pycocoevalcap") is None, reason="pycocoevalcap is not installed")
@pytest.mark.parametrize("images", [1, 7, 120])
def test_figures_beside_pycocoevalcap_itself(images):
    candidates, references = made_up_captions(max(images, 5))
    candidates, references = candidates[:images], references[:images]
    expected = pycocoevalcap_figures(candidates, references)
    for name, value in figures(candidates, references).items():
        assert value == pytest.approx(expected[name], abs=1e-6), name


def test_cider_by_hand():
    # Two images. "cat" is in the references of one: weight log 2; "a" in both: weight 0. One-word captions have no
    # longer n-grams, so a perfect word gives 10 / 4; a second, different reference halves it.
    scores = cider_d([["cat"], ["a"]], [[["cat"], ["a"]], [["a"]]])
    assert scores.tolist() == pytest.approx([10 / 4 / 2, 0.0])
    assert cider_d([["cat"]], [[["cat"]]]).tolist() == [0.0]  # one image: every weight is log 1


def test_bleu_by_hand():
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 fours; 5 words against 5
    counts = bleu_counts([["a", "b", "c", "d", "x"]], [[["a", "b", "c", "d", "e"], ["a"]]])
    assert counts.tolist() == [[4, 3, 2, 1, 5, 4, 3, 2, 5, 5]]
    assert bleu_4(counts[0]) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # too short: times exp(1 - 8 / 4); of two references equally close the shorter one counts
    short = bleu_counts([["a", "b", "c", "d"]], [[list("abcdefgh")]])
    assert bleu_4(short[0]) == pytest.approx(math.exp(1 - 8 / 4))
    assert bleu_counts([["a", "b"]], [[["a"], ["a", "b", "c"]]])[0, -1] == 1


def test_rouge_by_hand():
    # the longest common subsequence is "a c": precision 2/3, recall 2/4
    expected = (1 + 1.44) * (2 / 3) * (2 / 4) / (2 / 4 + 1.44 * 2 / 3)
    assert rouge_l(["a", "b", "c"], [["a", "x", "c", "y"]]) == pytest.approx(expected)
    assert rouge_l(["a"], [["b"]]) == rouge_l([], [["b"]]) == 0.0
    assert rouge_l(["c", "a"], [["a", "c"]]) < rouge_l(["a", "c"], [["a", "c"]]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man's dog, isn't it?", "a man 's dog is n't it"),
        ("Two half-eaten sandwiches (with ham).", "two half-eaten sandwiches -lrb- with ham -rrb-"),
        ("A clock\nat 10:30; it cannot be 1,000!", "a clock at 10:30 it can not be 1,000"),
        ('A sign that says "stop" - in the U.S.', "a sign that says stop in the u.s."),
        ("cats & dogs", "cats & dogs"),
        ("  ", ""),
    ],
)
def test_tokens_by_hand(text, expected):
    assert " ".join(tokenize_caption(text)) == expected


# Captions that the PTBTokenizer of COCO's evaluation splits otherwise; docs/benchmarks.md names the cases.
SPLIT_OTHERWISE = {
    "It's 5'10\" tall",
    "George W. Bush eats plan B.",
    "a dog's-eye view",
    "a mother‘s child’s “toy”",
    "ain't y'all rock'n'roll 'twas",
}


def test_tokens_are_those_of_ptbtokenizer_but_for_named_cases():
    expected = json.loads(TOKENS.read_text(encoding="utf-8"))
    assert len(expected) > 70 and SPLIT_OTHERWISE < expected.keys()
    different = {text for text, tokens in expected.items() if list(tokenize_caption(text)) != tokens}
    assert different == SPLIT_OTHERWISE
