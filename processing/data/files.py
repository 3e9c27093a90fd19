"""Files as a whole: written so that they are never incomplete, and told apart by stamps and digests."""

import hashlib
import os
from pathlib import Path

import pyarrow as pa


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, `.NAME.PID`, and rename it when its content has reached the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with open(unfinished, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def remove_unfinished(path: Path) -> None:
    """Delete what killed processes left of a file of [`write_whole`]. No other process may be writing it now."""
    for unfinished in path.parent.glob(f".{path.name}.*"):
        unfinished.unlink(missing_ok=True)


def file_stamp(path: str) -> tuple[int, int] | None:
    """Size in bytes and modification time in nanoseconds of a file; `None` if it does not exist."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def write_table(table: pa.Table, path: Path) -> None:
    """Write an Arrow table, in the stream format that `Dataset.from_file` maps."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def read_table(path: Path) -> pa.Table:
    """The table of a file of [`write_table`], mapped into memory."""
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def digest_of(file: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
