"""The memory forecast is within 10 % of what torch allocates, for small models too; one command writes both."""

import json

import pytest

from benchmarks import memory_forecast
from benchmarks.memory_forecast import CASES, measure
from benchmarks.workloads import SCALES


TINY = SCALES["tiny"]
TESTED = (
    "align-frozen",
    "sft-full-muon",
    "sft-lora-checkpointed",
    "sft-lora-nf4-checkpointed",
    "sft-lora-cross-attention",
    "pretrain",
)


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[int, int]]:
    """Forecast and measured bytes of some cases."""
    pairs = {name: measure(CASES[name], TINY) for name in TESTED}
    return {name: (forecast.total, measured["measured"]) for name, (forecast, measured) in pairs.items()}


@pytest.mark.parametrize("name", TESTED)
def test_the_forecast_is_close(found, name):
    forecast, measured = found[name]
    assert forecast == pytest.approx(measured, rel=0.1)


def test_the_cases_differ(found):
    """The control: the forecast of one case is not within 10 % of another's measurement."""
    assert found["sft-full-muon"][0] != pytest.approx(found["sft-lora-checkpointed"][1], rel=0.1)
    assert found["align-frozen"][0] != pytest.approx(found["sft-full-muon"][1], rel=0.1)


def test_the_committed_results_are_close():
    """At 1 GB and more, in float32: benchmarks/results/memory_forecast_cpu.json."""
    result = json.loads((memory_forecast.RESULTS / "memory_forecast_cpu.json").read_text())
    assert {"align-frozen", "sft-lora", "sft-full"} <= {case["case"] for case in result["cases"]}
    for case in result["cases"]:
        assert case["measured"] >= 1e9 and case["forecast"] == pytest.approx(case["measured"], rel=0.1)


def test_one_command_writes_both(tmp_path, capsys):
    file = tmp_path / "memory.json"
    memory_forecast.main(["--scale", "tiny", "--cases", "pretrain", "--output", str(file)])
    (case,) = json.loads(file.read_text())["cases"]
    assert case["forecast_over_measured"] == case["forecast"] / case["measured"]
    assert "| pretrain | 1 x 64 |" in capsys.readouterr().out
