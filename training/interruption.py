"""Ends a run early with a whole checkpoint and the command to go on: after SIGTERM, and when the disk is full.

SIGKILL and power cuts leave no time for that; `checkpoints.py` recognises the incomplete checkpoints that they leave.
"""

import contextlib
import errno
import logging
import multiprocessing
import shutil
import signal
import threading
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import distributed
from transformers import Trainer, TrainerCallback, TrainingArguments

from .checkpoints import checkpoint_problem, list_checkpoints, size_text
from .distributed import LONGEST_WAIT


logger = logging.getLogger(__name__)

TERMINATED = 128 + signal.SIGTERM  # the exit code that shells give a process ended by this signal


class StopSignalCallback(TrainerCallback):
    """On SIGTERM (Kubernetes, Slurm, a spot machine, `kill`) finish the step, write its checkpoint and exit with 143.

    The resumed run is then the uninterrupted one. With transformers' `enable_jit_checkpoint` it is not: that waits
    three seconds, saves in the middle of a step, and lets every process decide for itself; here all agree on one step.

    It must be the last callback: the process exits when this one has seen the checkpoint, and the others add to it.

    Where signals can't be blocked (Windows), a SIGTERM to the whole process group ends the dataloader's workers too,
    and the run with them; a SIGTERM to the process alone works as elsewhere.
    """

    def __init__(self):
        self.received = False
        self.exiting = False
        self.previous: Any = None
        self.active = False
        self.children_before: list[BaseProcess] = []
        self.group: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        if self.group is None and distributed.is_initialized():
            # On CPUs: over the group that trains, every step would wait for the GPU to know the answer.
            self.group = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may set handlers
        self.children_before = multiprocessing.active_children()
        self.previous = signal.signal(signal.SIGTERM, self.note)
        if hasattr(signal, "pthread_sigmask"):
            # The dataloader's workers inherit the block. Otherwise a signal to the whole process group ends them, and
            # the step with them.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        self.active = True

    def note(self, signum, frame) -> None:
        self.received = True

    def is_asked(self) -> bool:
        """Whether SIGTERM has come, handled or still blocked."""
        return self.received or (hasattr(signal, "sigpending") and signal.SIGTERM in signal.sigpending())

    def on_step_end(self, args, state, control, **kwargs):
        if any_process(self.is_asked(), self.group):
            self.exiting = control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        if not self.exiting:
            return
        if distributed.is_initialized():
            distributed.barrier()  # the launcher ends all processes when the first exits; none may still be writing
        if state.is_world_process_zero:
            logger.warning(
                f"SIGTERM: stopped after step {state.global_step} of {state.max_steps}; start the same command again "
                f"to go on from {Path(args.output_dir) / f'checkpoint-{state.global_step}'}"
            )
        self.release()
        raise SystemExit(TERMINATED)

    def on_train_end(self, args, state, control, **kwargs):
        asked = self.is_asked()
        self.release()
        if asked:
            signal.raise_signal(signal.SIGTERM)  # it came after the last step, whose checkpoint is written

    def release(self) -> None:
        """Unblock SIGTERM and restore the previous handler; a SIGTERM that is still blocked is only noted."""
        if self.group is not None and distributed.is_initialized():
            distributed.destroy_process_group(self.group)
        self.group = None
        if not self.active:
            return
        self.active = False
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGTERM, signal.SIG_DFL if self.previous is None else self.previous)
        # Workers may outlive training: after an error, and with `dataloader_persistent_workers`. When this process
        # exits, multiprocessing sends them SIGTERM, which they have inherited blocked, and would wait for ever.
        workers = [
            child for child in multiprocessing.active_children() if child.daemon and child not in self.children_before
        ]
        if workers:
            Finalize(None, kill_workers, args=(workers,), exitpriority=100)


@contextlib.contextmanager
def restored_signals(trainer: Trainer) -> Iterator[None]:
    """Release SIGTERM when the block ends, by an error or an exit too: `trainer.train` then calls no callback."""
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


def any_process(flag: bool, group: Any) -> bool:
    """Whether the flag is set in any process; every process gets the same answer.

    Args:
        flag (`bool`): This process's.
        group (`ProcessGroup`, *optional*): All processes, by gloo; `None` where there is only one.
    """
    if group is None:
        return flag
    value = torch.tensor(int(flag))
    distributed.all_reduce(value, op=distributed.ReduceOp.MAX, group=group)
    return bool(value)


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
        free = shutil.disk_usage(args.output_dir).free
        if remedy is None:
            whole = next((f for f in list_checkpoints(args.output_dir) if checkpoint_problem(f) is None), None)
            kept = "No checkpoint is complete yet" if whole is None else f"{whole} is complete"
            limit = f"lower save_total_limit ({args.save_total_limit})"
            remedy = f"{kept}; make room, or {limit}, and start the same command again"
        raise OSError(
            errno.ENOSPC,
            f"output_dir {args.output_dir!r} has no room for the files of this run ({size_text(free)} free). {remedy}",
        ) from error


def is_full_disk(error: BaseException) -> bool:
    """Whether a write failed because the disk is full; safetensors and torch say so in their messages only."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # torch's archive writer does not pass the reason on
    words = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing", "unexpected pos")
    return any(word in str(error) for word in words)
