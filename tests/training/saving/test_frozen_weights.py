"""Checkpoints of a stage with frozen weights share one file of them, and each is whole for every reader."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from jnana.modeling import JnanaForConditionalGeneration
from jnana.training.saving import frozen_weights
from jnana.training.saving.checkpoints import checkpoint_problem
from jnana.training.saving.frozen_weights import checkpoint_tensors, copy_whole_weights, shared_frozen_weights
from jnana.training.saving.rotation import finished_checkpoints
from tests.training.saving.test_interruption import make_trainer


TRAINED, FROZEN = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CHANGES = {"max_steps": 3, "save_steps": 1, "save_strategy": "steps", "learning_rate": 1e-2}


def train(folder, checkpoint=None, **changes):
    torch.manual_seed(0)  # the images
    trainer = make_trainer(folder, **{**CHANGES, **changes})
    with finished_checkpoints(trainer), shared_frozen_weights(trainer, checkpoint):
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared") / "run"
    train(folder)
    return folder


def inode(folder, name=FROZEN) -> int:
    return (folder / name).stat().st_ino


def test_the_frozen_file_is_one(run):
    folders = [run / f"checkpoint-{step}" for step in (1, 2, 3)]
    assert len({inode(folder) for folder in folders}) == 1 and len({inode(folder, TRAINED) for folder in folders}) == 3
    trained, frozen = load_file(folders[0] / TRAINED), load_file(folders[0] / FROZEN)
    assert all("multi_modal_projector" in name for name in trained)
    assert not any("multi_modal_projector" in name for name in frozen)
    assert (folders[0] / TRAINED).stat().st_size < (folders[0] / FROZEN).stat().st_size / 5
    digests = [json.loads((folder / "checkpoint_manifest.json").read_text())["files"] for folder in folders]
    assert len({each[FROZEN]["sha256"] for each in digests}) == 1
    assert len({each[TRAINED]["sha256"] for each in digests}) == 3
    assert all(checkpoint_problem(folder) is None for folder in folders)
    assert not [path.name for path in folders[0].iterdir() if path.is_dir() or path.name == "model.safetensors"]


def test_the_final_directory_is_whole(run, tmp_path):
    final = load_file(run / "model.safetensors")
    assert not list(run.glob("model-*"))
    tensors = checkpoint_tensors(run / "checkpoint-3")
    assert final.keys() == tensors.keys() and all(torch.equal(final[name], tensors[name]) for name in final)
    copy_whole_weights(run / "checkpoint-3", tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    earlier = checkpoint_tensors(run / "checkpoint-1")  # the control
    assert any(not torch.equal(final[name], earlier[name]) for name in final)


def test_a_checkpoint_loads_like_any_other(run):
    model, info = JnanaForConditionalGeneration.from_pretrained(run / "checkpoint-2", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tensors = checkpoint_tensors(run / "checkpoint-2")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())


LOAD = """
import sys, torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "jnana" not in sys.modules
print(sum(weight.double().abs().sum().item() for weight in model.parameters()))
"""


def test_a_copy_loads_by_its_own_code_in_a_fresh_process(run, tmp_path):
    shutil.copytree(run / "checkpoint-2", tmp_path / "copy")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", LOAD, str(tmp_path / "copy")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ended.returncode == 0, ended.stderr
    model = JnanaForConditionalGeneration.from_pretrained(run / "checkpoint-2")
    assert float(ended.stdout) == sum(weight.double().abs().sum().item() for weight in model.parameters())


def test_a_resumed_run_shares_on(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-3", "model.safetensors"))
    before = (tmp_path / "run" / "checkpoint-2" / TRAINED).read_bytes()
    train(tmp_path / "run", str(tmp_path / "run" / "checkpoint-2"))
    assert inode(tmp_path / "run" / "checkpoint-3") == inode(tmp_path / "run" / "checkpoint-2")
    assert (tmp_path / "run" / "checkpoint-2" / TRAINED).read_bytes() == before
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_a_broken_checkpoint_is_written_again_and_the_others_stay(run, tmp_path):
    """Writing into the shared file would change every checkpoint."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoint-1", "checkpoint-3"))
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-3")
    for name in (TRAINED, FROZEN):
        (folder / "checkpoint-3" / name).unlink()
        os.link(folder / "checkpoint-2" / name, folder / "checkpoint-3" / name)
    train(folder, str(folder / "checkpoint-2"))
    assert all(checkpoint_problem(folder / f"checkpoint-{step}") is None for step in (2, 3))
    assert (folder / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_without_hard_links_the_file_is_written_each_time(run, tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError("no hard links")

    monkeypatch.setattr(frozen_weights.os, "link", refuse)
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-3", "model.safetensors"))
    train(tmp_path / "run", str(tmp_path / "run" / "checkpoint-2"))
    assert inode(tmp_path / "run" / "checkpoint-3") != inode(tmp_path / "run" / "checkpoint-2")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_rotation_leaves_the_file_to_those_that_stay(tmp_path):
    train(tmp_path / "run", save_total_limit=1)
    (folder,) = (tmp_path / "run").glob("checkpoint-*")
    assert folder.name == "checkpoint-3" and (folder / FROZEN).stat().st_nlink == 1
    assert checkpoint_problem(folder) is None


def test_the_model_gets_its_method_back(tmp_path):
    trainer = train(tmp_path / "run", max_steps=1)
    assert "save_pretrained" not in vars(trainer.model)
