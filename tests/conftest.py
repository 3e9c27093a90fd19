"""Settings of all tests: each process keeps the code of the checkpoints that it loads in a separate directory.

transformers copies such code to one directory in the user's home, file by file, without a lock and not atomically. A
process that loads a checkpoint of the same name at the same time may import an incomplete file.
"""

import os
import signal
import tempfile

import pytest


# A forked test process waits forever for threads that OpenMP started in its parent; read when torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

_MODULES = tempfile.TemporaryDirectory(prefix="jnana-test-modules-")
os.environ["HF_MODULES_CACHE"] = _MODULES.name  # read when transformers is imported, which no plugin has done yet


# A shell starts background jobs with these signals ignored, and so the processes of tests that send them.
for _name in ("SIGINT", "SIGHUP", "SIGQUIT"):
    _signal = getattr(signal, _name, None)  # Windows has the first only
    if _signal is not None and signal.getsignal(_signal) == signal.SIG_IGN:
        signal.signal(_signal, signal.default_int_handler if _name == "SIGINT" else signal.SIG_DFL)


_BLOCK = getattr(signal, "pthread_sigmask", None)  # not on Windows
_MASK = _BLOCK(signal.SIG_BLOCK, ()) if _BLOCK else set()


@pytest.fixture(autouse=True)
def no_signal_stays_blocked():
    """A process that a later test starts would inherit the block, and SIGTERM would not end it."""
    yield
    if _BLOCK:
        left = _BLOCK(signal.SIG_SETMASK, _MASK)
        assert left == _MASK, f"the test leaves signals blocked: {sorted(left - _MASK)}; see restored_signals"
