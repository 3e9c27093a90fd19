"""A run resumes from its last complete checkpoint."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from jnana.training.saving.checkpoints import checkpoint_problem, checkpoint_to_resume, delete_checkpoints


@pytest.fixture
def run(tmp_path):
    """A run's directory with checkpoints at steps 2, 4 and 10 (10 sorts before 2 as text)."""
    for step in (2, 4, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"weight": torch.ones(40, 3), "bias": torch.zeros(3)}, folder / "model.safetensors")
        torch.save({"step": step}, folder / "optimizer.pt")
        torch.save({"step": step}, folder / "rng_state.pth")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-best").mkdir()
    return tmp_path


def cut(file, share=0.5):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def test_takes_the_last(run, caplog):
    with caplog.at_level(logging.INFO):
        assert checkpoint_to_resume(str(run), None) == str(run / "checkpoint-10")
    assert "resuming from" in caplog.text


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_file_is_skipped(run, name, share, caplog):
    cut(run / "checkpoint-10" / name, share)
    assert checkpoint_to_resume(str(run), None) == str(run / "checkpoint-4")
    assert "checkpoint-10 is skipped" in caplog.text and name in caplog.text


def test_a_missing_file_is_skipped(run):
    (run / "checkpoint-10" / "trainer_state.json").unlink()
    (run / "checkpoint-4" / "model.safetensors").unlink()
    assert checkpoint_to_resume(str(run), None) == str(run / "checkpoint-2")


def test_shards_are_all_needed(run):
    folder = run / "checkpoint-10"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"weight": "model-00001-of-00002.safetensors", "bias": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint_problem(folder) == "model-00002-of-00002.safetensors is missing"


def test_sharded_checkpoints(run):
    """FSDP's files, FSDP's directories, DeepSpeed's directory: each complete, then with one part missing."""
    folder = run / "checkpoint-10"
    (folder / "optimizer.pt").rename(folder / "optimizer.bin")
    assert checkpoint_problem(folder) is None
    cut(folder / "optimizer.bin")
    assert checkpoint_problem(folder) == "optimizer.bin is truncated"
    (folder / "optimizer.bin").unlink()
    assert "optimizer.pt is missing" in checkpoint_problem(folder)
    (folder / "model.safetensors").unlink()
    assert checkpoint_problem(folder) == "the directory holds no weights"
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (folder / name).mkdir()
        assert checkpoint_problem(folder) == f"{name} is incomplete"
        (folder / name / ".metadata").touch()
    assert checkpoint_problem(folder) is None
    folder = run / "checkpoint-4"
    (folder / "optimizer.pt").rename(folder / "global_step4")
    assert checkpoint_problem(folder) == "`latest` is missing"
    (folder / "latest").write_text("global_step4")
    assert checkpoint_problem(folder) is None


def test_nothing_to_resume(tmp_path):
    assert checkpoint_to_resume(str(tmp_path), None) is None
    assert checkpoint_to_resume(str(tmp_path / "new"), None) is None
    with pytest.raises(ValueError, match="resume_from_checkpoint is 'true', but .* no complete checkpoint"):
        checkpoint_to_resume(str(tmp_path), "true")


def test_named_checkpoint(run):
    assert checkpoint_to_resume(str(run), str(run / "checkpoint-2")) == str(run / "checkpoint-2")
    cut(run / "checkpoint-2" / "model.safetensors")
    with pytest.raises(ValueError, match="cannot be used: model.safetensors is truncated"):
        checkpoint_to_resume(str(run), str(run / "checkpoint-2"))


def test_overwriting(run):
    assert checkpoint_to_resume(str(run), None, overwrite=True) is None
    with pytest.raises(ValueError, match="give only one"):
        checkpoint_to_resume(str(run), str(run / "checkpoint-2"), overwrite=True)
    delete_checkpoints(str(run))
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-best"]
