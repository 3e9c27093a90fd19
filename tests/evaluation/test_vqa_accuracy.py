"""The metrics against values computed by hand from the official rules of VQA v2."""

import itertools

import pytest

from jnana.evaluation import ExactMatch, VQAAccuracy, exact_match, normalize_answer, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        ("  two\tdogs\n", "2 dogs"),
        ("none", "0"),
        ("eleven", "eleven"),  # the table ends at ten
        ("The cat on a mat.", "cat on mat"),
        ("theatre", "theatre"),  # articles are whole words
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldntve", "couldntve"),  # two missing apostrophes: not in the official table
        ("its", "its"),  # another word
        ("Im", "im"),  # the official table has "Im", which lower-cased words never equal
        ("somebody'd", "somebodyd"),  # an error of the official table
        ("it's 10:30", "it's 10:30"),  # apostrophe and colon stay
        ("black-white", "black white"),  # a mark between letters: a space
        ("black - white", "black white"),  # next to a space: deleted
        ("yes/no, maybe", "yes no maybe"),  # the slash becomes a space, the comma is deleted
        ("1,000", "1000"),  # a comma between digits
        ("1,000/day", "1000day"),  # ... and then every mark is deleted without a space
        ("3.5", "3.5"),  # a period before a digit stays
        ("5.", "5"),
        ("e.g. this", "eg this"),
        ("$3", "$3"),  # not in the list of marks
        ("(a) [b] {c}", "b c"),
        ("one-two", "1 2"),  # punctuation comes before digits
        ("the-", ""),  # and before articles
        ("what?!", "what"),
        ("well_done", "well done"),
    ],
)
def test_normalisation_by_hand(answer, expected):
    assert normalize_answer(answer) == expected


def test_normalisation_settles_at_once():
    for answer in ("Two dogs, and the cat!", "1,000", "dont", "black-white"):
        assert normalize_answer(normalize_answer(answer)) == normalize_answer(answer)


@pytest.mark.parametrize(
    ("matches", "expected"),
    # Leaving out one of the m who agree leaves m - 1, which happens m times; leaving out another leaves m:
    # m = 1: (1*0 + 9*1/3) / 10 = 0.3; m = 2: (2*1/3 + 8*2/3) / 10 = 0.6; m = 3: (3*2/3 + 7*1) / 10 = 0.9
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_ten_people(matches, expected):
    references = ["red"] * matches + ["blue"] * (10 - matches)
    assert vqa_accuracy("red", references) == pytest.approx(expected)
    simple = min(matches / 3, 1)  # the control: the formula without leaving anyone out
    assert (simple == pytest.approx(expected)) == (matches in (0, 4, 10))


def test_order_of_people_does_not_matter():
    for order in itertools.permutations(["red", "red", "blue", "green", "red"]):
        assert vqa_accuracy("red", order) == pytest.approx((3 * 2 / 3 + 2) / 5)


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        (["red"], 1.0),
        (["blue"], 0.0),
        (["red", "blue"], 1 / 2),
        (["red", "red", "blue"], 2 / 3),
        (["red", "red", "red"], 1.0),
        (["red", "red", "red", "red"], 1.0),  # from four on the official rule: three others agree
        (["red", "blue", "blue", "blue"], (0 + 3 / 3) / 4),
    ],
)
def test_fewer_people(references, expected):
    assert vqa_accuracy("red", references) == pytest.approx(expected)


def test_both_sides_are_normalised():
    assert vqa_accuracy("Two.", ["2"] * 10) == 1.0
    assert vqa_accuracy("2", ["two dogs"] * 10) == 0.0
    assert vqa_accuracy("dog", ["The dog"] * 10) == 1.0  # the script would leave unanimous references as they are


def test_no_reference_is_an_error():
    with pytest.raises(ValueError, match="references is empty"):
        vqa_accuracy("red", [])


def test_exact_match():
    assert exact_match(" red\n", ["blue", "red "])
    assert not exact_match("Red", ["red"])
    assert exact_match("The red.", ["red"], normalize=True)
    assert not exact_match("red", ["red one"], normalize=True)


def test_metrics_average():
    predictions, references = ["Two.", "a cat", "dog"], [["2"] * 10, ["cat"], ["cat"]]
    assert VQAAccuracy().compute(predictions=predictions, references=references) == {
        "vqa_accuracy": pytest.approx(2 / 3)
    }
    assert ExactMatch().compute(predictions=predictions, references=references) == {
        "exact_match": 0.0,
        "exact_match_normalized": pytest.approx(2 / 3),
    }


def test_metric_in_batches():
    metric = VQAAccuracy()
    metric.add_batch(predictions=["red"], references=[["red"]])
    metric.add(prediction="red", reference=["blue", "red"])
    assert metric.compute() == {"vqa_accuracy": pytest.approx(0.75)}
