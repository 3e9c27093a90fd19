"""Checkpoints are deleted by step number, and never the last that is complete."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from transformers import TrainerCallback

from jnana.training.monitoring import LossCurveCallback
from jnana.training.options.recipe_record import RECORD_FILE, write_record
from jnana.training.saving import run_lock
from jnana.training.saving.checkpoints import DELETED, checkpoint_problem, list_checkpoints, remove_checkpoint, step_of
from jnana.training.saving.interruption import restored_signals
from jnana.training.saving.manifests import MANIFEST, write_manifest
from jnana.training.saving.rotation import (
    FinishedCheckpointCallback,
    finished_checkpoints,
    rotate,
    rotate_finished_run,
)
from jnana.training.saving.run_lock import LOCK, LostDirectory, hold_directory, release_directories
from tests.training.saving.test_interruption import make_trainer
from tests.training.saving.test_manifests import flip, write_checkpoint


def steps(folder: Path) -> list[int]:
    return sorted(step_of(path) for path in list_checkpoints(str(folder)))


@pytest.fixture
def run(tmp_path):
    for step in (2, 4, 6, 8):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    return tmp_path


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [2, 4, 6, 8]),
        (0, None, [2, 4, 6, 8]),
        (3, None, [4, 6, 8]),
        (1, None, [8]),
        (2, 2, [2, 8]),
        (1, 4, [4, 8]),  # the newest beside the best: a finished run need not train again
        (3, 8, [4, 6, 8]),
    ],
)
def test_by_step_number(limit, best, left, run):
    rotate(run / "checkpoint-8", limit, None if best is None else f"/elsewhere/checkpoint-{best}")
    assert steps(run) == left


def test_later_ones_stay(run):
    """The run was resumed from step 2 by name, and has just written step 4."""
    rotate(run / "checkpoint-4", 1, None)
    assert steps(run) == [4, 6, 8]


def test_broken_ones_do_not_count_and_are_deleted(run):
    (run / "checkpoint-6" / "rng_state.pth").unlink()
    (run / "checkpoint-2" / "trainer_state.json").unlink()
    rotate(run / "checkpoint-8", 2, None)
    assert steps(run) == [4, 8]


def test_an_interrupted_deletion_is_recognised(run, monkeypatch):
    def interrupted(folder, ignore_errors=False):
        if Path(folder).is_dir():
            (Path(folder) / "optimizer.pt").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            remove_checkpoint(run / "checkpoint-2")
    assert steps(run) == [4, 6, 8] and (run / f"{DELETED}2").is_dir()
    rotate(run / "checkpoint-8", 3, None)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]


def finish(run: Path, limit: int | None) -> None:
    """Make the checkpoints those of a finished run, written one after another."""
    write_record(str(run), {}, None, limit)
    for folder in list_checkpoints(str(run)):
        write_manifest(folder)
        os.utime(folder / MANIFEST, (step_of(folder), step_of(folder)))


@pytest.mark.parametrize(
    ("recorded", "limit", "best", "left"),
    [
        (2, 2, None, [6, 8]),
        (2, 2, 4, [4, 8]),
        (1, 3, None, [4, 6, 8]),  # the start that recorded 1 may have been killed before it trained
        (3, 1, None, [4, 6, 8]),
        (None, 1, None, [2, 4, 6, 8]),
        (1, None, None, [2, 4, 6, 8]),
        (1, 0, None, [2, 4, 6, 8]),
    ],
)
def test_a_finished_run_by_the_larger_limit(recorded, limit, best, left, run):
    finish(run, recorded)
    (run / f"{DELETED}1").mkdir()
    rotate_finished_run(str(run), str(run / "checkpoint-8"), limit, best and f"/elsewhere/checkpoint-{best}")
    assert steps(run) == left and not (run / f"{DELETED}1").exists()


@pytest.mark.parametrize("name", ["end", "checkpoint-best"])
def test_the_end_of_a_finished_run_under_another_name(name, run, tmp_path_factory):
    finish(run, 1)
    link, copy = tmp_path_factory.mktemp("links") / name, run / name
    shutil.copytree(run / "checkpoint-8", copy)
    rotate_finished_run(str(run), str(copy), 1, None)
    assert steps(run) == [2, 4, 6, 8]
    link.symlink_to(run / "checkpoint-8")
    rotate_finished_run(str(run), str(link), 1, None)
    assert steps(run) == [8]


@pytest.mark.parametrize("case", ["no record", "another run's", "no optimizers", "resumed from an earlier step"])
def test_of_a_finished_run_that_trains_nothing_no_other_checkpoint_is_deleted(case, run, tmp_path_factory):
    limit, output_dir = 4 if case == "no optimizers" else 1, run
    finish(run, limit)
    if case == "no record":
        (run / RECORD_FILE).unlink()
    elif case == "another run's":
        output_dir = tmp_path_factory.mktemp("other")
    elif case == "no optimizers":
        for folder in list_checkpoints(str(run)):
            (folder / "optimizer.pt").unlink()
        finish(run, limit)
    else:
        os.utime(run / "checkpoint-6" / MANIFEST, (9, 9))
    rotate_finished_run(str(output_dir), str(run / "checkpoint-8"), limit, None)
    assert steps(run) == [2, 4, 6, 8]


class SetClockBack(TrainerCallback):
    """Every checkpoint is older than the one before, as on a machine whose clock is set back after each."""

    def on_step_end(self, args, state, control, **kwargs):
        for folder in list_checkpoints(args.output_dir):
            os.utime(folder, (2e9 - state.global_step, 2e9 + 1e6 - state.global_step))


def test_a_clock_set_back(tmp_path):
    changes = {"max_steps": 4, "save_steps": 1, "save_strategy": "steps", "save_total_limit": 2}
    trainer = make_trainer(tmp_path / "ours", SetClockBack(), **changes)
    with finished_checkpoints(trainer):
        trainer.train()
    assert steps(tmp_path / "ours") == [3, 4]
    assert all(checkpoint_problem(folder) is None for folder in list_checkpoints(tmp_path / "ours"))
    assert trainer.args.save_total_limit == 2
    # the control: the Trainer's own rotation keeps the first
    make_trainer(tmp_path / "stock", SetClockBack(), **changes).train()
    assert steps(tmp_path / "stock")[0] == 1


class Watch(TrainerCallback):
    def __init__(self):
        self.limits, self.manifests = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.limits.append(args.save_total_limit)

    def on_save(self, args, state, control, **kwargs):
        self.manifests.append((Path(args.output_dir) / f"checkpoint-{state.global_step}" / MANIFEST).is_file())


def test_the_limit_is_withheld_and_the_manifest_is_last(tmp_path):
    watch = Watch()
    trainer = make_trainer(tmp_path, watch, max_steps=2, save_steps=1, save_strategy="steps", save_total_limit=1)
    with finished_checkpoints(trainer):
        trainer.train()
        names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert watch.limits == [None, None] and watch.manifests == [False, False]
    assert names[-3:] == ["FinishedCheckpointCallback", "StopSignalCallback", "HeldDirectoryCallback"]
    assert steps(tmp_path) == [2] and trainer.args.save_total_limit == 1
    assert not any(isinstance(each, FinishedCheckpointCallback) for each in trainer.callback_handler.callbacks)


def test_pictures_come_after_the_manifest(tmp_path):
    """The record of an adapter's base and the code, and then the manifest, are written before the loss curve."""
    watch = Watch()  # stands for what writes into a checkpoint
    trainer = make_trainer(tmp_path, LossCurveCallback(), watch)
    with finished_checkpoints(trainer):
        names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    order = ["Watch", "FinishedCheckpointCallback", "LossCurveCallback", "StopSignalCallback", "HeldDirectoryCallback"]
    assert [name for name in names if name in order] == order


