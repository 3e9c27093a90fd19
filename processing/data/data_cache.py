"""The data cache: rows that were checked, rendered and tokenised once, kept on disk for the next start of a run.

An entry is a directory named after a digest of all that its content depends on:

    prepared.json        that key in full, the report of the check, name, size and SHA-256 of the two files below, and
                         the SHA-256 of all this
    rows-*.arrow         the rows that can be used, with their tokens (Arrow's stream format, memory-mapped)
    images-*.arrow       path, size and modification time of every image file that was read

`prepared.json` is written last, under a temporary name, and renamed. So an entry without it is the rest of a killed
build. An entry is used only if the key in it is the one that is wanted, all three files are as they were
written, and no image file has changed. Any other one is built anew. Nothing is unpickled.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from filelock import FileLock, Timeout

from jnana.processing.processing_jnana import JnanaProcessor

from .files import digest_of, file_stamp, write_whole
from .transcripts import SUFFIX as TRANSCRIPTS
from .transcripts import StoredTranscripts


logger = logging.getLogger(__name__)

FORMAT = 1
ENTRY_FILE = "prepared.json"
LOCK_FILE = ".lock"
IMAGES_SCHEMA = pa.schema({"path": pa.string(), "size": pa.int64(), "mtime_ns": pa.int64()})
# Content is hashed up to this size; of larger files, size and modification time count.
HASHED_BYTES = 512 * 1024 * 1024
WAIT_SECONDS = 60.0  # for a lock, between two lines of the log
KEPT_SECONDS = 7 * 24 * 3600.0  # files of an entry that was replaced
PACKAGES = ("jinja2", "pillow", "tokenizers", "transformers")


class DamagedEntry(ValueError):
    """An entry that can't be used; the message says why."""


def default_data_cache() -> Path:
    """The directory of the cache where none is named: inside that of `datasets` (`HF_DATASETS_CACHE`)."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "jnana"


class ChangedImages(DamagedEntry):
    """An entry that is whole, of image files that have changed, or are others on another machine."""


class UnwritableCache(ValueError):
    """The directory of the cache can't be written; the message says why."""


# ---------------------------------------------------------------------- the key


def source_key(files: Iterable[Path]) -> dict[str, Any]:
    """
    The files of a source, with the transcripts beside them, for the key.

    Args:
        files (`Iterable[Path]`): that hold the records.

    Returns:
        `dict[str, Any]`: for each absolute path the SHA-256 of its content, or size and modification time of a large
            one; for transcripts also the sizes of the recordings.
    """
    key: dict[str, Any] = {}
    for file in files:
        key[os.path.abspath(file)] = _content(file)
        transcripts = Path(f"{file}{TRANSCRIPTS}")
        if transcripts.is_file():
            stored = StoredTranscripts(file)
            stamps = {name: file_stamp(str(stored.path_of(name))) for name in sorted(stored.records)}
            key[os.path.abspath(transcripts)] = [
                _content(transcripts),
                {name: None if stamp is None else stamp[0] for name, stamp in stamps.items()},
            ]
    return key


def processor_key(processor: JnanaProcessor) -> dict[str, str]:
    """
    The SHA-256 of each file that the processor is saved as: tokenizer, chat template, image processor, code; and the
    library that resizes images, which is saved only where training chose it.
    """
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        files = {path.name: digest_of(path) for path in sorted(Path(folder).rglob("*")) if path.is_file()}
    return {**files, "image_backend": processor.image_backend}


