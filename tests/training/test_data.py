"""The data of a run: the first process checks it while the others wait, for as long as it takes."""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from datasets import Dataset
from torch.multiprocessing import spawn

from jnana.training.distributed import run_once_per_machine
from jnana.training.options.recipe_record import data_fingerprint


TIMEOUT = timedelta(seconds=4)  # of the training's process group; 30 minutes in a run
SLOW = 8.0  # seconds


def check(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 2)
    store.set(f"ready {rank}", "")
    os.environ["LOCAL_RANK"] = str(rank)  # as a launcher does
    store.wait(["ready 0", "ready 1"], timedelta(minutes=5))  # both have imported torch
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=TIMEOUT)
    calls = folder / f"calls {rank}.txt"

    def prepare() -> int:
        calls.write_text("called")
        time.sleep(SLOW)
        return rank

    assert run_once_per_machine(prepare) == 0
    assert calls.exists() == (rank == 0)

    def fail() -> None:
        raise ValueError("a bad row")

    with pytest.raises(ValueError, match="a bad row"):  # in every process
        run_once_per_machine(fail)
    try:  # the control: the training's group gives up
        if rank == 0:
            time.sleep(SLOW)
        dist.barrier()
    except RuntimeError as error:
        (folder / f"{rank}.txt").write_text(str(error))


def test_a_slow_check_does_not_end_the_other_processes(tmp_path):
    spawn(check, (tmp_path,), nprocs=2)
    assert "imed out" in (tmp_path / "1.txt").read_text()


def test_tokens_do_not_change_the_fingerprint_of_the_data():
    """A run that was started before rows were prepared is resumed."""
    row = {"images": [{"path": "a/0.png", "bytes": None}], "conversations": [[]], "source": "a.json, record 0"}
    tokens = {"token_ids": [[1, 2]], "answer_mask": [[0, 1]]}
    before, now = Dataset.from_list([row]), Dataset.from_list([row | tokens])
    assert data_fingerprint(now) == data_fingerprint(before)
    assert data_fingerprint(Dataset.from_list([row | {"source": "b"}])) != data_fingerprint(before)  # the control
