"""Signals while training: what is restored when training ends in any way, and which processes are ended with it."""

import multiprocessing
import os
import signal
import sys
import time

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments

from jnana.training.saving import interruption
from jnana.training.saving.interruption import (
    LAUNCHER_DELAY,
    STOP_SIGNALS,
    StopSignalCallback,
    kill_workers,
    restored_signals,
)
from jnana.training.stages import apply_stage
from tests.training.test_stages import batch, pair


STOPS = [getattr(signal, name) for name in STOP_SIGNALS]


class Fail(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise RuntimeError("an error in training")


def make_trainer(folder, *callbacks, **changes) -> Trainer:
    inputs = batch()
    images = torch.randn(8, 3, 24, 24)
    rows = [{"input_ids": inputs["input_ids"][0], "labels": inputs["labels"][0], "pixel_values": i} for i in images]
    values = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True}
    args = TrainingArguments(output_dir=folder, remove_unused_columns=False, **{**values, **changes})
    model = apply_stage(pair(), "align")
    return Trainer(model=model, args=args, train_dataset=rows, callbacks=[*callbacks, StopSignalCallback()])


def blocked() -> bool:
    return signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.fixture(autouse=True)
def unchanged():
    """Handlers and mask of the test process itself."""
    handlers = {number: signal.getsignal(number) for number in (*STOPS, signal.SIGCHLD)}
    yield
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def handler(*_):
    raise AssertionError("SIGTERM reached the previous handler")


