"""Runs a script in new processes without importing its packages each time.

The children fork from a clean server process that has everything imported and has trained nothing. They are real
processes: they may be killed, and two of them make a process group over gloo, as `accelerate launch` makes it.
"""

import importlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.scripts.launching import LONGEST


SERVER = multiprocessing.get_context("forkserver")
PRELOADED = ["tests.scripts.preloaded", "tests.scripts.forked", "tests.scripts.faults", "tests.scripts.sharding"]


@dataclass
class Ended:
    """How one process ended: its exit code (-9: killed by SIGKILL) and all that it wrote."""

    code: int | None
    output: str


def run_forked(
    script: str,
    arguments: list[str],
    log: Path,
    *,
    processes: int = 1,
    prepare: Callable[[], None] | None = None,
    environment: dict[str, str] | None = None,
    timeout: float = LONGEST,
) -> list[Ended]:
    """
    Run `script.main(arguments)` in fresh processes and wait for all of them.

    Args:
        script (`str`): `run_align`, `run_pretrain` or `run_sft`.
        log (`Path`): A folder for what they write.
        processes (`int`): How many; more than one form a process group.
        prepare (`Callable`, *optional*): Called in each child first; must be picklable. This is where faults are
            arranged.
        environment (`dict`, *optional*): More environment variables.
        timeout (`float`): Seconds; a process that still runs then is killed and has the code `None`.
    """
    SERVER.set_forkserver_preload(PRELOADED)
    log.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in range(processes):
        variables = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **(environment or {})}
        if processes > 1:
            variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            variables |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        child = SERVER.Process(target=_child, args=(script, arguments, str(log / f"{rank}.txt"), variables, prepare))
        child.start()
        children.append(child)
    ended = []
    for rank, child in enumerate(children):
        child.join(timeout)
        code = child.exitcode
        if code is None:
            child.kill()
            child.join()
        ended.append(Ended(code, (log / f"{rank}.txt").read_text(errors="replace")))
    return ended


def _child(script: str, arguments: list[str], log: str, variables: dict[str, str], prepare) -> None:
    import torch

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    os.environ.update(variables)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # dataloader workers as in an ordinary process
    if prepare is not None:
        prepare()
    importlib.import_module(f"jnana.{script}").main(arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def succeed(ended: list[Ended]) -> str:
    """The first process's output; fails unless all ended well."""
    for each in ended:
        assert each.code == 0, f"exit code {each.code}\n{each.output[-6000:]}"
    return ended[0].output
