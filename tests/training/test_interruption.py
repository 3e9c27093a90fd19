"""SIGTERM while training: what is restored when training ends in any way, and which processes are ended with it."""

import multiprocessing
import signal
import time

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from jnana.training import interruption
from jnana.training.interruption import StopSignalCallback, kill_workers, restored_signals
from jnana.training.stages import apply_stage
from tests.training.test_stages import batch, pair


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
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGCHLD)}
    yield
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
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
            callback.received = asked
            callback.on_step_end(trainer.args, trainer.state, trainer.control)
            assert trainer.control.should_training_stop is asked
        assert reduced == [("cpu", group)] * 2 and group is not torch.distributed.group.WORLD
        assert torch.distributed.get_backend(group) == "gloo"
    finally:
        callback.release()
        torch.distributed.destroy_process_group()
    assert callback.group is None


def test_where_signals_cannot_be_blocked(tmp_path, monkeypatch):
    """Windows: training starts, SIGTERM to the process still ends it after a whole checkpoint."""
    for name in ("pthread_sigmask", "sigpending", "sigwait", "SIGCHLD"):
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
