"""The benchmark of the attention of packed rows: it compares the same thing, and sees when it does not."""

import json

import pytest

from benchmarks import packed_attention


def test_one_command_writes_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(packed_attention, "CASES", {"small": [(20, [5, 6]), (0, [7])]})
    file = tmp_path / "attention.json"
    packed_attention.main(["--rounds", "3", "--output", str(file)])
    result = json.loads(file.read_text())
    found = result["cases"]["small"]
    assert found["difference"] < 1e-5 and found["smallest"] <= found["ratio"] <= found["largest"]
    assert "load_average" in result["machine"] and result["rounds"] == 3


def test_another_mask_is_seen(monkeypatch):
    right = packed_attention.dense_mask
    monkeypatch.setattr(packed_attention, "dense_mask", lambda segments, *ids: right(segments * 0, *ids))
    with pytest.raises(AssertionError, match="pieces and mask differ"):
        packed_attention.compare([(6, [5]), (7, [4])], 1)
