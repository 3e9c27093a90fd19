"""Failures for the interruption tests: each function arranges a signal or an error in the process that calls it."""

import errno
import json
import os
import platform
import random
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerState

from jnana.training.saving.run_lock import LOCK


SAVING = {
    "weights": "_save",
    "optimizer": "_save_optimizer_and_scheduler",
    "random state": "_save_rng_state",
}


class SignalAt(TrainerCallback):
    """Sends this process a signal at one event of one step."""

    def __init__(self, number: int, event: str, step: int, to_group: bool = False):
        self.number, self.step, self.to_group = number, step, to_group
        setattr(self, event, self.strike)

    def strike(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.killpg(0, self.number) if self.to_group else os.kill(os.getpid(), self.number)


def strike(number: int, event: str, step: int, rank: int = 0) -> None:
    """Arrange a signal in process `rank`: `on_step_begin` of step 4 comes when 4 steps are done."""
    if int(os.environ.get("RANK", "0")) == rank:
        add_callback(SignalAt(number, event, step))


def kill_while_drawing() -> None:
    """SIGKILL while the first progress bar is drawn."""

    def half_way(self, *args, **kwargs):
        self.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    tqdm.display = half_way


def kill_while_saving(what: str, step: int) -> None:
    """SIGKILL in the middle of writing checkpoint `step`: `what` is written to its half, nothing after it."""
    name = SAVING[what]
    original = getattr(Trainer, name)

    def half_way(self, output_dir, *args, **kwargs):
        before = set(files(output_dir))
        original(self, output_dir, *args, **kwargs)
        if self.state.global_step == step and Path(output_dir).name == f"checkpoint-{step}":
            for file in set(files(output_dir)) - before:
                os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(Trainer, name, half_way)


def kill_at_random(seed: int) -> None:
    """
    SIGKILL at a moment that the seed draws: just before one of the file operations in output_dir, or a few
    milliseconds after one of all the interpreter's events, from the start on.

    Both are counted, not timed: a busy machine does not move them behind the end of the run.
    """
    draw = random.Random(seed)
    if seed % 2:
        kill_at_file_operation(draw.randrange(1, FILE_OPERATIONS))
    else:
        kill_after_events(draw.randrange(1, EVENTS), draw.uniform(0, 0.03))


FILE_OPERATIONS = 250  # of a whole run there are 390 or more, of the start of a finished one 110
EVENTS = 45_000  # of a whole run there are 49,000 or more, of the start of a finished one 29,000


def kill_after_events(number: int, seconds: float) -> None:
    """SIGKILL some time after the n-th event of which Python tells its audit hooks: imports, opened files, ..."""
    seen, process = 0, os.getpid()

    def strike() -> None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)

    thread = threading.Thread(target=strike, daemon=True)

    def watch(event: str, args: tuple) -> None:
        nonlocal seen
        seen += 1
        if seen == number and os.getpid() == process:
            thread.start()

    sys.addaudithook(watch)


def kill_at_file_operation(number: int) -> None:
    """SIGKILL just before Python opens, renames or deletes a file of a run for the n-th time."""
    seen = 0

    def watch(event: str, args: tuple) -> None:
        nonlocal seen
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree") and "/run/" in f"{args[0]}/":
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def kill_before(event: str, path: str) -> None:
    """SIGKILL just before a file operation, named as by Python's audit hooks, on a path that ends so.

    `{pid}` and `{host}` in it are those of the process.
    """
    path = path.format(pid=os.getpid(), host=platform.node())

    def watch(seen: str, args: tuple) -> None:
        if seen == event and str(args[0]).endswith(path):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


class ChangeAt(TrainerCallback):
    """Changes a file of one checkpoint as a later step begins, and kills the process."""

    def __init__(self, path: str, change, step: int):
        self.path, self.change, self.step = path, change, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            file = Path(args.output_dir) / self.path
            content = bytearray(file.read_bytes())
            self.change(content)
            file.write_bytes(content)
            os.kill(os.getpid(), signal.SIGKILL)


