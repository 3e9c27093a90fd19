"""The GPU benchmark, tiny on a CPU: each line is there as soon as it is measured, and what can't run is named."""

import json
import logging

import pytest

from benchmarks import gpu


@pytest.fixture(autouse=True)
def log_levels():
    """The script silences loggers; other tests of the same process read what they say."""
    loggers = [logging.getLogger(name) for name in ("jnana.training.stages", "jnana.training.feature_cache", "PIL")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def parts(monkeypatch):
    """Replaces all parts by the ones given."""

    def replace(**functions):
        monkeypatch.setattr(gpu, "parts_of_run", lambda scale: functions)

    return replace


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_part_runs_or_is_skipped_by_name(tmp_path, monkeypatch):
    assert set(gpu.TINY_SHAPES) < set(gpu.parts_of_run(gpu.SCALES["tiny"]))
    assert set(gpu.SHAPES) < set(gpu.parts_of_run(gpu.SCALES["phi2"]))
    monkeypatch.setattr(gpu, "TINY_SHAPES", ("sft-4",))  # for time
    file = gpu.main(["--tiny", "--output", str(tmp_path / "gpu.jsonl")])
    found = lines(file)
    names = list(dict.fromkeys(line["part"] for line in found))
    assert names == ["machine", "attention", "nf4-bf16", "sft-4", "qlora-memory"]
    assert not [line for line in found if "failed" in line]
    assert [line["part"] for line in found if "skipped" in line] == ["attention"]
    rates = {line["weights"]: line["tokens_per_second"] for line in found if "weights" in line}
    assert set(rates) == {"nf4", "float32"} and min(rates.values()) > 0
    arms = [line for line in found if line["part"] == "sft-4" and "arm" in line]
    assert [line["arm"] for line in arms] == ["llava", "padded", "shared_image", "feature_cache"]
    assert all(0 < line["mfu"] < 1 for line in arms)
    memory = next(line for line in found if line.get("phase") == "training")
    assert memory["forecast"]["peak_gb"] > 0 and "weights nf4" in memory["forecast"]["parts"]


def test_a_part_that_fails_leaves_the_others(parts, tmp_path):
    file = tmp_path / "gpu.jsonl"

    def breaks(log, *rest):
        log.write("first", value=1)
        assert [line["part"] for line in lines(file)] == ["machine", "first"]  # written as it is measured
        raise RuntimeError("it broke")

    parts(first=breaks, second=lambda log, *rest: log.write("second", value=2))
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--tiny", "--output", str(file)])
    assert stopped.value.code == 1
    said = lines(file)
    assert [line.get("failed") for line in said] == [None, None, "RuntimeError: it broke", None, None]
    assert said[3]["value"] == 2


def test_no_part_begins_after_the_time(parts, tmp_path):
    parts(first=lambda *given: pytest.fail("it began"))
    file = gpu.main(["--tiny", "--minutes", "0", "--output", str(tmp_path / "gpu.jsonl")])
    assert lines(file)[-1]["skipped"] == "0 minutes are over"


def test_it_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="There is no CUDA GPU here.*--tiny"):
        gpu.main([])