class TestAfterAnError:
    def test_the_signal_is_released(self, tmp_path):
        signal.signal(signal.SIGTERM, handler)
        trainer = make_trainer(tmp_path, Fail())
        with pytest.raises(RuntimeError, match="an error in training"), restored_signals(trainer):
            trainer.train()
        assert not blocked() and signal.getsignal(signal.SIGTERM) is handler

    def test_without_the_context_it_is_not(self, tmp_path):
        """The control: the Trainer calls no callback when training fails."""
        trainer = make_trainer(tmp_path, Fail())
        with pytest.raises(RuntimeError, match="an error in training"):
            trainer.train()
        assert blocked()

    def test_a_signal_that_came_before_does_not_hide_the_error(self, tmp_path):
        class Terminate(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                signal.raise_signal(signal.SIGTERM)

        signal.signal(signal.SIGTERM, handler)
        trainer = make_trainer(tmp_path, Terminate(), Fail())
        with pytest.raises(RuntimeError, match="an error in training"), restored_signals(trainer):
            trainer.train()
        assert not blocked() and signal.getsignal(signal.SIGTERM) is handler


def test_after_an_ordinary_end(tmp_path):
    signal.signal(signal.SIGTERM, handler)
    trainer = make_trainer(tmp_path)
    with restored_signals(trainer):
        trainer.train()
    assert not blocked() and signal.getsignal(signal.SIGTERM) is handler
    assert trainer.state.global_step == 2


def test_only_the_dataloaders_workers_are_ended(tmp_path, monkeypatch):
    """Earlier children and non-daemon children are not ended; multiprocessing waits for the latter itself."""
    registered = []
    monkeypatch.setattr(interruption, "Finalize", lambda _, end, args, exitpriority: registered.append((end, args)))
    context = multiprocessing.get_context("fork")
    earlier = context.Process(target=time.sleep, args=(60,), daemon=True)
    earlier.start()
    callback = StopSignalCallback()
    trainer = make_trainer(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True)
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    other = context.Process(target=time.sleep, args=(60,))
    other.start()
    batches = iter(trainer.get_train_dataloader())
    next(batches)
    callback.release()
    try:
        ((end, (workers,)),) = registered
        assert end is kill_workers and len(workers) == 1 and workers[0] not in (earlier, other)
        end(workers)
        workers[0].join(10)
        assert workers[0].exitcode == -signal.SIGKILL
        assert earlier.is_alive() and other.is_alive()
    finally:
        for child in (earlier, other):
            child.kill()
            child.join()


def test_without_workers_nothing_is_left_to_do_at_exit(tmp_path, monkeypatch):
    monkeypatch.setattr(interruption, "Finalize", lambda *_, **__: pytest.fail("registered"))
    trainer = make_trainer(tmp_path)
    with restored_signals(trainer):
        trainer.train()


def test_the_processes_agree_without_the_training_group(tmp_path, monkeypatch):
    """Over gloo and on the CPU: over the group that trains, each step would wait for its GPU."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    callback = StopSignalCallback()
    original, reduced = torch.distributed.all_reduce, []

    def recording(tensor, op, group):
        reduced.append((tensor.device.type, group))
        original(tensor, op=op, group=group)

    monkeypatch.setattr(torch.distributed, "all_reduce", recording)
    trainer = make_trainer(tmp_path)
    try:
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)
        group = callback.group
        for asked in (False, True):
            callback.received = signal.SIGTERM if asked else 0
            callback.on_step_end(trainer.args, trainer.state, trainer.control)
            assert trainer.control.should_training_stop is asked
        assert reduced == [("cpu", group)] * 2 and group is not torch.distributed.group.WORLD
        assert torch.distributed.get_backend(group) == "gloo"
    finally:
        callback.release()
        torch.distributed.destroy_process_group()
    assert callback.group is None


class SendAt(TrainerCallback):
    """Sends this process a signal as a step begins."""

    def __init__(self, number: int, step: int):
        self.number, self.step = number, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("name", STOP_SIGNALS)
class TestEachSignal:
    def test_it_saves_and_exits(self, tmp_path, name, caplog):
        number = getattr(signal, name)
        signal.signal(number, handler)
        trainer = make_trainer(tmp_path, SendAt(number, 1), max_steps=4)
        with pytest.raises(SystemExit) as end, restored_signals(trainer):
            trainer.train()
        assert end.value.code == 128 + number
        assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()
        assert f"{name}: stopped after step 2 of 4" in caplog.text
        assert signal.getsignal(number) is handler and not blocked()

    def test_ignored_at_the_start_it_stays_ignored(self, tmp_path, name):
        """As `nohup` does with SIGHUP."""
        number = getattr(signal, name)
        signal.signal(number, signal.SIG_IGN)
        trainer = make_trainer(tmp_path, SendAt(number, 1))
        with restored_signals(trainer):
            trainer.train()
        assert trainer.state.global_step == 2 and signal.getsignal(number) is signal.SIG_IGN


class TestSecondInterrupt:
    @pytest.fixture
    def callback(self, tmp_path, monkeypatch):
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        self.now, self.ended = 100.0, []
        monkeypatch.setattr(interruption, "monotonic", lambda: self.now)
        monkeypatch.setattr(interruption.os, "_exit", self.ended.append)
        callback, trainer = StopSignalCallback(), make_trainer(tmp_path)
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)
        yield callback
        callback.release()

    def test_it_ends_at_once(self, callback, capfd):
        os.kill(os.getpid(), signal.SIGINT)
        assert not self.ended and callback.asked() == signal.SIGINT
        assert capfd.readouterr().err.count("press it again to end at once") == 1
        os.kill(os.getpid(), signal.SIGINT)
        assert self.ended == [130]

    def test_the_launchers_copy_is_not_a_second_one(self, callback, monkeypatch):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert not self.ended
        self.now += LAUNCHER_DELAY
        os.kill(os.getpid(), signal.SIGINT)
        assert self.ended == [130]

    def test_another_signal_first(self, callback):
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert not self.ended and callback.asked()

    def test_forked_workers_go_on(self, callback, monkeypatch):
        monkeypatch.undo()  # the worker itself ends by `_exit`
        worker = multiprocessing.get_context("fork").Process(target=interrupt_twice)
        worker.start()
        worker.join(20)
        assert worker.exitcode == 7  # 130 where it took the signals for its own


def interrupt_twice() -> None:
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    sys.exit(7)


class TestSaveMinutes:
    """On a set clock: each step takes 5 minutes."""

    def checkpoints(self, folder, monkeypatch, minutes, **changes) -> list[int]:
        clock = [0.0]
        monkeypatch.setattr(interruption, "monotonic", lambda: clock[0])

        class Tick(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                clock[0] += 300

        trainer = make_trainer(folder, Tick(), max_steps=8, **changes)
        callbacks = trainer.callback_handler.callbacks
        callbacks[-1] = StopSignalCallback(minutes)
        with restored_signals(trainer):
            trainer.train()
        self.weights = [value.clone() for value in trainer.model.state_dict().values()]
        return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))

    def test_by_time_and_by_steps(self, tmp_path, monkeypatch):
        both = {"save_strategy": "steps", "save_steps": 4}
        assert self.checkpoints(tmp_path / "neither", monkeypatch, None, **both) == [4, 8]
        assert self.checkpoints(tmp_path / "time", monkeypatch, 15, save_strategy="no") == [3, 6]
        # the checkpoint of step 4 counts as the last one: 3, 4, 7, 8
        assert self.checkpoints(tmp_path / "both", monkeypatch, 15, **both) == [3, 4, 7, 8]

    def test_the_rotation_counts_them(self, tmp_path, monkeypatch):
        assert self.checkpoints(tmp_path, monkeypatch, 10, save_strategy="no", save_total_limit=2) == [6, 8]

    def test_all_processes_save_when_one_is_due(self, monkeypatch):
        asked = []
        monkeypatch.setattr(interruption, "largest_of_processes", lambda v, group: asked.append(v) or [0, 1])
        callback, control = StopSignalCallback(15), TrainerControl()
        callback.saved_at = interruption.monotonic()
        callback.on_step_end(None, None, control)
        assert asked == [[0, 0]] and control.should_save and not control.should_training_stop


def test_where_signals_cannot_be_blocked(tmp_path, monkeypatch):
    """Windows: training starts, SIGTERM to the process still ends it after a whole checkpoint."""
    for name in ("pthread_sigmask", "sigpending", "sigwait", "SIGCHLD", "SIGHUP", "SIGQUIT", "SIGUSR1"):
        monkeypatch.delattr(signal, name)

    class Terminate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(tmp_path / "whole")
    with restored_signals(trainer):
        trainer.train()
    assert trainer.state.global_step == 2
    trainer = make_trainer(tmp_path / "ended", Terminate(), max_steps=4)
    with pytest.raises(SystemExit) as end, restored_signals(trainer):
        trainer.train()
    assert end.value.code == 143 and (tmp_path / "ended" / "checkpoint-2" / "trainer_state.json").is_file()
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()  # for the fixture


@pytest.mark.parametrize("size", [4, 1_000, 100_000])
def test_what_torch_says_of_a_full_disk(size):
    """The kernel itself refuses every byte; the words differ with the size of the file."""
    with pytest.raises(RuntimeError) as error:
        torch.save({"a": torch.zeros(size)}, "/dev/full")
    assert interruption.is_full_disk(error.value)
    assert not interruption.is_full_disk(RuntimeError("an error in training"))
