"""Runs a script under `accelerate launch` and sends a signal at one step.

    terminated_launch.py SIGNAL TO STEP NOTES script ...


TO is `launcher` (what a scheduler that knows one process does) or `all` (Slurm, systemd: every process of the job).
How each process ended is written to a file of the folder NOTES.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

from transformers import TrainerCallback

from tests.scripts.faults import add_callback


class Scheduler(TrainerCallback):
    """Sends a signal as a step begins; the first process does it, for all."""

    def __init__(self, name: str, to: str, step: int):
        self.number, self.to, self.step = getattr(signal, name), to, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step != self.step or not state.is_world_process_zero:
            return
        launcher = os.getppid()
        workers = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        assert len(workers) == args.world_size, workers
        for process in [launcher, *(map(int, workers) if self.to == "all" else ())]:
            os.kill(process, self.number)


if __name__ == "__main__":
    name, to, step, notes, script, *arguments = sys.argv[1:]
    add_callback(Scheduler(name, to, int(step)))
    try:
        importlib.import_module(f"jnana.{script}").main(arguments)
    except SystemExit as end:
        (Path(notes) / os.environ["RANK"]).write_text(str(end.code))
        raise
