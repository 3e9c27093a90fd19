"""One run at a time in an output directory: a lock file names the host, process and start of the run that has it.

A run that was killed leaves its lock. Where the process can be looked up (same machine, same boot, same process
namespace) a lock without its process is stale at once. Elsewhere (another host, another container, a reboot) the lock
is watched: a run touches its lock every ten seconds, so one that rests for a minute is stale. Modification times are
only compared with each other, so clocks need not agree. Uses no `fcntl`, which Windows lacks.

A run that was suspended, or whose file system stood still, for a minute may so lose its lock to another one. It finds
out before it saves anything: [`check_directories`] is called before each checkpoint, before its manifest and before
the final files, and ends the run that no longer has its lock.
"""

import contextlib
import functools
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import psutil


logger = logging.getLogger(__name__)

LOCK = "run.lock"
BEAT = 10.0  # seconds between two touches
PATIENCE = 60.0  # seconds without a touch after which a lock of another host is stale
GLANCES = 5  # at a lock that is missing: another run takes it away for a moment to see whether it is stale
GLANCE = 0.2  # seconds between two of them

P = ParamSpec("P")
R = TypeVar("R")

# The locks of this process: what it wrote into them, and the events that end their touches. What was written tells
# an own lock, because the start of a process, as psutil computes it, moves with the clock on some systems.
_held: dict[Path, tuple[str, threading.Event]] = {}


class LostDirectory(RuntimeError):
    """Another run may write into the output directory of this one, which has to stop."""


def hold_directory(output_dir: str) -> None:
    """Take the lock of an output directory, which is made, for this process; [`releases_directory`] returns it.

    Raises:
        ValueError: if another run holds it, naming its host, process and start.
    """
    lock = Path(output_dir).resolve() / LOCK
    if lock in _held:
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    own = {**_identity(os.getpid()), "started": datetime.now().astimezone().isoformat(timespec="seconds")}
    text = json.dumps(own)
    while not _create(lock, text):
        content = _read(lock)
        if content is None:  # it was released meanwhile
            continue
        owner = _owner(content)
        if _is_alive(lock, content, owner):
            raise ValueError(
                f"another run writes into output_dir {output_dir!r}: process {owner.get('pid')} on host "
                f"{owner.get('host')!r}, started {owner.get('started')}; give another output_dir, or end that run "
                f"first (if it surely has ended, delete {lock})"
            )
        logger.info(f"{lock} was left by process {owner.get('pid')} on host {owner.get('host')!r}, which has ended")
        _remove_stale(lock, content)
    _remove_leftovers(lock)
    stop = threading.Event()
    _held[lock] = text, stop
    threading.Thread(target=_touch, args=(lock, text, stop), daemon=True).start()


def check_directories() -> None:
    """Check that this process still has the locks that it took; without one it returns at once.

    Raises:
        LostDirectory: if another run has taken one, or it was deleted, naming that run and what is safe.
    """
    for lock, (text, _) in _held.items():
        try:
            found = _glance(lock)
        except OSError as error:  # a disk that does not answer says nothing of other runs; saving will tell
            logger.warning(f"{lock} can't be read now: {error}")
            continue
        if found is None:
            what = "is gone: another run took it, or it was deleted"
        elif found == text:
            continue
        else:
            other = _owner(found)
            what = (
                f"now belongs to process {other.get('pid')} on host {other.get('host')!r}, started "
                f"{other.get('started')}, which took it because this run stood still for {PATIENCE:.0f} s or longer"
            )
        raise LostDirectory(
            f"{lock} {what}. This run (process {os.getpid()} on host {platform.node()!r}) stops before it saves into "
            "that directory again; what it has saved stays. When the other run has ended, start the same command "
            "again, which goes on from the last complete checkpoint, or give another output_dir"
        )


def release_directories() -> None:
    """Return the locks that this process holds."""
    for lock in list(_held):
        text, stop = _held.pop(lock)
        stop.set()
        if _read(lock) == text:
            lock.unlink(missing_ok=True)


