"""Two runs never write into one directory; the lock of a run that has ended does not stop the next."""

import json
import os
import platform
import subprocess
import sys
import threading
import time

import pytest

from jnana.training.saving import run_lock
from jnana.training.saving.run_lock import (
    LOCK,
    LostDirectory,
    check_directories,
    hold_directory,
    release_directories,
    releases_directory,
)


@pytest.fixture(autouse=True)
def released():
    yield
    release_directories()


def child(folder, then: str) -> subprocess.Popen:
    """A process that holds the directory, says so, and goes on with `then`."""
    code = f"import os, signal, time; from jnana.training.saving.run_lock import *; hold_directory({str(folder)!r})"
    return subprocess.Popen(
        [sys.executable, "-c", f"{code}; print('held', flush=True); {then}"], stdout=subprocess.PIPE, text=True
    )


def test_a_second_run_is_refused_by_name(tmp_path):
    first = child(tmp_path, "time.sleep(60)")
    assert first.stdout.readline() == "held\n"
    started = json.loads((tmp_path / LOCK).read_text())["started"]
    with pytest.raises(ValueError) as raised:
        hold_directory(str(tmp_path))
    said = str(raised.value)
    for word in (f"process {first.pid} ", repr(platform.node()), started, str(tmp_path / LOCK)):
        assert word in said
    first.kill()
    first.wait()
    hold_directory(str(tmp_path))  # SIGKILL left the lock
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_it_is_returned(tmp_path):
    @releases_directory
    def main():
        hold_directory(str(tmp_path))
        assert (tmp_path / LOCK).is_file()
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        main()
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_this_process_that_was_not_returned(tmp_path):
    hold_directory(str(tmp_path))
    run_lock._held.clear()
    hold_directory(str(tmp_path))
    hold_directory(str(tmp_path))


def leave(folder, **changes) -> None:
    own = {**run_lock._identity(os.getpid()), "started": "2026-01-01T00:00:00+00:00"}
    (folder / LOCK).write_text(json.dumps({**own, **changes}))


def test_a_process_number_that_was_given_again(tmp_path):
    """This process has the number of the run that was killed, and another start."""
    leave(tmp_path, pid=os.getppid(), mark="1")
    hold_directory(str(tmp_path))


def test_the_process_is_looked_up_without_proc(tmp_path, monkeypatch):
    """As on Windows, where there is no /proc."""
    monkeypatch.setattr(run_lock.os, "readlink", lambda path: (_ for _ in ()).throw(OSError()))
    leave(tmp_path, **run_lock._identity(os.getppid()))
    with pytest.raises(ValueError, match=f"process {os.getppid()} on host"):
        hold_directory(str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    leave(tmp_path, pid=ended.pid, mark="1")
    hold_directory(str(tmp_path))


@pytest.mark.parametrize("elsewhere", [{"host": "another"}, {"machine": "another boot"}, {}])
def test_a_lock_that_rests_is_stale(elsewhere, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.3)
    leave(tmp_path, **elsewhere) if elsewhere else (tmp_path / LOCK).write_text("{")
    hold_directory(str(tmp_path))
    assert "cannot be looked up from here; waiting" in caplog.text


def test_a_lock_of_another_host_that_is_touched_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 30)
    leave(tmp_path, host="another")

    def touch():
        for count in range(100):
            time.sleep(0.1)
            if done.is_set():
                return
            os.utime(tmp_path / LOCK, (1e9 - count, 1e9 - count))  # its clock is behind, and runs backwards

    done = threading.Event()
    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(ValueError, match="on host 'another', started 2026-01-01"):
            hold_directory(str(tmp_path))
    finally:
        done.set()
        thread.join()


def test_a_run_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.05)
    hold_directory(str(tmp_path))
    os.utime(tmp_path / LOCK, (1, 1))
    deadline = time.monotonic() + 20
    while (tmp_path / LOCK).stat().st_mtime == 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_lock_that_another_run_took(tmp_path):
    """This process slept for a minute, and a run of another host found its lock untouched."""
    check_directories()  # holds none
    hold_directory(str(tmp_path))
    check_directories()
    leave(tmp_path, host="another", pid=7)
    other = (tmp_path / LOCK).read_text()
    with pytest.raises(LostDirectory, match="now belongs to process 7 on host 'another', started 2026-01-01.* stops"):
        check_directories()
    release_directories()
    assert (tmp_path / LOCK).read_text() == other
    check_directories()


def test_a_run_knows_its_lock_when_the_clock_is_set(tmp_path, monkeypatch):
    """psutil's start of a process moves with the clock on macOS; the lock is told by what was written into it."""
    hold_directory(str(tmp_path))
    started = run_lock._identity(os.getpid())
    monkeypatch.setattr(run_lock, "_identity", lambda pid: {**started, "mark": "another"})
    check_directories()
    release_directories()
    assert not (tmp_path / LOCK).exists()


def test_a_disk_that_does_not_answer_takes_no_lock(tmp_path, monkeypatch, caplog):
    hold_directory(str(tmp_path))
    monkeypatch.setattr(run_lock, "_glance", lambda lock: (_ for _ in ()).throw(OSError("stale file handle")))
    check_directories()
    assert "can't be read now: stale file handle" in caplog.text


def test_a_lock_that_is_gone(tmp_path, monkeypatch):
    """The other run has ended since. One that only looks puts the lock back, and nothing is lost."""
    hold_directory(str(tmp_path))
    content, glances = (tmp_path / LOCK).read_text(), []

    def put_back(seconds):
        glances.append(seconds)
        if len(glances) == 3:
            (tmp_path / LOCK).write_text(content)

    monkeypatch.setattr(run_lock.time, "sleep", put_back)
    (tmp_path / LOCK).unlink()
    check_directories()
    assert len(glances) == 3
    (tmp_path / LOCK).unlink()
    with pytest.raises(LostDirectory, match="is gone: another run took it, or it was deleted"):
        check_directories()


def test_a_run_that_lost_its_lock_says_so_and_touches_it_no_more(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.01)
    leave(tmp_path, host="another")
    os.utime(tmp_path / LOCK, (1, 1))
    stop = threading.Event()
    run_lock._touch(tmp_path / LOCK, "what this run wrote", stop)  # returns
    assert "was taken from this run while it stood still" in caplog.text and (tmp_path / LOCK).stat().st_mtime == 1


def test_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock.os, "link", lambda *paths: (_ for _ in ()).throw(OSError()))
    hold_directory(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    run_lock._held.clear()
    leave(tmp_path, **run_lock._identity(os.getppid()))
    with pytest.raises(ValueError, match="another run writes into output_dir"):
        hold_directory(str(tmp_path))
