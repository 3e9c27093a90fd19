"""Saves a checkpoint when a signal or the clock asks for one, and explains a full disk.

After a signal the run ends with a whole checkpoint and the command to go on. SIGKILL and power cuts leave no time for
that; `checkpoints.py` recognises the incomplete checkpoints that they leave.
"""

import contextlib
import errno
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from safetensors import SafetensorError
from torch import distributed
from transformers import Trainer, TrainerCallback, TrainingArguments

from jnana.training.distributed import LONGEST_WAIT

from .checkpoints import checkpoint_problem, list_checkpoints, size_text


logger = logging.getLogger(__name__)

# A scheduler or `kill`, Ctrl-C, a closed terminal, Ctrl-\, Slurm's warning; Windows has the first two.
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
LAUNCHER_DELAY = 2.0  # seconds within which the launcher passes a Ctrl-C on that the terminal has sent to all already


def exit_code(number: int) -> int:
    """The exit code that shells give a process ended by a signal: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + number


class StopSignalCallback(TrainerCallback):
    """On a signal of `STOP_SIGNALS`, finish the step, write its checkpoint and exit with 128 + its number.

    The resumed run is then the uninterrupted one. With transformers' `enable_jit_checkpoint` it is not: that waits
    three seconds, saves in the middle of a step, and lets every process decide for itself; here all agree on one step.
    They agree in the same way on the step at which `save_minutes` have passed since the last checkpoint.

    A second Ctrl-C ends the process at once. A signal that is ignored when training starts (SIGHUP under `nohup`)
    stays ignored.

    It must be the last callback: the process exits when this one has seen the checkpoint, and the others add to it.

    Where signals can't be blocked (Windows), a SIGTERM to the whole process group ends the dataloader's workers too,
    and the run with them; a SIGTERM to the process alone works as elsewhere.

    Args:
        save_minutes (`float`, *optional*): Longest time between two checkpoints, in minutes.
    """

    def __init__(self, save_minutes: float | None = None):
        self.save_seconds = None if save_minutes is None else 60 * save_minutes
        self.saved_at = 0.0
        self.received = 0  # the number of the first signal
        self.interrupted_at: float | None = None
        self.exiting = 0
        self.previous: dict[int, Any] = {}
        self.previous_mask: set[Any] | None = None
        self.process = 0
        self.children_before: list[BaseProcess] = []
        self.group: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.saved_at = monotonic()
        if self.group is None and distributed.is_initialized():
            # On CPUs: over the group that trains, every step would wait for the GPU to know the answer.
            self.group = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may set handlers
        self.process = os.getpid()
        self.children_before = multiprocessing.active_children()
        for number in (getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.previous[number] = signal.signal(number, self.note)
        if hasattr(signal, "pthread_sigmask"):
            # The dataloader's workers inherit the block. Otherwise a signal to the whole process group ends them, and
            # the step with them. Not SIGINT: of several blocked ones only one arrives, and a second one must end this
            # process at once; forked workers inherit its handler.
            blocked = set(self.previous) - {signal.SIGINT}
            self.previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)

    def note(self, signum, frame) -> None:
        if os.getpid() != self.process:
            return  # a worker of the dataloader
        if signum == signal.SIGINT:
            self.note_interrupt()
        self.received = self.received or signum

    def note_interrupt(self) -> None:
        """End the process at the second Ctrl-C. `accelerate launch` passes the first one on, which is not a second."""
        delay = LAUNCHER_DELAY if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        if self.interrupted_at is None:
            self.interrupted_at = monotonic()
            if os.environ.get("RANK", "0") == "0":
                # not by `logging`, whose stream may be in use at this very moment
                os.write(2, b"Ctrl-C: finishing the step and saving a checkpoint; press it again to end at once\n")
        elif monotonic() - self.interrupted_at >= delay:
            for worker in multiprocessing.active_children():
                worker.kill()
            os._exit(exit_code(signal.SIGINT))

    def asked(self) -> int:
        """The number of a signal that has come, handled or still blocked; 0 without one."""
        pending = signal.sigpending() if hasattr(signal, "sigpending") else set()
        return self.received or next((int(number) for number in self.previous if number in pending), 0)

    def on_step_end(self, args, state, control, **kwargs):
        due = self.save_seconds is not None and monotonic() - self.saved_at >= self.save_seconds
        self.exiting, save = largest_of_processes([self.asked(), int(due)], self.group)
        if save:
            control.should_save = True
        if self.exiting:
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        self.saved_at = monotonic()
        if not self.exiting:
            return
        if distributed.is_initialized():
            distributed.barrier()  # the launcher ends all processes when the first exits; none may still be writing
        if state.is_world_process_zero:
            logger.warning(
                f"{signal.Signals(self.exiting).name}: stopped after step {state.global_step} of {state.max_steps}; "
                "start the same command again to go on from "
                f"{Path(args.output_dir) / f'checkpoint-{state.global_step}'}"
            )
        self.release()
        raise SystemExit(exit_code(self.exiting))

    def on_train_end(self, args, state, control, **kwargs):
        asked = self.asked()
        self.release()
        if asked:
            signal.raise_signal(asked)  # it came after the last step, whose checkpoint is written

    def release(self) -> None:
        """Unblock the signals and restore the previous handlers; a signal that is still blocked is only noted."""
        if self.group is not None and distributed.is_initialized():
            distributed.destroy_process_group(self.group)
        self.group = None
        if not self.previous:
            return
        if self.previous_mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, self.previous_mask)
        for number, handler in self.previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self.previous, self.previous_mask = {}, None
        # Workers may outlive training: after an error, and with `dataloader_persistent_workers`. When this process
        # exits, multiprocessing sends them SIGTERM, which they have inherited blocked, and would wait for ever.
        workers = [
            child for child in multiprocessing.active_children() if child.daemon and child not in self.children_before
        ]
        if workers:
            Finalize(None, kill_workers, args=(workers,), exitpriority=100)


@contextlib.contextmanager
def restored_signals(trainer: Trainer) -> Iterator[None]:
    """Release the signals when the block ends, by an error or an exit too: `trainer.train` then calls no callback."""
    try:
        yield
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, StopSignalCallback):
                callback.release()


def kill_workers(workers: list[BaseProcess]) -> None:
    """Kill the workers of a dataloader, without the error that its SIGCHLD handler raises for a lost worker."""
    if hasattr(signal, "SIGCHLD") and any(worker.is_alive() for worker in workers):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # this process is exiting
    for worker in workers:
        worker.kill()


def largest_of_processes(values: list[int], group: Any) -> list[int]:
    """The largest of each value among all processes; every process gets the same answer.

    Args:
        values (`list[int]`): This process's.
        group (`ProcessGroup`, *optional*): All processes, by gloo; `None` where there is only one.
    """
    if group is None:
        return values
    tensor = torch.tensor(values)
    distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX, group=group)
    return tensor.tolist()


@contextlib.contextmanager
def explain_full_disk(args: TrainingArguments, remedy: str | None = None) -> Iterator[None]:
    """Turn the many errors of a write to a full disk into one that says which files are safe and what to do.

    Args:
        args (`TrainingArguments`): Of the run.
        remedy (`str`, *optional*): Which files are safe and what to do; default: the last whole checkpoint, and to
            start the command again.

    Raises:
        OSError: naming `output_dir`, the room left and the remedy.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_full_disk(error):
            raise
        if remedy is None:
            whole = next((f for f in list_checkpoints(args.output_dir) if checkpoint_problem(f) is None), None)
            kept = "No checkpoint is complete yet" if whole is None else f"{whole} is complete"
            limit = f"lower save_total_limit ({args.save_total_limit})"
            remedy = f"{kept}; make room, or {limit}, and start the same command again"
        raise full_disk_error("output_dir", args.output_dir, "for the files of this run", remedy) from error


def full_disk_error(option: str, folder: str | Path, what: str, remedy: str) -> OSError:
    """The error of a write to a full disk.

    Args:
        option (`str`): The option that names the directory.
        folder (`str` or `Path`): The directory.
        what (`str`): "for the files of this run".
        remedy (`str`): What is kept, and what to do.
    """
    free = size_text(shutil.disk_usage(folder).free)
    return OSError(errno.ENOSPC, f"{option} {str(folder)!r} has no room {what} ({free} free). {remedy}")


def is_full_disk(error: BaseException) -> bool:
    """Whether a write failed because the disk is full; safetensors and torch say so in their messages only."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # torch's archive writer does not pass the reason on; the last text is that of a small file
    words = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing", "unexpected pos")
    words += ("basic_ios::clear: iostream error",)
    return any(word in str(error) for word in words)
