"""Each benchmark's rules on single answers, and its measures on small sets, against values computed by hand."""

import importlib.util
import random
from pathlib import Path

import pytest

from jnana.evaluation import summarise, wilson_interval
from jnana.evaluation.benchmarks.rules import (
    CAPTIONS,
    GQA,
    MME,
    POPE,
    SCIENCEQA,
    TEXTVQA,
    VQAV2,
    chosen_letter,
    gqa_prediction,
    mme_answer,
    normalize_evalai,
    pope_answer,
    textvqa_accuracy,
    vqav2_accuracy,
)


def records(*rows, **common):
    """Records of answers from (prediction, references, category) and, fourth, what a benchmark adds to a record."""
    made = []
    for number, (prediction, references, category, *more) in enumerate(rows):
        record = {"prediction": prediction, "references": references, "category": category, "complete": True}
        place = {"source": f"file, question {number}", "question": "?", "key": f"run-{number}"}
        made.append({**record, **place, **common, **(more[0] if more else {})})
    return made


# ---------------------------------------------------------------------- VQAv2 and TextVQA


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Yes.", ["yes"] * 10, 1.0),
        ("No.", ["yes"] * 10, 0.0),
        ("red", ["red"] * 2 + ["blue"] * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10),  # leaving out each of the ten in turn
        ("Two", ["2"] * 3 + ["3"] * 7, (3 * 2 / 3 + 7) / 10),
        # where the ten differ, articles, number words and capital letters are normalised on both sides
        ("none", ["none"] * 6 + ["nothing"] * 4, 1.0),
        ("none", ["none"] * 9 + ["0"], 1.0),
        ("the dog", ["the dog"] * 9 + ["dog"], 1.0),
        ("the dog", ["the dog"] * 5 + ["cat"] * 5, 1.0),
        ("left one", ["left one"] * 4 + ["left"] * 6, 1.0),
        ("Nike", ["Nike"] * 8 + ["nike"] * 2, 1.0),
        ("dark red", ["dark-red"] * 9 + ["red"], 1.0),
        ("cat", ["the dog"] * 5 + ["dog"] * 5, 0.0),
        # ten equal answers, but for outer space, are left as they are; the prediction is as LLaVA-1.5 sent it
        ("dog", ["dog"] * 9 + ["dog\n"], 1.0),
        ("dog", ["the dog"] * 10, 0.0),
        ("none", ["none"] * 10, 0.0),
        ("dark-red", ["dark-red"] * 10, 0.0),
        ("Ann's", ["ann 's"] * 10, 1.0),
    ],
)
def test_vqav2_accuracy_of_one_answer(prediction, answers, expected):
    assert vqav2_accuracy(prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ann's", "ann 's"),
        ("1,000", "1000"),
        ("1,000/day", "1000 day"),  # VQAv2's own rule gives 1000day
        ("The two dogs, really?", "2 dogs really"),
    ],
)
def test_evalai_normalisation(text, expected):
    assert normalize_evalai(text) == expected


LMMS_EVAL = importlib.util.find_spec("lmms_eval")


