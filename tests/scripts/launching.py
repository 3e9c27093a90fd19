"""Starts the scripts as users do, in separate processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from jnana.training.saving.checkpoints import checkpoint_problem


ROOT = Path(__file__).parents[2]
LONGEST = 600.0  # seconds; ends what hangs, and is far above what a busy machine takes


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONHASHSEED": "random", **extra}


def launch(script: str, arguments: list[str], processes: int = 1, **variables: str) -> subprocess.Popen:
    """`accelerate launch script arguments`, stdout and stderr together in a pipe.

    `--cpu --num_processes 2` would silently start one process; `--multi_gpu` with ACCELERATE_USE_CPU starts two.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["--multi_gpu"] if processes > 1 else []
    return subprocess.Popen(
        [*command, str(ROOT / script), *arguments],
        cwd=ROOT,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_at(process: subprocess.Popen, checkpoint: Path, timeout: float = LONGEST) -> None:
    """SIGKILL to it and all that it started, as soon as a checkpoint is whole and can be resumed."""
    deadline = time.monotonic() + timeout
    while checkpoint_problem(checkpoint) is not None:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-4000:]
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def finish(process: subprocess.Popen, timeout: float = LONGEST) -> str:
    """Its output; fails when it does."""
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output[-6000:]
    return output
