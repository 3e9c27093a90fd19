"""The manifest of a checkpoint: its files with sizes and digests, written last, so that damage and gaps are noticed.

Digests are SHA-256, which processors compute in hardware (about 0.9 GB/s on one core of an AMD EPYC, so 6 s for
6 GB; several files are read at once). The file is what the Hub lists for a large file too.
"""

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jnana.processing.data.files import digest_of, write_whole


class PassingProblem(str):
    """Why a checkpoint can't be used now, although it may be whole: a disk that does not answer, a newer version."""


MANIFEST = "checkpoint_manifest.json"
MANIFEST_FORMAT = 1
# Written by people and by run_evaluate after the checkpoint; nothing is resumed from them.
NOT_LISTED = (".md", ".png", ".tmp")
THREADS = 8


def write_manifest(folder: Path, known: dict[tuple[int, ...], str] | None = None) -> None:
    """List the files of a checkpoint that is written whole, after they have reached the disk.

    Args:
        folder (`Path`): The checkpoint, its subdirectories included (FSDP and DeepSpeed have them).
        known (`dict`, *optional*): The digests of files that several checkpoints link to. It is added to.
    """
    known = {} if known is None else known
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _is_listed(path))
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(lambda file: known.get(_inode(file)) or _sync_and_digest(file), files))
    known |= {
        _inode(file): digest for file, digest in zip(files, digests, strict=True) if file.suffix == ".safetensors"
    }
    names = [file.relative_to(folder).as_posix() for file in files]
    listed = {
        name: {"size": file.stat().st_size, "sha256": digest}
        for name, file, digest in zip(names, files, digests, strict=True)
    }
    for directory in {file.parent for file in files}:
        _sync_directory(directory)
    write_whole(folder / MANIFEST, json.dumps({"format": MANIFEST_FORMAT, "files": listed}, indent=1).encode())
    _sync_directory(folder)
    _sync_directory(folder.parent)


def manifest_problem(folder: Path, read: bool = True) -> str | None:
    """What differs between a checkpoint and its manifest, or `None`; the manifest must exist.

    Args:
        folder (`Path`): The checkpoint.
        read (`bool`, defaults to `True`): Compare digests; `False` compares names and sizes only.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        listed = {name: (entry["size"], entry["sha256"]) for name, entry in content["files"].items()}
    except OSError as error:
        return PassingProblem(f"{MANIFEST} cannot be read ({error.strerror})")
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    if content.get("format") != MANIFEST_FORMAT:
        return PassingProblem(
            f"{MANIFEST} is of format {content.get('format')!r}, this version reads {MANIFEST_FORMAT}"
        )
    for name, (size, _) in listed.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} is {'truncated' if file.stat().st_size < size else 'longer than it was written'}"
    if not read:
        return None
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            digests = list(pool.map(digest_of, [folder / name for name in listed]))
    except OSError as error:
        return PassingProblem(f"{error.filename} cannot be read ({error.strerror})")
    for (name, (_, digest)), found in zip(listed.items(), digests, strict=True):
        if found != digest:
            return f"{name} has changed since it was written (its SHA-256 is another)"
    return None


def _is_listed(path: Path) -> bool:
    itself = path.name == MANIFEST or path.name.startswith(f".{MANIFEST}.")  # the latter where its writing was cut off
    return path.suffix not in NOT_LISTED and not itself


def _inode(file: Path) -> tuple[int, ...]:
    """Equal for two names of one unchanged file."""
    stat = file.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _sync_and_digest(file: Path) -> str:
    with file.open("rb+") as stream:  # Windows syncs only what is open for writing
        os.fsync(stream.fileno())
    return digest_of(file)


def _sync_directory(folder: Path) -> None:
    """Make the names in a directory durable, where the system knows that."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems do not know it
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
