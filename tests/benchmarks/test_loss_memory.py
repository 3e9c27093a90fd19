"""benchmarks/loss_memory.py on a tiny head: one command compares the losses and writes the figures."""

import json

import pytest
import torch

from benchmarks import loss_memory


def test_one_command_writes_figures(tmp_path, monkeypatch):
    """The single runs in this process, because a fresh one takes seconds to start."""

    def measure_here(arm, name, state, args):
        return loss_memory.main(["--labels", str(args.labels), "--one", arm, name, state])

    monkeypatch.setattr(loss_memory, "measure_apart", measure_here)
    threads = torch.get_num_threads()
    output = tmp_path / "result.json"
    loss_memory.main(["--heads", "tiny", "--labels", "40", "--output", str(output)])
    torch.set_num_threads(threads)
    heads = json.loads(output.read_text())["heads"]
    assert heads.keys() == {"tiny, frozen", "tiny, trained"}
    for figures in heads.values():
        assert figures["fused"]["loss"] == pytest.approx(figures["plain"]["loss"], rel=1e-6)
        assert len(figures["fused"]["time_ratios"]) == 1 and figures["plain"]["time_ratios"] == [1.0]


def test_another_loss_is_not_measured():
    runs = {arm: [{"peak_bytes": 8, "seconds": 1.0, "loss": loss}] for arm, loss in (("plain", 2.0), ("fused", 2.1))}
    with pytest.raises(RuntimeError, match="the loss of fused is 2.1, that of the plain path 2.0"):
        loss_memory.compare(runs, torch.float32)
