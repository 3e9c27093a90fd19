"""Runs a command and takes it down, with all it started, as soon as the process that asked for it is gone.

A worker notices by itself that its input has ended, but not while it imports, computes or hangs, and `uv` not while it
downloads. So `worker_process.py` starts this small script between itself and the command. It is run by path, as
`python worker_guard.py LIFELINE PARENT COMMAND...`, needs the standard library only, and is the leader of the process
group that it kills.

LIFELINE is the number of a pipe's reading end whose writing end only the parent holds: it ends when the parent does,
however that comes about. PARENT is the parent's process id, looked at once a second in case a fork of the parent has
kept the pipe open.
"""

import os
import select
import signal
import subprocess
import sys


def main(lifeline: int, parent: int, command: list[str]) -> int:
    """The command's exit status, in the shell's way of counting; does not return if the parent ends first."""
    child_ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler is needed for the wake-up to be written

    child = subprocess.Popen(command)  # has our standard streams, not the lifeline
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(nothing, stream)

    while child.poll() is None:
        ready, _, _ = select.select([lifeline, child_ended], [], [], 1.0)
        if lifeline in ready or os.getppid() != parent:
            os.killpg(0, signal.SIGKILL)
        if child_ended in ready:
            os.read(child_ended, 4096)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
