"""What ends a run before its time: SIGTERM and a full disk. Both leave a whole checkpoint behind and say how to go on.

SIGKILL and power cuts leave no time for that; what they leave half written is found by `checkpoints.py`.
"""

import contextlib
import errno
import logging
import multiprocessing
import shutil
import signal
import threading
from collections.abc import Iterator
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import distributed
from transformers import TrainerCallback, TrainingArguments

from .checkpoints import checkpoint_problem, list_checkpoints
from .disk_space import size


logger = logging.getLogger(__name__)

TERMINATED = 128 + signal.SIGTERM  # the exit code that shells give a process ended by this signal


class StopSignalCallback(TrainerCallback):
    """On SIGTERM (Kubernetes, Slurm, a spot machine, `kill`) finish the step, write its checkpoint and leave with 143.

    The resumed run is then the uninterrupted one. With transformers' `enable_jit_checkpoint` it is not: that waits
    three seconds, saves in the middle of a step, and lets every process decide for itself; here all agree on one step.

    It must be the last callback, so that what the others add to a checkpoint is there when the process leaves.
    """

    def __init__(self):
        self.asked = False
        self.leaving = False
        self.previous: Any = None
        self.active = False

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGTERM, self.note)
            # Blocked too, for the sake of the dataloader's workers, which inherit it: a signal sent to the whole group
            # would end them, and they the step. What multiprocessing sends them at exit they would not hear either.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            Finalize(None, end_workers, exitpriority=100)
            self.active = True

    def note(self, signum, frame) -> None:
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        asked = self.asked or signal.SIGTERM in signal.sigpending()
        if any_process(asked, args.device):
            self.leaving = control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        if not self.leaving:
            return
        if distributed.is_initialized():
            distributed.barrier()  # or the launcher would end the first process while it still writes
        if state.is_world_process_zero:
            logger.warning(
                f"SIGTERM: stopped after step {state.global_step} of {state.max_steps}; start the same command again "
                f"to go on from {Path(args.output_dir) / f'checkpoint-{state.global_step}'}"
            )
        self.release()
        raise SystemExit(TERMINATED)

    def on_train_end(self, args, state, control, **kwargs):
        asked = self.asked or signal.SIGTERM in signal.sigpending()
        self.release()
        if asked:
            signal.raise_signal(signal.SIGTERM)  # it came after the last step, whose checkpoint is written

    def release(self) -> None:
        """Hand the signal back to whom it belonged."""
        if self.active:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            signal.signal(signal.SIGTERM, self.previous)
            self.active = False


def end_workers() -> None:
    """Kill this process's children, without the complaint that a dataloader makes of a lost worker."""
    children = multiprocessing.active_children()
    if children:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in children:
        child.kill()


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process; every process gets the same answer."""
    if not distributed.is_initialized():
        return flag
    value = torch.tensor(int(flag), device=device)
    distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
    return bool(value.item())


@contextlib.contextmanager
def explain_full_disk(args: TrainingArguments, remedy: str | None = None) -> Iterator[None]:
    """Turn the many errors of a write that found no room into one that says what is safe and what to do.

    Args:
        args (`TrainingArguments`): Of the run.
        remedy (`str`, *optional*): What is safe and what to do; default: the last whole checkpoint, a new start.

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
            kept = "No checkpoint is whole yet" if whole is None else f"{whole} is whole"
            limit = f"lower save_total_limit ({args.save_total_limit})"
            remedy = f"{kept}; make room, or {limit}, and start the same command again"
        raise OSError(
            errno.ENOSPC,
            f"output_dir {args.output_dir!r} has no room for what was to be written ({size(free)} are free). {remedy}",
        ) from error


def is_full_disk(error: BaseException) -> bool:
    """Whether a write failed for want of room; safetensors and torch say so in words only."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # torch's archive writer does not even pass the reason on
    words = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing", "unexpected pos")
    return any(word in str(error) for word in words)
