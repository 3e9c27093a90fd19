"""Scores, intervals and baselines against values computed by hand."""

import itertools

import pytest

from jnana.evaluation import format_table, majority_answers, summarise, wilson_interval


NUMBERS = itertools.count(1)


def record(category, references, prediction, **more):
    number = next(NUMBERS)
    return {
        "source": f"test.json, record {number}",
        "category": category,
        "history": "",
        "question": "?",
        "references": references,
        "prediction": prediction,
        "complete": True,
        "blind": False,
        "key": f"run-{number}",
        **more,
    }


def blind_twin(original, prediction):
    return {**original, "prediction": prediction, "blind": True, "key": original["key"].replace("run", "other")}


@pytest.mark.parametrize(
    ("share", "count", "expected"),
    # Published values: Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    [
        (81 / 263, 263, (0.2553, 0.3662)),
        (15 / 148, 148, (0.0624, 0.1605)),
        (0 / 20, 20, (0.0, 0.1611)),
        (1 / 29, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_interval(share, count, expected):
    assert wilson_interval(share, count) == pytest.approx(expected, abs=5e-5)


def test_majority_answer_of_each_type():
    records = [
        record("exists", ["no"], "yes"),
        record("exists", ["no "], "yes"),
        record("exists", ["yes"], "yes"),
        record("count", ["two"], "x"),
        record("count", ["three"], "x"),
        record(None, ["red", "red", "red", "crimson"], "x"),
        record(None, ["crimson"], "x"),
    ]
    # a tie goes to the first in the alphabet; an answer counts once a question, however many people gave it
    assert majority_answers(records) == {"exists": "no", "count": "three", "(no type)": "crimson"}


def test_summary_by_hand():
    records = [
        record("exists", ["no"], "no"),
        record("exists", ["yes"], "no"),
        record("exists", ["no"], "No."),
        record("count", ["two"], "2", complete=False),
    ]
    blind = [
        blind_twin(original, prediction) for original, prediction in zip(records, ["no", "yes", "x", "x"], strict=True)
    ]
    summary = summarise(records, blind)

    exists = summary["categories"]["exists"]
    assert (exists["n"], exists["exact_match"], exists["vqa_accuracy"]) == (
        3,
        pytest.approx(1 / 3),
        pytest.approx(2 / 3),
    )
    assert exists["blind"]["exact_match"] == pytest.approx(2 / 3)
    assert exists["majority"]["exact_match"] == pytest.approx(2 / 3)
    assert summary["overall"]["n"] == 4
    assert summary["overall"]["exact_match"] == pytest.approx(1 / 4)
    assert summary["overall"]["exact_match_normalized"] == pytest.approx(3 / 4)
    assert summary["overall"]["exact_match_interval"] == pytest.approx(wilson_interval(1 / 4, 4))
    assert summary["overall"]["majority"]["exact_match"] == pytest.approx(3 / 4)
    assert summary["cut_off"] == 1
    # a model that gives the constant answers has the score of the baseline
    constant = [{**item, "prediction": summary["majority_answers"][item["category"]]} for item in records]
    assert summarise(constant)["overall"]["exact_match"] == summary["overall"]["majority"]["exact_match"]


def test_unanswered_questions_are_named_and_not_counted():
    records = [record("count", ["two"], "two"), record("count", ["two"], None, error="record 9: image 'x' is broken")]
    summary = summarise(records)
    assert summary["overall"]["n"] == 1 and summary["overall"]["exact_match"] == 1.0
    assert summary["unanswered"][0]["error"] == "record 9: image 'x' is broken"
    assert "record 9: image 'x' is broken" in format_table(summary, "test")
    with pytest.raises(ValueError, match="none of the 1 questions could be answered: record 9"):
        summarise(records[1:])


def test_blind_run_on_other_questions_is_refused():
    records = [record("count", ["two"], "two"), record("count", ["one"], "two")]
    with pytest.raises(ValueError, match="no answer to 1 of 2 questions"):
        summarise(records, [blind_twin(records[0], "two")])


def test_table_lines_up():
    records = [record("exists", ["no"], "no"), record("a rather long type", ["a\nlong " + "answer " * 9], "no")]
    lines = format_table(summarise(records), "the title").splitlines()
    assert lines[0] == "the title"
    header = next(line for line in lines if line.startswith("type"))
    row = next(line for line in lines if line.startswith("exists"))
    assert row[: header.index("exact match") + len("exact match")].endswith("100.0")
    assert row.split()[1] == "1" and "20.7 - 100.0" in row  # Wilson for 1 of 1: 1 / (1 + 1.96 ** 2)
    assert max(len(line) for line in lines) < 120
