"""Runs a command and kills it, with all processes that it started, when the parent process ends.

A worker notices the end of its input only between requests, not while it imports, computes or hangs; `uv` does not
notice it while it downloads. So `worker_process.py` starts this script, which starts the command. It is run by path
(`python worker_guard.py PARENT_PIPE PARENT_ID COMMAND...`), needs the standard library only, and is the leader of the
process group that it kills.

PARENT_PIPE is the descriptor of the reading end of a pipe. Only the parent holds the writing end, so the pipe closes
when the parent ends. PARENT_ID is the parent's process id. It is compared once a second, because a fork of the parent
can keep the pipe open.
"""

import os
import select
import signal
import subprocess
import sys


def main(parent_pipe: int, parent: int, command: list[str]) -> int:
    """The exit status of the command, as a shell gives it. Does not return if the parent ends first."""
    child_ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler nothing is written to the wake-up descriptor

    child = subprocess.Popen(command)  # inherits the standard streams, not the parent pipe
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(null, stream)

    while child.poll() is None:
        ready, _, _ = select.select([parent_pipe, child_ended], [], [], 1.0)
        if parent_pipe in ready or os.getppid() != parent:
            os.killpg(0, signal.SIGKILL)
        if child_ended in ready:
            os.read(child_ended, 4096)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
