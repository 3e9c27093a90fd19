"""Damage of every kind to a checkpoint with a manifest is noticed; other files beside it do not matter."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import save_file

from jnana.processing.data.files import digest_of
from jnana.training.saving.checkpoints import checkpoint_problem, checkpoint_to_resume, is_unfinished
from jnana.training.saving.manifests import MANIFEST, manifest_problem, write_manifest


@pytest.fixture
def run(tmp_path):
    for step in (2, 4):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    return tmp_path


def write_checkpoint(folder):
    (folder / "global_shards").mkdir(parents=True)
    save_file({"weight": torch.ones(40, 3), "bias": torch.zeros(3)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "global_shards/rank_0.bin"):
        torch.save({"values": torch.ones(100)}, folder / name)
    (folder / "config.json").write_text(json.dumps({"model_type": "jnana"}))
    (folder / "README.md").write_text("a card")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 4, "log_history": []}))
    write_manifest(folder)


def flip(file, position=-9):
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def zero(file):
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    file.write_bytes(content)


CHANGED = "has changed since it was written"
DAMAGE = {
    "a flipped bit": ("model.safetensors", flip, CHANGED),
    "zeros in weights": ("model.safetensors", lambda file: zero(file), CHANGED),
    "zeros in an optimizer": ("optimizer.pt", zero, CHANGED),
    "a shard": ("global_shards/rank_0.bin", flip, CHANGED),
    "no schedule": ("scheduler.pt", lambda file: file.unlink(), "is missing"),
    "no random state": ("rng_state.pth", lambda file: file.unlink(), "is missing"),
    "a broken config": ("config.json", lambda file: file.write_text("{"), "is truncated"),
    "an appended byte": ("config.json", lambda file: file.write_text(file.read_text() + " "), "is longer"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_passed_over_with_a_line(what, run, caplog):
    name, damage, words = DAMAGE[what]
    damage(run / "checkpoint-4" / name)
    with caplog.at_level(logging.INFO):
        assert checkpoint_to_resume(str(run), None) == str(run / "checkpoint-2")
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith(f"{run / 'checkpoint-4'} is skipped: {name} {words}")


@pytest.mark.parametrize("what", [what for what, (_, _, words) in DAMAGE.items() if words == CHANGED])
def test_without_a_manifest_it_is_not_noticed(what, run):
    """The control: judged as versions without manifests judged it, by sizes."""
    name, damage, _ = DAMAGE[what]
    damage(run / "checkpoint-4" / name)
    (run / "checkpoint-4" / MANIFEST).unlink()
    assert checkpoint_to_resume(str(run), None) == str(run / "checkpoint-4")


def test_reading_may_be_left_out(run):
    flip(run / "checkpoint-4" / "model.safetensors")
    assert manifest_problem(run / "checkpoint-4", read=False) is None
    assert CHANGED in manifest_problem(run / "checkpoint-4")


def test_cards_and_other_files_may_change(run):
    folder = run / "checkpoint-4"
    (folder / "README.md").write_text("scores were added")
    (folder / "merged").mkdir()
    (folder / "merged" / "model.safetensors").touch()
    assert checkpoint_problem(folder) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 1, "files": {"config.json": 7}}'])
def test_a_damaged_manifest(content, run):
    (run / "checkpoint-4" / MANIFEST).write_text(content)
    assert checkpoint_problem(run / "checkpoint-4") == f"{MANIFEST} is damaged"


def test_a_manifest_of_a_later_version(run):
    (run / "checkpoint-4" / MANIFEST).write_text('{"format": 2, "files": {}}')
    assert "is of format 2, this version reads 1" in checkpoint_problem(run / "checkpoint-4")


def test_the_digest_is_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert digest_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_checkpoint_that_was_not_finished(run):
    """After a kill between trainer_state.json and the manifest, essential files may be missing."""
    folder = run / "checkpoint-4"
    (folder / MANIFEST).unlink()
    assert checkpoint_problem(folder) is None  # of an older version, as far as the directory tells
    record = {"format": 1, "options": {}, "data": None, "manifests_after": 2}
    (run / "recipe_record.json").write_text(json.dumps(record))
    assert checkpoint_problem(folder) == f"it was not finished ({MANIFEST} is missing)"
    (run / "checkpoint-2" / MANIFEST).unlink()
    assert checkpoint_problem(run / "checkpoint-2") is None  # the run was begun by an older version
    assert not is_unfinished(run / "checkpoint-2")


class TestNothingToResumeFrom:
    def test_damaged_ones_are_kept_and_named(self, run):
        flip(run / "checkpoint-4" / "model.safetensors")
        (run / "checkpoint-2" / "rng_state.pth").unlink()
        with pytest.raises(ValueError, match="none to resume from .checkpoint-4: model.safetensors has changed.*;"):
            checkpoint_to_resume(str(run), None)
        assert len(list(run.glob("checkpoint-*"))) == 2
        assert checkpoint_to_resume(str(run), None, overwrite=True) is None

    def test_weights_only(self, run):
        for folder in run.glob("checkpoint-*"):
            (folder / "optimizer.pt").unlink()
            write_manifest(folder)
        with pytest.raises(ValueError, match="was it saved with save_only_model.*overwrite_output_dir: true"):
            checkpoint_to_resume(str(run), None)
        assert checkpoint_problem(run / "checkpoint-4", with_optimizer=False) is None

    def test_a_kill_in_the_first_checkpoint_starts_anew(self, run):
        """Nothing that was ever complete is lost."""
        shutil.rmtree(run / "checkpoint-4")
        (run / "checkpoint-2" / MANIFEST).unlink()
        (run / "checkpoint-2" / "trainer_state.json").unlink()
        with pytest.raises(ValueError, match="none to resume from"):
            checkpoint_to_resume(str(run), None)
        record = {"format": 1, "options": {}, "data": None, "manifests_after": 0}
        (run / "recipe_record.json").write_text(json.dumps(record))
        assert checkpoint_to_resume(str(run), None) is None
