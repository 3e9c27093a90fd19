"""The benchmark of an evaluation: all methods answer the same questions, and a difference ends it."""

import json

import pytest

from benchmarks import evaluate_throughput
from jnana.evaluation import generation


SMALL = ["--scale", "tiny", "--image_tokens", "16", "--images", "2", "--rounds", "2"]


def test_one_command_writes_figures(tmp_path, capsys):
    file = tmp_path / "evaluate.json"
    result = evaluate_throughput.main([*SMALL, "--output", str(file)])
    (case,) = result["cases"]
    assert json.loads(file.read_text())["cases"] == [case]
    assert case["questions"] == 12 and case["different_answers"] > 3
    for method, measured in case["methods"].items():
        assert measured["questions_per_cpu_second"]["min"] > 0, method
    assert case["ratios"]["shared/shared, cpu"]["rounds"] == [1.0, 1.0]
    assert len(evaluate_throughput.table(case).splitlines()) == 5
    assert "12 questions about 2 images" in capsys.readouterr().out


def test_other_answers_end_the_run(monkeypatch):
    right = generation.cache_of_rows
    monkeypatch.setattr(generation, "cache_of_rows", lambda cache, rows: right(cache, 1 - rows))  # the other image
    with pytest.raises(SystemExit, match="answers differ"):
        evaluate_throughput.main(SMALL)
