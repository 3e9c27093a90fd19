"""The processes of a run, waiting for one another outside of training for as long as it takes."""

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist


PATIENCE = timedelta(days=2)  # for the slowest process; the group of the training itself gives up after minutes


class ProcessGroup:
    """The processes of a run, which here wait for one another as long as it takes."""

    def __init__(self, handle: Any = None):
        self.handle = handle
        self.rank = 0 if handle is None else dist.get_rank()
        self.size = 1 if handle is None else dist.get_world_size()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks."""
        if self.handle is None:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.handle)
        return values

    def wait(self) -> None:
        self.gather(None)


@contextlib.contextmanager
def process_group() -> Iterator[ProcessGroup]:
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield ProcessGroup()
        return
    handle = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield ProcessGroup(handle)
    finally:
        dist.destroy_process_group(handle)
