"""`accelerate launch` with one and with two processes: the same run."""

import json

import torch
from safetensors.torch import load_file

from tests.scripts.conftest import align_options
from tests.scripts.launching import finish, launch


def test_two_processes_are_one(data, vision, pretrained, tmp_path):
    """The same global batch of 4, as 4, as 2 x 2 and (the control) as a batch of 2."""
    common = {"max_steps": 4, "logging_steps": 1, "save_steps": 4}
    runs = {"one": (1, 4), "two": (2, 2), "half": (1, 2)}
    outputs = {}
    for pair in (("one", "two"), ("half",)):  # both cores at work, and no more than that
        started = {}
        for name in pair:
            processes, batch = runs[name]
            arguments = align_options(
                data, vision, pretrained, output_dir=tmp_path / name, per_device_train_batch_size=batch, **common
            )
            started[name] = launch("run_align.py", arguments, processes)
        outputs |= {name: finish(process) for name, process in started.items()}
    assert "1 process(es), not_parallel" in outputs["one"] or "1 process(es)" in outputs["one"]
    assert outputs["two"].count("2 process(es), distributed, on cpu") == 1  # two there are, and one of them speaks
    assert outputs["two"].count("stage align: what trains") == 1
    losses = {name: losses_of(tmp_path / name) for name in runs}
    torch.testing.assert_close(losses["two"], losses["one"], rtol=1e-5, atol=0)
    assert (losses["half"] - losses["one"]).abs().max() > 1e-3
    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in runs}
    for name, tensor in weights["one"].items():
        torch.testing.assert_close(weights["two"][name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert any((weights["half"][name] - tensor).abs().max() > 1e-4 for name, tensor in weights["one"].items())
    card = (tmp_path / "two" / "README.md").read_text()
    assert "4 on 2 process(es)" in card


def losses_of(folder) -> torch.Tensor:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return torch.tensor([entry["loss"] for entry in history if "loss" in entry], dtype=torch.float64)