class LoseDirectory(TrainerCallback):
    """Another host's run takes the lock, or somebody deletes it, as a step begins or while a checkpoint is written."""

    def __init__(self, event: str, step: int, deleted: bool):
        self.step, self.deleted = step, deleted
        setattr(self, event, self.lose)

    def lose(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            lock = Path(args.output_dir) / LOCK
            own = json.loads(lock.read_text())
            lock.unlink() if self.deleted else lock.write_text(json.dumps({**own, "host": "another"}))


@pytest.mark.parametrize("deleted", [False, True])
@pytest.mark.parametrize(
    ("event", "step", "left", "finished"),
    [
        ("on_step_begin", 3, [2], [2]),
        ("on_evaluate", 4, [2], [2]),
        ("on_save", 4, [2, 4], [2]),  # too late for its files, but it gets no manifest, and nothing is deleted
    ],
)
def test_a_run_that_lost_its_directory_stops(tmp_path, monkeypatch, event, step, left, finished, deleted):
    monkeypatch.setattr(run_lock, "GLANCE", 0.01)
    changes = {"max_steps": 6, "save_steps": 2, "save_strategy": "steps", "save_total_limit": 1}
    trainer = make_trainer(tmp_path, LoseDirectory(event, step, deleted), **changes)
    trainer.eval_dataset, trainer.args.eval_strategy, trainer.args.eval_steps = trainer.train_dataset, "steps", 2
    hold_directory(str(tmp_path))
    try:
        message = "is gone: another run took it" if deleted else "now belongs to process .* on host 'another'"
        stops = pytest.raises(LostDirectory, match=f"{LOCK} {message}")
        with stops, restored_signals(trainer), finished_checkpoints(trainer):
            trainer.train()
    finally:
        release_directories()
    assert steps(tmp_path) == left
    assert [step for step in left if (tmp_path / f"checkpoint-{step}" / MANIFEST).is_file()] == finished
    assert (tmp_path / LOCK).exists() is not deleted  # the lock of the other run is not touched


def test_a_run_that_looks_away_would_write_on(tmp_path, monkeypatch):
    """The control."""
    monkeypatch.setattr("jnana.training.saving.rotation.check_directories", lambda: None)
    changes = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "save_total_limit": 1}
    trainer = make_trainer(tmp_path, LoseDirectory("on_step_begin", 3, False), **changes)
    hold_directory(str(tmp_path))
    try:
        with finished_checkpoints(trainer):
            trainer.train()
    finally:
        release_directories()
    assert steps(tmp_path) == [4]


