"""examples/custom_loop.py on a tiny checkpoint: the loss falls, and only the projector changes."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from jnana import load_model
from tests.evaluation.conftest import save_tiny_checkpoint, write_test_set


SCRIPT = Path(__file__).parents[2] / "examples" / "custom_loop.py"
EPOCHS = 12  # of one step each


@pytest.mark.parametrize("learning_rate", [1e-2, 0.0])
def test_the_loss_falls_and_only_the_projector_changes(tmp_path, monkeypatch, capsys, learning_rate):
    checkpoint, data, output = save_tiny_checkpoint(tmp_path), write_test_set(tmp_path / "data"), tmp_path / "out"
    command = [SCRIPT, checkpoint, data, output, "--epochs", EPOCHS, "--learning_rate", learning_rate]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    runpy.run_path(str(SCRIPT), run_name="__main__")

    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", capsys.readouterr().out)]
    before, after = (load_model(str(folder))[0].state_dict() for folder in (checkpoint, output))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert len(losses) == EPOCHS and before.keys() == after.keys()
    if learning_rate == 0.0:  # the control
        assert max(losses) - min(losses) < 1e-3 and changed == set()
    else:
        assert losses[-1] < losses[0] - 0.03  # a random language model gives little more
        assert changed and all("multi_modal_projector" in name for name in changed)
