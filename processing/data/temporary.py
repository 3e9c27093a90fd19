"""Directories through which one process hands its data on to the others of its machine."""

import atexit
import contextlib
import logging
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
from filelock import FileLock, Timeout


logger = logging.getLogger(__name__)

# Their names begin with the host and the user: another host's locks can't be asked everywhere, and another user's
# files can't be written.
HANDED_ON = f"jnana_{re.sub('[^A-Za-z0-9.-]', '-', platform.node())}_{getattr(os, 'getuid', os.getpid)()}_"
OWNED = "owner.lock"  # in each of them, held by the process that made it as long as that lives


def temporary_directory(cache: Path | None = None) -> Path:
    """Make a directory that is deleted when this process exits, and delete those of processes that were killed.

    Its process holds a lock in it, which the system frees however the process ends. Directories without such a lock
    are left alone, as are those of other hosts and users: nobody knows who needs them. Where the file system has no
    locks, nothing is deleted but the own directory.

    Args:
        cache (`Path`, *optional*): Where it lies; by default the cache of `datasets`. Made if it does not exist.

    Raises:
        OSError: If `cache` can't be written.
    """
    cache = Path(datasets.config.HF_DATASETS_CACHE) if cache is None else cache
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f".{HANDED_ON}lock") as alone:  # a new directory is not looked at before its lock is held
        for lock in cache.glob(f"{HANDED_ON}*/{OWNED}"):
            if alone and _is_free(lock):
                logger.info(f"deleting {lock.parent}, which a run that was killed has left")
                shutil.rmtree(lock.parent, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=HANDED_ON, dir=cache))
        owned = FileLock(folder / OWNED)
        with contextlib.suppress(NotImplementedError, OSError):
            owned.acquire(timeout=0)
            _owned.append(owned)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


_owned: list[FileLock] = []  # a lock is freed when its object is deleted


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a lock within the block; `False` where the file system has no locks."""
    lock = FileLock(path)
    with contextlib.suppress(NotImplementedError, OSError):
        lock.acquire()
    try:
        yield lock.is_locked
    finally:
        lock.release()


def _is_free(path: Path) -> bool:
    """Whether a lock exists that no process holds; `False` where the file system does not know."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except (Timeout, NotImplementedError, OSError):
        return False
    lock.release()
    return True
