"""The processes of a run outside of training steps: long waits, work for the first process, what is sharded and how.

The process group that trains gives up after `ddp_timeout` (30 minutes). Reading and checking data may take hours, so
the processes wait for one another in gloo groups of their own.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from jnana.processing.data.temporary import temporary_directory


LONGEST_WAIT = timedelta(days=2)  # for the slowest process, outside of training steps

T = TypeVar("T")


class ProcessGroup:
    """A group of all processes that may wait for the slowest one up to `LONGEST_WAIT`.

    Args:
        handle (*optional*): A group of torch.distributed; `None` where there is only one process.
    """

    def __init__(self, handle: Any = None):
        self.handle = handle
        self.rank = 0 if handle is None else dist.get_rank()
        self.size = 1 if handle is None else dist.get_world_size()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of ranks."""
        if self.handle is None:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.handle)
        return values

    def broadcast(self, value: Any, source: int) -> Any:
        """The value of the process of rank `source`."""
        if self.handle is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=source, group=self.handle)
        return values[0]

    def wait(self) -> None:
        """Return when all processes have called this."""
        self.gather(None)


def several_processes() -> bool:
    """Whether torch.distributed runs with more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextlib.contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """A [`ProcessGroup`] of all processes; every process must enter and leave it."""
    if not several_processes():
        yield ProcessGroup()
        return
    handle = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    try:
        yield ProcessGroup(handle)
    finally:
        dist.destroy_process_group(handle)


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Let the first process of each machine run the block before the others do, which find what it cached.

    As `TrainingArguments.main_process_first`, but the others wait longer than `ddp_timeout`.
    """
    first = PartialState().is_local_main_process
    with process_group() as group:
        if not first:
            group.wait()
        try:
            yield
        finally:  # after an error too, or the others would wait for nothing
            if first:
                group.wait()


def run_on_main_process(function: Callable[[], T]) -> T:
    """Call a function in the first process and return its result in all of them.

    Args:
        function (`Callable`): Takes no arguments; what it returns or raises must be picklable.

    Raises:
        Exception: what `function` raised, in every process.
    """
    result, error = None, None
    with process_group() as group:
        if group.rank == 0:
            try:
                result = function()
            except Exception as raised:
                error = raised
        result, error = group.gather((result, error))[0]
    if error is not None:
        raise error
    return result


def run_once_per_machine(function: Callable[[], T]) -> T:
    """Call a function in the first process of each machine, and return its result in all processes of the machine.

    Args:
        function (`Callable`): Takes no arguments; what it returns or raises must be picklable.

    Raises:
        Exception: what `function` raised on any machine, in every process.
    """
    result, error = None, None
    with process_group() as group:
        local = os.environ.get("LOCAL_RANK", PartialState().local_process_index)  # launchers number ranks by machine
        first = 0 if group.handle is None else group.rank - int(local)
        if group.rank == first:
            try:
                result = function()
            except Exception as raised:
                error = raised
        told = group.gather((first, error))
        for source in sorted({number for number, _ in told}):
            sent = group.broadcast(result if group.rank == source else None, source)
            result = sent if source == first else result
    error = next((raised for _, raised in told if raised is not None), None)
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def once_per_machine(make: Callable[[], T], save: Callable[[T, Path], None], load: Callable[[Path], T]) -> T:
    """Call `make` in the first process of each machine, and load in the others what it saved.

    The files lie in a directory of the `datasets` cache, and are deleted when that process exits; those of a killed
    process are deleted by the next one that makes some.

    Args:
        make (`Callable`): Takes no arguments; what it raises must be picklable.
        save (`Callable`): Writes the result into a directory.
        load (`Callable`): Reads it from there.

    Raises:
        Exception: what `make` or `save` raised on any machine, in every process.
    """
    if PartialState().num_processes == 1:
        return make()
    made: list[T] = []

    def make_and_save() -> str:
        made.append(make())
        folder = temporary_directory()
        save(made[0], folder)
        return str(folder)

    folder = run_once_per_machine(make_and_save)
    result = made[0] if made else load(Path(folder))
    with process_group() as group:
        group.wait()  # the files are there until all have read them
    return result


def sharding_of(args: TrainingArguments) -> Literal["fsdp", "zero1", "zero2", "zero3"] | None:
    """How `accelerate launch`'s file or the arguments shard the model, or `None` where each process holds it whole.

    accelerate reads the environment only when the Trainer is made, long after what must be refused early.
    """
    if args.deepspeed_plugin is not None:
        stage = args.deepspeed_plugin.zero_stage
        return f"zero{stage}" if stage in (1, 2, 3) else None  # type: ignore[return-value]
    return "fsdp" if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP") else None


@contextlib.contextmanager
def unpartitioned(args: TrainingArguments | None, whole: bool) -> Iterator[None]:
    """Under ZeRO-3, build and load models whole within the block; DeepSpeed partitions them when training starts.

    transformers partitions each weight as soon as it is made, whenever ZeRO-3 is configured. A pair of backbones can't
    be joined from such parts, and a new adapter gets other random numbers than on one process.

    Args:
        args (`TrainingArguments`, *optional*): Of the run.
        whole (`bool`): Whether the model can be built only whole: two backbones are joined, an adapter is loaded with
            its base, weights are quantised or merged. Any other checkpoint is partitioned while it is read if
            `zero3_init_flag` asks for it.
    """
    if args is None or args.deepspeed_plugin is None or not is_deepspeed_zero3_enabled():
        yield
        return
    if args.deepspeed_plugin.zero3_init_flag and not whole:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        args.deepspeed_plugin.set_deepspeed_weakref()