def releases_directory(main: Callable[P, R]) -> Callable[P, R]:
    """Decorates a script's `main`: the lock is returned when it ends, by an error too."""

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return main(*args, **kwargs)
        finally:
            release_directories()

    return run


def _create(lock: Path, text: str) -> bool:
    """Write the lock of this process, unless there is one. A half-written lock is never seen."""
    temporary = lock.with_name(f"{LOCK}.{platform.node()}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    try:
        os.link(temporary, lock)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with lock.open("x", encoding="utf-8") as stream:
                stream.write(text)
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _read(lock: Path) -> str | None:
    try:
        return lock.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _owner(content: str) -> dict[str, Any]:
    """What a lock says; empty if it is damaged."""
    with contextlib.suppress(ValueError):
        owner = json.loads(content)
        if isinstance(owner, dict):
            return owner
    return {}


def _identity(pid: int) -> dict[str, Any]:
    """Host, machine, process and a mark of its start that no clock changes; the mark is `None` without the process.

    The machine is the boot and the process namespace, by which a container is told from its host.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        machine = ""
    mark: str | None
    try:
        if machine:
            # the 20th value behind the name, which may contain anything: the start in ticks since the boot
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            values = stat.rpartition(")")[2].split()
            mark = None if values[0] in "ZX" else values[19]
        else:
            mark = f"{psutil.Process(pid).create_time():.0f}"
    except (OSError, psutil.Error):
        mark = None
    return {"host": platform.node(), "machine": machine, "pid": pid, "mark": mark}


def _is_own(owner: dict[str, Any]) -> bool:
    own = _identity(os.getpid())
    return all(owner.get(name) == value for name, value in own.items())


def _is_alive(lock: Path, content: str, owner: dict[str, Any]) -> bool:
    """Whether the run of a lock still writes; of another machine, by watching the lock."""
    if _is_own(owner):
        return False  # left by an earlier `main` of this process
    here = _identity(os.getpid())
    if isinstance(owner.get("pid"), int) and all(owner.get(name) == here[name] for name in ("host", "machine")):
        return _identity(owner["pid"])["mark"] == owner.get("mark") is not None
    logger.warning(
        f"{lock} is of process {owner.get('pid')} on host {owner.get('host')!r}, which cannot be looked up from here; "
        f"waiting {PATIENCE:.0f} s to see whether it still runs"
    )
    start, end = _changed(lock), time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE / 10))
        if _read(lock) != content or _changed(lock) != start:
            return lock.exists()
    return False


def _changed(lock: Path) -> int | None:
    """The modification time, read through an open file: network file systems ask their server then."""
    try:
        with lock.open("rb") as stream:
            return os.fstat(stream.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _remove_stale(lock: Path, content: str) -> None:
    """Take a stale lock away; if another run has replaced it meanwhile, put that one back."""
    taken = lock.with_name(f"{LOCK}.stale.{platform.node()}.{os.getpid()}")
    try:
        os.replace(lock, taken)
    except FileNotFoundError:
        return
    if _read(taken) != content and not lock.exists():
        os.replace(taken, lock)
    taken.unlink(missing_ok=True)


def _remove_leftovers(lock: Path) -> None:
    """Delete what killed starts left beside a lock that this process holds.

    Another start that is just trying to take it may lose its temporary file to this, and finds the lock taken.
    """
    for left in lock.parent.glob(f"{LOCK}.*"):
        with contextlib.suppress(OSError):
            left.unlink(missing_ok=True)


def _glance(lock: Path) -> str | None:
    """What a lock says; `None` only if it stays away, since another run that looks at it takes it for a moment."""
    for _ in range(GLANCES):
        content = _read(lock)
        if content is not None:
            return content
        time.sleep(GLANCE)
    return None


def _touch(lock: Path, text: str, stop: threading.Event) -> None:
    """Touch a lock until it is returned or lost; [`check_directories`] says so where the run can be ended."""
    while not stop.wait(BEAT):
        try:
            if _glance(lock) != text:
                logger.error(f"{lock} was taken from this run while it stood still; it stops before its next save")
                return
            os.utime(lock)
        except OSError:
            continue  # a disk that does not answer now may answer at the next touch
