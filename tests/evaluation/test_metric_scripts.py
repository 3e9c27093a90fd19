"""The metrics as `evaluate.load` takes them from a clone: scripts that run without jnana."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jnana import evaluation


METRICS = Path(__file__).parents[2] / "evaluation" / "metrics"

LOAD_SCRIPTS = f"""
import sys, evaluate
sys.modules["jnana"] = None  # from here on, importing jnana raises ImportError
vqa_accuracy = evaluate.load({str(METRICS / "vqa_accuracy.py")!r})
print(vqa_accuracy.compute(predictions=["Two.", "red"], references=[["2"] * 9 + ["3"], ["blue"]]))
exact_match = evaluate.load({str(METRICS / "exact_match.py")!r})
print(exact_match.compute(predictions=["A cat"], references=[["cat", "kitten"]]))
"""

IMPORTS = """
import sys, jnana.run_evaluate
print({"evaluate", "matplotlib"} & set(sys.modules))
from jnana.evaluation import VQAAccuracy  # the control: an import that the line above would show
print({"evaluate", "matplotlib"} & set(sys.modules))
"""


def run(program: str, cwd: Path, **environment: str) -> list[str]:
    """The lines that a program prints in a fresh interpreter."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_evaluate_loads_the_scripts_from_a_path(tmp_path):
    cache = {"HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_EVALUATE_OFFLINE": "1"}
    assert run(LOAD_SCRIPTS, tmp_path, **cache) == [
        "{'vqa_accuracy': 0.5}",
        "{'exact_match': 0.0, 'exact_match_normalized': 1.0}",
    ]


def test_the_package_offers_the_same_classes():
    assert evaluation.VQAAccuracy.__module__ == "jnana.evaluation.metrics.vqa_accuracy"
    assert evaluation.ExactMatch.__module__ == "jnana.evaluation.metrics.exact_match"
    with pytest.raises(AttributeError, match="no attribute 'CIDEr'"):
        evaluation.CIDEr  # noqa: B018


def test_run_evaluate_imports_neither_evaluate_nor_matplotlib():
    assert run(IMPORTS, METRICS.parents[1]) == ["set()", "{'evaluate'}"]