@pytest.fixture
def official():
    """EvalAI's answer processor, of lmms-eval; put its directory on PYTHONPATH to run the tests that take this."""
    if LMMS_EVAL is None:
        pytest.skip("lmms-eval is not installed")
    file = Path(LMMS_EVAL.submodule_search_locations[0], "tasks", "_task_utils", "vqa_eval_metric.py")
    spec = importlib.util.spec_from_file_location("vqa_eval_metric", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EvalAIAnswerProcessor()


def test_vqav2_accuracy_beside_the_steps_of_its_script(official):
    """The script's steps on answers of ten people, with the processor's functions; the sent answer as LLaVA's."""
    chance = random.Random(2)

    def form(text):
        return official.process_digit_article(official.process_punctuation(text))

    words = "none nothing 0 two 2 Two the a dog Dog dog. cat dark-red red, man's what? isnt 1,000 1000".split()
    phrases = [" ".join(chance.choices(words, k=chance.randint(1, 2))) for _ in range(40)]
    equal = agreed = 0
    for _ in range(3000):
        answers = chance.choices(chance.sample(phrases, k=chance.randint(1, 4)), k=10)
        prediction = chance.choice([*answers, chance.choice(phrases)])
        sent, people = official(prediction), [text.strip() for text in answers]
        if len(set(people)) > 1:
            sent, people = form(sent), list(map(form, people))
        others = [people[:left] + people[left + 1 :] for left in range(10)]
        expected = sum(min(1, ten.count(sent) / 3) for ten in others) / 10
        assert vqav2_accuracy(prediction, answers) == pytest.approx(expected), (prediction, answers)
        equal, agreed = equal + (len(set(answers)) == 1), agreed + (expected > 0)
    assert 100 < equal < 2900 and 100 < agreed < 2900  # both branches, right and wrong answers


def test_evalai_normalisation_beside_the_program_itself(official):
    chance = random.Random(1)
    words = [*official.CONTRACTIONS, *official.CONTRACTIONS.values(), *official.NUMBER_MAP, "\n", "\t"]
    words += "a An the dog 1,000 3.5 5. U.S. T-shirt what?! (red) e.g. 10:30 $3 man's it's 7/8 a_b x@y ; / - '".split()
    marks = [" ", "", "-", "/", " , ", ",", ". ", "."]
    texts = ["".join(chance.choice(words) + chance.choice(marks) for _ in range(4)) for _ in range(20_000)]
    different = [text for text in texts if normalize_evalai(text) != official(text)]
    assert not different


def test_textvqa_normalises_both_sides():
    assert textvqa_accuracy("dog", ["the dog"] * 10) == 1.0
    assert vqav2_accuracy("dog", ["the dog"] * 10) == 0.0
    assert textvqa_accuracy("Ann's", ["ann's"] * 4 + ["anns"] * 6) == 1.0
    assert textvqa_accuracy("anne", ["ann's"] * 4 + ["anns"] * 6) == 0.0


def test_vqa_scores_of_a_set():
    answered = records(
        ("Yes", ["yes"] * 10, "yes/no"),
        ("2", ["3"] * 8 + ["2"] * 2, "number"),
        ("blue", ["red"] * 10, "other"),
    )
    for scoring in (VQAV2, TEXTVQA):
        summary = summarise(answered, None, scoring)
        assert summary["overall"]["vqa_accuracy"] == pytest.approx((1 + 0.6 + 0) / 3)
        assert summary["overall"]["vqa_accuracy_interval"] == pytest.approx(wilson_interval(1.6 / 3, 3))
        assert summary["categories"]["other"]["vqa_accuracy"] == 0.0
        # constant answers: yes, 3 (2, as often accepted and before it in the alphabet, scores 0.6), red
        assert summary["majority_answers"] == {"yes/no": "yes", "number": "3", "other": "red"}
        assert summary["overall"]["majority"]["vqa_accuracy"] == 1.0
        assert [scoring.is_right(record) for record in answered] == [True, True, False]


def test_the_constant_answer_is_the_one_that_scores_most():
    """`no` is accepted for three questions, by one person of ten each; `yes` for two, by all."""
    answered = records(
        *[("x", ["no", *(f"answer{number}{person}" for person in range(9))], "t") for number in range(3)],
        *[("x", ["yes"] * 10, "t")] * 2,
    )
    summary = summarise(answered, None, VQAV2)
    assert summary["majority_answers"] == {"t": "yes"}
    assert summary["overall"]["majority"]["vqa_accuracy"] == pytest.approx(2 / 5)
    assert sum(vqav2_accuracy("no", record["references"]) for record in answered) == pytest.approx(3 * 0.3)
    # the control: scored by exact match, the answer that is accepted most often
    assert summarise(answered)["majority_answers"] == {"t": "no"}


# ---------------------------------------------------------------------- GQA


def test_gqa_exact_match():
    assert gqa_prediction("Polar Bear.") == "polar bear"
    answered = records(
        ("Yes.", ["yes"], "verify", {"open": False}),
        ("no", ["yes"], "logical", {"open": False}),
        ("Polar bear", ["polar bear"], "query", {"open": True}),
        ("the polar bear", ["polar bear"], "query", {"open": True}),  # articles stay: wrong
        ("bears", ["bear"], "query", {"open": True}),
    )
    overall = summarise(answered, None, GQA)["overall"]
    assert overall["accuracy"] == pytest.approx(2 / 5)
    assert overall["accuracy_binary"] == pytest.approx(1 / 2)
    assert overall["accuracy_open"] == pytest.approx(1 / 3)
    assert overall["accuracy_open_interval"] == pytest.approx(wilson_interval(1 / 3, 3))
    verify = summarise(answered, None, GQA)["categories"]["verify"]
    assert verify["accuracy_open"] is None and verify["accuracy_open_interval"] is None


# ---------------------------------------------------------------------- POPE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No", "no"),
        ("No, there is none.", "no"),
        ("There is not a dog", "no"),
        ("Yes. There is no cat.", "yes"),  # the first sentence counts
        ("NO", "yes"),  # the official rule knows `No` and `no` only
        ("none", "yes"),
        ("", "yes"),
    ],
)
def test_pope_answers(text, expected):
    assert pope_answer(text) == expected