def code_key() -> dict[str, str]:
    """The versions of the packages that rows depend on, and a digest of the code that reads and encodes them."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return {**{name: version(name) for name in PACKAGES}, "jnana.processing": digest.hexdigest()}


def _content(file: Path) -> Any:
    stamp = file_stamp(str(file))
    return digest_of(file) if stamp is not None and stamp[0] <= HASHED_BYTES else stamp


# ---------------------------------------------------------------------- an entry


@dataclass
class Entry:
    """
    A whole entry.

    Args:
        rows (`Path`): the Arrow file of the rows.
        report (`dict`): that of the check, as JSON holds it.
        age (`float`): seconds since it was made.
    """

    rows: Path
    report: dict[str, Any]
    age: float


class CacheEntry:
    """
    The place of one prepared data set.

    Args:
        folder (`Path`): of the cache.
        key (`dict`): all that the prepared rows depend on, as JSON holds it.
    """

    def __init__(self, folder: Path, key: dict[str, Any]):
        self.key = json.loads(json.dumps({"format": FORMAT, **key}, sort_keys=True))
        self.folder = Path(folder) / _digest_of(self.key)[:32]

    def read(self) -> Entry | None:
        """
        The entry, if it is there.

        Raises:
            DamagedEntry: if it is there and can't be used.
        """
        try:
            text = (self.folder / ENTRY_FILE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise DamagedEntry(f"{ENTRY_FILE} can't be read ({error})") from error
        try:
            entry = json.loads(text)
            whole = entry.pop("sha256") == _digest_of(entry) and entry["key"] == self.key
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise DamagedEntry(f"{ENTRY_FILE} is not as it was written")
        paths = {kind: self.folder / file["name"] for kind, file in entry["files"].items()}
        for kind, file in entry["files"].items():
            path = paths[kind]
            if not path.is_file() or path.stat().st_size != file["bytes"] or digest_of(path) != file["sha256"]:
                raise DamagedEntry(f"{path.name} is not as it was written")
        changed = _changed_image(paths["images"])
        if changed is not None:
            raise ChangedImages(f"image {changed!r} has changed")
        return Entry(paths["rows"], entry["report"], max(time.time() - entry["made"], 0.0))

    @contextlib.contextmanager
    def lock(self, waiting: Any) -> Iterator[None]:
        """
        Keep other runs from building the entry; the lock of a killed run is free.

        Args:
            waiting (`Callable`): called, without arguments, if another run holds the lock.
        """
        with self.explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / LOCK_FILE)
            while not lock.is_locked:
                try:
                    lock.acquire(timeout=0 if waiting is not None else WAIT_SECONDS)
                except Timeout:
                    if waiting is not None:
                        waiting()
                        waiting = None
                    else:
                        logger.info(
                            f"still waiting for {str(self.folder / LOCK_FILE)!r}; if no run holds it, delete it"
                        )
                except NotImplementedError:  # two runs may then build it at once; each writes files of its own
                    logger.warning(f"data_cache {str(self.folder.parent)!r} is on a file system without locks")
                    break
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Explain an error of writing to the cache: a full disk, or a directory that can't be written."""
        try:
            yield
        except OSError as error:
            where = f"data_cache {str(self.folder.parent)!r}"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                problem = f"{where}: the disk is full. Make room there"
            else:
                problem = f"{where} can't be written ({error.strerror or error})"
            raise UnwritableCache(f"{problem}, or name another directory: data_cache: DIR") from error

    def write(
        self,
        tables: Iterable[pa.Table],
        schema: pa.Schema,
        report: Any,
        stamps: dict[str, Any],
        keep_replaced: bool = False,
    ) -> Path:
        """
        Write the entry; the lock must be held.

        Args:
            tables (`Iterable[pa.Table]`): the rows, block by block.
            schema (`pa.Schema`): of the tables.
            report (`Callable`): gives the report, after the last table.
            stamps (`dict`): size and modification time of each image file, filled while the tables are made.
            keep_replaced (`bool`, *optional*, defaults to `False`): leave the files of the entry that this one
                replaces, for `KEPT_SECONDS`: a run on another machine may be about to read them.

        Returns:
            `Path`: the Arrow file of the rows.

        Raises:
            ValueError: if the disk is full or the directory can't be written.
        """
        kept = self.recent_files() if keep_replaced else set()
        old = [path for path in self.folder.glob("*-*.arrow") if path.name not in kept]
        old += self.folder.glob(f".{ENTRY_FILE}.*")
        mark = f"{os.getpid()}-{time.time_ns()}"
        files = {kind: self.folder / f"{kind}-{mark}.arrow" for kind in ("rows", "images")}
        try:
            with self.explained_writes(files["rows"], schema) as writer:
                for table in tables:
                    writer(table)
            paths = {name: list(column) for name, column in zip(IMAGES_SCHEMA.names, _columns(stamps), strict=True)}
            with self.explained_writes(files["images"], IMAGES_SCHEMA) as writer:
                writer(pa.Table.from_pydict(paths, schema=IMAGES_SCHEMA))
            described = {
                kind: {"name": path.name, "bytes": path.stat().st_size, "sha256": digest_of(path)}
                for kind, path in files.items()
            }
            entry = {"key": self.key, "report": report(), "files": described, "made": time.time()}
            entry["sha256"] = _digest_of(entry)
            with self.explained():
                write_whole(self.folder / ENTRY_FILE, json.dumps(entry, indent=1).encode())
        except BaseException:
            for path in files.values():
                with contextlib.suppress(OSError):
                    path.unlink()
            raise
        for path in old:  # of a killed build, or replaced; where another process still maps it (Windows) it stays
            with contextlib.suppress(OSError):
                path.unlink()
        return files["rows"]

    def recent_files(self) -> set[str]:
        """The files that the entry names, if they are not old."""
        try:
            files = json.loads((self.folder / ENTRY_FILE).read_text(encoding="utf-8"))["files"].values()
            names = {file["name"] for file in files}
            newest = max((self.folder / name).stat().st_mtime for name in names)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return set()
        return names if time.time() - newest < KEPT_SECONDS else set()

    @contextlib.contextmanager
    def explained_writes(self, path: Path, schema: pa.Schema) -> Iterator[Any]:
        """A function that writes tables to an Arrow file, which is on disk when the block ends."""
        with self.explained():
            file = open(path, "wb")  # noqa: SIM115  closed below, where its errors are explained
        try:
            writer = pa.ipc.new_stream(file, schema)

            def write(table: pa.Table) -> None:
                with self.explained():
                    writer.write_table(table)

            yield write
            with self.explained():
                writer.close()
                file.flush()
                os.fsync(file.fileno())
        finally:
            with contextlib.suppress(OSError):
                file.close()


def _digest_of(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _columns(stamps: dict[str, tuple[int, int] | None]) -> tuple[Iterable, Iterable, Iterable]:
    known = [(None, None) if stamp is None else stamp for stamp in stamps.values()]
    return stamps, (size for size, _ in known), (mtime for _, mtime in known)


def _changed_image(file: Path) -> str | None:
    """An image file that is not as it was when the rows were prepared, if there is one."""
    with pa.memory_map(str(file)) as source:
        columns = pa.ipc.open_stream(source).read_all().to_pydict()
    for path, *stamp in zip(*columns.values(), strict=True):
        if file_stamp(path) != (None if stamp[0] is None else tuple(stamp)):
            return path
    return None
