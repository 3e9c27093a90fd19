"""`accelerate launch` with one and with two processes: the same run."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from jnana import run_align, run_pretrain
from tests.scripts.conftest import PRETRAIN, align_options, options
from tests.scripts.launching import finish, launch


def test_two_processes_are_one(data, vision, pretrained, tmp_path):
    """The same global batch of 4, as 4, as 2 x 2 and (the control) as a batch of 2."""
    common = {"max_steps": 6, "logging_steps": 1, "save_strategy": "no"}

    def arguments(name: str, batch: int, **changes) -> list[str]:
        changes = {**common, **changes, "output_dir": tmp_path / name, "per_device_train_batch_size": batch}
        return align_options(data, vision, pretrained, **changes)

    outputs = {"one": finish(launch("run_align.py", arguments("one", 4)))}
    outputs["two"] = finish(launch("run_align.py", arguments("two", 2), processes=2))
    run_align.main(arguments("half", 2))
    assert "1 process(es), " in outputs["one"]
    assert outputs["two"].count("2 process(es), distributed, on cpu") == 1  # two there are, and one of them speaks
    assert outputs["two"].count("stage align: trained parameters") == 1
    assert_same_run(tmp_path / "two", tmp_path / "one")
    work = {name: re.search(r"trained [\d,]+ tokens and 24 images", output)[0] for name, output in outputs.items()}
    assert work["two"] == work["one"]  # summed over the processes
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "half", tmp_path / "one")
    card = (tmp_path / "two" / "README.md").read_text()
    assert "4 on 2 process(es)" in card


def test_two_processes_share_a_stream(data, tmp_path):
    """A streamed corpus, longer than the file so that it starts over: the two take turns, a batch each."""
    changes = {"train_data": data / "corpus.txt", "streaming": "true", "logging_steps": 1, "save_strategy": "no"}
    changes["adam_epsilon"] = "1e-3"  # or AdamW makes whole steps of rounding noise: keys' biases have no gradient
    for name, batch, processes in (("one", 8, 1), ("two", 4, 2)):
        values = {**PRETRAIN, **changes, "per_device_train_batch_size": batch, "output_dir": tmp_path / name}
        if processes == 1:
            run_pretrain.main(options(**values))
        else:
            assert "2 process(es)" in finish(launch("run_pretrain.py", options(**values), processes))
    assert_same_run(tmp_path / "two", tmp_path / "one")


def assert_same_run(folder, reference) -> None:
    """The same losses at every step, and the same weights at the end."""
    torch.testing.assert_close(losses_of(folder), losses_of(reference), rtol=1e-5, atol=0)
    ours, theirs = load_file(folder / "model.safetensors"), load_file(reference / "model.safetensors")
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=2e-6, msg=name)


def losses_of(folder) -> torch.Tensor:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return torch.tensor([entry["loss"] for entry in history if "loss" in entry], dtype=torch.float64)