def test_the_limit_is_restored_after_an_error(tmp_path):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("an error in training")

    trainer = make_trainer(tmp_path, Fail(), save_total_limit=3)
    error = pytest.raises(RuntimeError, match="an error in training")
    with error, restored_signals(trainer), finished_checkpoints(trainer):
        trainer.train()
    assert trainer.args.save_total_limit == 3


def test_broken_later_checkpoints_are_deleted_when_training_begins(tmp_path):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-2" / "scheduler.pt").unlink()
    flip(tmp_path / "checkpoint-3" / "optimizer.pt")
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="no")
    with finished_checkpoints(trainer):
        trainer.train()
    assert steps(tmp_path) == [1, 3]


def test_a_disk_that_does_not_answer_loses_no_checkpoint(run, monkeypatch, caplog):
    """The control: a checkpoint whose file is truly gone is deleted."""
    folder, newest = run / "checkpoint-4", run / "checkpoint-8"
    write_manifest(folder)
    read = Path.read_text

    def stale(self, *args, **kwargs):
        if self == folder / MANIFEST:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", stale)
        rotate(newest, 5, None)
    assert steps(run) == [2, 4, 6, 8] and "is kept, although" in caplog.text
    next(folder.glob("*.safetensors")).unlink()
    rotate(newest, 5, None)
    assert steps(run) == [2, 6, 8]