def flip_bit(path: str, step: int) -> None:
    """One bit of a file flips after its checkpoint is written; then SIGKILL."""

    def flip(content: bytearray) -> None:
        content[-9] ^= 1

    add_callback(ChangeAt(path, flip, step))


def write_zeros(path: str, step: int) -> None:
    """A part of a file becomes zeros, as after a power cut, while its length and its end stay; then SIGKILL."""

    def zero(content: bytearray) -> None:
        start, end = len(content) // 4, len(content) // 2
        content[start:end] = bytes(end - start)

    add_callback(ChangeAt(path, zero, step))


class SetClockBack(TrainerCallback):
    """Before each step the checkpoints get times in the future, so that every new one is the oldest by its time."""

    def on_step_begin(self, args, state, control, **kwargs):
        for folder in Path(args.output_dir).glob("checkpoint-*"):
            os.utime(folder, (2e9, 2e9 + 1e6 - state.global_step))


def set_clock_back(step: int) -> None:
    """The clock is set back after each checkpoint; then SIGKILL."""
    kill("on_step_begin", step)
    add_callback(SetClockBack())


class TakeDirectory(TrainerCallback):
    """A run of another host takes output_dir as one step begins, as it may when this one stands still for a minute."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            lock = Path(args.output_dir) / LOCK
            other = {"host": "another", "pid": 1, "started": "2026-01-01T00:00:00+00:00"}
            lock.write_text(json.dumps({**json.loads(lock.read_text()), **other}))


def take_directory(step: int) -> None:
    add_callback(TakeDirectory(step))


class WaitAt(TrainerCallback):
    """Makes the file `waiting` beside output_dir as one step begins, and goes on when it is gone."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            waiting = Path(args.output_dir).parent / "waiting"
            waiting.touch()
            while waiting.exists():
                time.sleep(0.02)


def wait(step: int) -> None:
    add_callback(WaitAt(step))


def refuse_file(name: str, step: int) -> None:
    """The disk is full when checkpoint `step` is written: the kernel itself refuses every byte of one of its files."""
    add_callback(RefuseFile(name, step))


class RefuseFile(TrainerCallback):
    """Puts `/dev/full` in a file's place just before it is written."""

    def __init__(self, name: str, step: int):
        self.name, self.step = name, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            folder.mkdir()
            (folder / self.name).symlink_to("/dev/full")


def refuse_state(step: int) -> None:
    """The disk is full half-way through the last file of checkpoint `step`."""
    original = TrainerState.save_to_json

    def full(self, json_path: str) -> None:
        original(self, json_path)
        if Path(json_path).parent.name == f"checkpoint-{step}":
            os.truncate(json_path, Path(json_path).stat().st_size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), json_path)

    TrainerState.save_to_json = full


def refuse_weights(folder: str) -> None:
    """The disk is full when the weights in `folder` are written, with the error that safetensors then raises."""
    original = Trainer._save

    def full(self, output_dir=None, *args, **kwargs):
        if Path(output_dir or self.args.output_dir).name == folder:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        original(self, output_dir, *args, **kwargs)

    Trainer._save = full


def strike_group(number: int, event: str, step: int) -> None:
    """A signal to this process and to the workers of its dataloader, as a scheduler or a terminal sends it."""
    os.setpgrp()
    add_callback(SignalAt(number, event, step, to_group=True))


def files(folder: str) -> list[Path]:
    return [path for path in Path(folder).glob("*") if path.suffix in (".safetensors", ".pt", ".pth")]


def add_callback(callback: TrainerCallback) -> None:
    """Give the next Trainer of this process one more callback, ahead of the script's own."""
    original = Trainer.__init__

    def init(self, *args, callbacks=None, **kwargs):
        original(self, *args, callbacks=[callback, *(callbacks or [])], **kwargs)

    Trainer.__init__ = init


kill = partial(strike, signal.SIGKILL)
terminate = partial(strike, signal.SIGTERM)