def test_pope_measures_by_split():
    answered = records(
        ("Yes", ["yes"], "random"),
        ("Yes", ["no"], "random"),
        ("No", ["yes"], "random"),
        ("Yes", ["yes"], "random"),
        ("No", ["no"], "popular"),
        ("No.", ["yes"], "popular"),
    )
    summary = summarise(answered, None, POPE)
    random = summary["categories"]["random"]
    # two hits, one false alarm, one miss
    assert (random["accuracy"], random["precision"], random["recall"], random["f1"], random["yes_share"]) == (
        pytest.approx(2 / 4),
        pytest.approx(2 / 3),
        pytest.approx(2 / 3),
        pytest.approx(2 / 3),
        pytest.approx(3 / 4),
    )
    assert random["precision_interval"] == pytest.approx(wilson_interval(2 / 3, 3))
    popular = summary["categories"]["popular"]
    assert popular["precision"] is None  # no `yes` at all
    assert (popular["recall"], popular["f1"], popular["accuracy"], popular["yes_share"]) == (0.0, 0.0, 0.5, 0.0)
    overall = summary["overall"]
    assert overall["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    low, high = overall["f1_interval"]
    assert 0 <= low < overall["f1"] < high <= 1
    assert overall["f1_interval"] == summarise(answered, None, POPE)["overall"]["f1_interval"]  # the seed is fixed


def test_popes_constant_answer_is_yes_where_both_are_as_accurate():
    balanced = records(*[("No", ["no"], "random"), ("No", ["yes"], "random")] * 3)
    summary = summarise(balanced, None, POPE)
    assert summary["majority_answers"] == {"random": "yes"}  # not `no`, whose F1 is 0
    constant = summary["overall"]["majority"]
    assert (constant["accuracy"], constant["f1"]) == (0.5, pytest.approx(2 / 3))
    # the control: F1 decides between equally accurate answers only
    more_no = [*balanced, *records(("No", ["no"], "random"))]
    assert summarise(more_no, None, POPE)["majority_answers"] == {"random": "no"}


@pytest.mark.parametrize("scoring", [VQAV2, GQA, POPE, SCIENCEQA, MME, CAPTIONS])
def test_estimates_are_the_scores_without_intervals(scoring):
    parts = {"open": True, "choices": 2, "image_id": "a"}
    answered = records(
        *[("yes", ["yes"] * 10, "existence", parts), ("B", ["no"] * 10, "existence", parts)],
        *[("no", ["yes"] * 10, "count", {**parts, "image_id": "b"})],
    )
    for measure in scoring.measures:
        assert measure.estimate(answered) == measure.score(answered)[0], measure.name
        if measure.estimate(answered[:0]) is not None:
            raise AssertionError(f"{measure.name} has a value without a question")


def test_the_bootstrap_interval_narrows_with_the_number_of_questions():
    outcomes = (("Yes", ["yes"], "a"), ("Yes", ["no"], "a"), ("No", ["yes"], "a"), ("No", ["no"], "a"))

    def width(times):
        low, high = next(m for m in POPE.measures if m.name == "f1").score(records(*outcomes * times))[1]
        return high - low

    assert width(100) == pytest.approx(width(25) / 2, rel=0.2)  # with the square root


# ---------------------------------------------------------------------- ScienceQA


@pytest.mark.parametrize(
    ("text", "choices", "expected"),
    [
        ("B", 3, "B"),
        (" B ", 3, "B"),
        ("B. because it is", 3, "B"),
        ("B.", 3, None),  # without more text, a letter and a period name none
        ("B. ", 3, None),
        ("B\nbecause", 3, None),
        ("The answer is B.", 3, "B"),
        ("The answer is B, because", 3, "B"),
        ("I think. The answer is C", 3, None),  # a character must follow
        ("The answer is A, no. The answer is B.", 3, None),  # two letters
        ("The answer is D.", 3, None),
        ("D", 3, None),  # beyond the choices
        ("b", 3, None),
        ("B)", 3, None),
        ("steadiness", 3, None),  # the text of a choice is no letter
        ("", 3, None),
    ],
)
def test_chosen_letters(text, choices, expected):
    assert chosen_letter(text, choices) == expected


def test_scienceqa_without_a_letter_is_wrong():
    answered = records(("B", ["B"], "s"), ("stone", ["B"], "s"), ("A", ["B"], "s"), ("C", ["B"], "s"), choices=2)
    overall = summarise(answered, None, SCIENCEQA)["overall"]
    assert overall["accuracy"] == pytest.approx(1 / 4)
    assert overall["without_letter"] == pytest.approx(2 / 4)  # `stone`, and C of two choices
    assert overall["majority"]["accuracy"] == 1.0


# ---------------------------------------------------------------------- MME


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Yes", "yes"), ("no.", "no"), ("Yes, it is", "yes"), ("It is not", "other"), ("", "other"), ("I know", "other")],
)
def test_mme_answers(text, expected):
    assert mme_answer(text) == expected


