"""Runs a script under `accelerate launch` and sends a signal at one step.

    terminated_launch.py SIGNAL TO STEP NOTES script ...


TO is `launcher` (what a scheduler that knows one process does), `all` (Slurm, systemd: every process of the job) or
`group` (the launcher's process group, as a terminal does).
How each process ended is written to a file of the folder NOTES. With STAY in the environment the first process then
stays in that step, so that only the launcher can end it.
"""

import importlib
import os
import signal
import sys
import time
from pathlib import Path

from transformers import TrainerCallback

from jnana.training.saving import interruption
from tests.scripts.faults import add_callback
from tests.scripts.launching import LONGEST


class Scheduler(TrainerCallback):
    """Sends a signal as a step begins, and waits until it has come; the first process does it, for all."""

    def __init__(self, name: str, to: str, step: int):
        self.number, self.to, self.step = getattr(signal, name), to, step
        self.stopping: interruption.StopSignalCallback | None = None
        begin = interruption.StopSignalCallback.on_train_begin

        def begun(callback, *args, **kwargs):
            self.stopping = callback
            begin(callback, *args, **kwargs)

        interruption.StopSignalCallback.on_train_begin = begun

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step != self.step or not state.is_world_process_zero:
            return
        self.send(os.getppid(), args.world_size)
        end = time.monotonic() + LONGEST
        # A busy launcher may take longer than the rest of a tiny run; what is ignored (SIGHUP under nohup) never comes
        comes = self.number in self.stopping.previous
        while ("STAY" in os.environ or (comes and not self.stopping.asked())) and time.monotonic() < end:
            time.sleep(0.01)

    def send(self, launcher: int, processes: int) -> None:
        if self.to == "group":
            os.killpg(os.getpgid(launcher), self.number)
            return
        workers = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        assert len(workers) == processes, workers
        for process in [launcher, *(map(int, workers) if self.to == "all" else ())]:
            os.kill(process, self.number)


if __name__ == "__main__":
    name, to, step, notes, script, *arguments = sys.argv[1:]
    add_callback(Scheduler(name, to, int(step)))
    interruption.LAUNCHER_DELAY = LONGEST  # however long the launcher takes to pass a Ctrl-C on
    try:
        importlib.import_module(f"jnana.{script}").main(arguments)
    except SystemExit as end:
        (Path(notes) / os.environ.get("RANK", "0")).write_text(str(end.code))
        raise
