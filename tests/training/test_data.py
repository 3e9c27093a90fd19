"""The data of a run: the first process checks it while the others wait, for as long as it takes."""

import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.multiprocessing import spawn

from jnana.processing.data import CheckReport
from jnana.training.data import check_rows_once


TIMEOUT = timedelta(seconds=4)  # of the training's process group; 30 minutes in a run
SLOW = 8.0  # seconds


class SlowRows:
    """No rows, after `SLOW` seconds."""

    def __iter__(self):
        time.sleep(SLOW)
        return iter(())


def check(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 2)
    store.set(f"ready {rank}", "")
    store.wait(["ready 0", "ready 1"], timedelta(minutes=5))  # both have imported torch
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=TIMEOUT)
    report = check_rows_once(SlowRows(), None, progress=False)
    assert report == CheckReport()
    try:  # the control: the training's group gives up
        if rank == 0:
            time.sleep(SLOW)
        dist.barrier()
    except RuntimeError as error:
        (folder / f"{rank}.txt").write_text(str(error))


def test_a_slow_check_does_not_end_the_other_processes(tmp_path):
    spawn(check, (tmp_path,), nprocs=2)
    assert "imed out" in (tmp_path / "1.txt").read_text()