def test_mme_accuracy_plus_and_sum():
    answered = records(
        ("yes", ["yes"], "existence", {"image_id": "a"}),
        ("no", ["no"], "existence", {"image_id": "a"}),
        ("yes", ["yes"], "existence", {"image_id": "b"}),
        ("yes", ["no"], "existence", {"image_id": "b"}),
        ("maybe", ["yes"], "code_reasoning", {"image_id": "c"}),
        ("no", ["no"], "code_reasoning", {"image_id": "c"}),
    )
    summary = summarise(answered, None, MME)
    overall = summary["overall"]
    assert overall["accuracy"] == pytest.approx(4 / 6)
    assert overall["accuracy_plus"] == pytest.approx(1 / 3)
    assert overall["accuracy_plus_interval"] == pytest.approx(wilson_interval(1 / 3, 3))  # of images
    # existence: 75 + 50 of 200; code reasoning: 50 + 0
    assert (overall["sum"], overall["perception"], overall["cognition"]) == (175.0, 125.0, 50.0)
    assert summary["categories"]["existence"]["sum"] == 125.0
    assert summary["categories"]["existence"]["cognition"] is None
    low, high = overall["sum_interval"]
    assert 0 <= low <= 175 <= high <= 400


# ---------------------------------------------------------------------- captions


def test_captions_of_a_set():
    answered = records(
        ("A red ball lies on the street", ["A red ball lies on the street.", "a ball"], None),
        ("zebra", ["A man holds two dogs."], None),
    )
    summary = summarise(answered, answered, CAPTIONS)
    overall = summary["overall"]
    assert overall["rouge_l"] == pytest.approx(1 / 2)
    assert 0 < overall["cider_d"] < 5 and overall["cider_d_interval"][0] == 0
    assert overall["blind"]["cider_d"] == overall["cider_d"]
    assert [CAPTIONS.is_right(record) for record in answered] == [True, False]
    # the constant answer is one of the captions: right for one image of two
    assert 0 < overall["majority"]["rouge_l"] < 1
    assert summary["categories"]["(no type)"] == overall
