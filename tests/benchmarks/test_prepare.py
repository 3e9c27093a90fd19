"""The benchmark of what happens before the first step, at a thousandth of its size."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.prepare import TURNS


ROOT = Path(__file__).parents[2]


def test_all_starts_are_measured(tmp_path):
    command = [sys.executable, "-m", "benchmarks.prepare", "--scale", "0.001", "--output", str(tmp_path / "out.json")]
    command += ["--against", str(ROOT)]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    result = json.loads((tmp_path / "out.json").read_text())
    starts = result["starts"]
    assert [(start["name"], start["processes"]) for start in starts] == [
        ("cold", 1),
        ("warm", 1),
        ("warm", 2),
        ("before", 1),
        ("before", 2),
    ]
    measured = [values for start in starts for values in start["measured"]]
    assert len({values["rows"] for values in measured}) == 1 and measured[0]["rows"] > 10
    assert len({values["first_batches"] for values in measured}) == 1
    assert all(values["wall_s"] > 0 for values in measured)
    rates = result["collator_images_s"]
    assert [len(rates[name]) for name in ("now", "before", "Pillow alone")] == [TURNS, TURNS, 2 * TURNS]
    assert all(rate > 0 for values in rates.values() for rate in values)
    assert "collator, now over before: " in printed
