"""Opens data sets: WebDataset's tar files, parquet files, directories of `save_to_disk`, ids on the Hub.

Local files are checked before they are read, so that a file whose end was cut off is named.
"""

import contextlib
import glob
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
from datasets import Features, Image, List, Value
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from huggingface_hub import HfFileSystem, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from .paths import names_local_path
from .records import RECORD_FILES


SHARDS = {".parquet": "parquet", ".tar": "webdataset"}
ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
# WebDataset names a column after the ending of the files, whose case `datasets` keeps.
IMAGE_ENDINGS = (*ENDINGS, *(ending.upper() for ending in ENDINGS))
HUB = "hf://"  # how `datasets` names a file of a repository
# The options of `load_dataset` by which it finds the files of a data set.
FINDING = ("name", "data_dir", "data_files", "revision", "token", "cache_dir", "download_config", "download_mode")
TEXT_ENDINGS = ("txt", "text", "transcript")
SAMPLE_NAME = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$")  # the key of a sample, and the ending of one of its files
# `texts` is a JSON object with the content of each text and `.json` file, by its ending
TAR_FEATURES = Features(
    {
        "__key__": Value("string"),
        "__url__": Value("string"),
        "images": List(Image(decode=False)),
        "texts": Value("string"),
    }
)


def load_source(source: str, split: str, streaming: bool, **load_options: Any) -> Any:
    """
    A data set by its name. `load_rows` documents the arguments.

    Raises:
        FileNotFoundError: if a local file does not exist.
        ValueError: if a file or its split can't be read; the message names it.
    """
    path = Path(source)
    if path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        data = split_of(datasets.load_from_disk(source), split, source)
        return data.to_iterable_dataset() if streaming else data
    shards = SHARDS.get(path.suffix.lower())
    if any(mark in source for mark in "*?[") and shards is not None and not path.exists():
        if not glob.glob(source):
            raise FileNotFoundError(f"source={source!r} names no file.")
    elif not path.exists() and names_local_path(source):
        raise FileNotFoundError(f"source={source!r} does not exist.")
    elif path.is_file() and shards is None:
        raise ValueError(f"{source}: files read are {', '.join((*RECORD_FILES, *SHARDS))}.")
    if shards is None:
        return _load_named(source, split, streaming, **load_options)
    # a path that exists is that file, whatever characters it has
    pattern = glob.escape(source) if path.exists() else source
    files = sorted(glob.glob(pattern))
    for file in files:
        check_whole(file, shards)
    if shards == "webdataset":
        return _load_tar_files(files, streaming)
    if path.is_file() and not streaming:
        return datasets.Dataset(read_parquet(path))  # `load_dataset` would write a cache
    try:
        return datasets.load_dataset(shards, data_files=pattern, split="train", streaming=streaming)
    except (datasets.exceptions.DatasetsError, pa.ArrowException, ValueError, TypeError, OSError) as error:
        raise ValueError(f"{source} can't be read: {error.__cause__ or error}") from error


def _load_named(source: str, split: str, streaming: bool, **load_options: Any) -> Any:
    """A data set on the Hub, or a directory of files. Archives of either are read by `_load_tar_files`."""
    try:
        archives = _archives_of(source, split, **load_options)
        if archives is not None:
            return _load_archives(*archives, source, streaming, load_options)
        return datasets.load_dataset(source, split=split, streaming=streaming, **load_options)
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{source} can't be read: {error.__cause__ or error}") from error
    except ValueError as error:
        if "split" not in str(error):
            raise
        raise ValueError(f"{source}: {error} Set train_split or eval_split to one of them.") from error


def _archives_of(source: str, split: str, **load_options: Any) -> tuple[list[str], list[str]] | None:
    """
    The archives of a split, and those of all splits, if a data set has WebDataset's form: paths, or addresses that
    begin with `HUB`. `None` for any other data set, and for compressed archives, which `datasets` reads.

    Without a network, those of a Hub data set that were downloaded before.

    Raises:
        ValueError: if it has no such split.
    """
    finding = {name: value for name, value in load_options.items() if name in FINDING}
    if datasets.config.HF_HUB_OFFLINE and not os.path.exists(source):
        with contextlib.suppress(LocalEntryNotFoundError):
            source = _snapshot(source, load_options, local_files_only=True)
    builder = datasets.load_dataset_builder(source, **finding)
    if not isinstance(builder, WebDataset):
        return None
    files = {str(name): found for name, found in builder.config.data_files.items()}
    if not split.isidentifier() or split == "all":  # a part of a split or all of them: `datasets` cuts and joins them
        return None
    if split not in files:
        raise ValueError(f"no split {split!r}; it has {', '.join(files)}.")
    archives = [str(file) for found in files.values() for file in found]
    if not all(file.endswith(".tar") and (file.startswith(HUB) or os.path.isfile(file)) for file in archives):
        return None
    return [str(file) for file in files[split]], archives


def _load_archives(
    archives: list[str], of_all_splits: list[str], source: str, streaming: bool, load_options: dict[str, Any]
) -> Any:
    """The samples of a split's archives: of the Hub while they are downloaded, or after that.

    All splits are downloaded, as by `datasets`: without a network it opens a data set only with all its files.
    """
    files = archives
    if archives[0].startswith(HUB):
        if streaming:
            return _load_tar_files(archives, streaming, token=load_options.get("token"))
        wanted = [glob.escape(_path_in_repository(address)) for address in of_all_splits]
        folder = _snapshot(source, load_options, allow_patterns=wanted)
        files = [os.path.join(folder, _path_in_repository(address)) for address in archives]
    for file, name in zip(files, archives, strict=True):
        check_whole(file, "webdataset", name)
    return _load_tar_files(files, streaming, archives)


def _path_in_repository(address: str) -> str:
    """The path of a file named as `hf://datasets/me/name@commit/folder/a.tar`: `folder/a.tar`."""
    return address.split("@", 1)[1].split("/", 1)[1]


def _snapshot(source: str, load_options: dict[str, Any], **options: Any) -> str:
    """The directory with the files of a Hub data set, which are downloaded unless they were before."""
    return snapshot_download(
        source, repo_type="dataset", revision=load_options.get("revision"), token=load_options.get("token"), **options
    )


def read_parquet(path: Path) -> pa.Table:
    """
    A parquet file as a table, not copied into memory.

    Raises:
        ValueError: if it is not a whole parquet file.
    """
    check_whole(str(path), "parquet")
    try:
        return pa.parquet.read_table(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error


def split_of(data: Any, split: str, name: str) -> Any:
    """
    The split of a data set that `save_to_disk` wrote with all its splits, or the data set itself.

    Raises:
        ValueError: if it has no such split.
    """
    if not isinstance(data, datasets.DatasetDict):
        return data
    if split not in data:
        raise ValueError(
            f"{name}: no split {split!r}; it has {', '.join(data)}. Set train_split or eval_split to one of them, or "
            f"give {Path(name) / next(iter(data), 'train')}."
        )
    return data[split]


def check_whole(file: str, kind: str, name: str | None = None) -> None:
    """Raise if the end of a shard was cut off; the error names it by `name`, or by its path."""
    try:
        if kind == "parquet":
            pa.parquet.read_metadata(file)
        else:
            _check_tar(file)
    except (pa.ArrowException, OSError, tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{name or file} is not a whole {kind} file ({error}). Was it copied to its end? Copy or write it again."
        ) from error


def _check_tar(file: str) -> None:
    """An archive ends with 1,024 zeros. Only one that does not is read to its end, header by header."""
    with open(file, "rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(size - 1024, 0))
        if size >= 1024 and not any(stream.read()):
            return
    with tarfile.open(file, "r:") as archive:
        archive.getmembers()
        end = archive.offset
    with open(file, "rb") as stream:  # `tarfile` takes a header that is cut off for the end of the archive
        stream.seek(end)
        if stream.read(512).strip(b"\0"):
            raise tarfile.ReadError("unexpected end of data")


def _load_tar_files(
    files: list[str], streaming: bool, names: list[str] | None = None, token: str | bool | None = None
) -> Any:
    """
    The samples of WebDataset's archives, with the columns of `TAR_FEATURES`.

    The contents of texts and `.json` files stay texts. `datasets` would give their fields the types of the first
    sample, so that one odd sample raises for all, or loses the images of later ones.

    Args:
        files (`list[str]`): paths, or addresses that begin with `HUB`.
        streaming (`bool`): whether they are read while they are used.
        names (`list[str]`, *optional*): by which errors name them, if not by their paths.
        token (`str` or `bool`, *optional*): for the Hub.
    """
    shards = list(zip(files, files if names is None else names, strict=True))
    if streaming:
        return datasets.IterableDataset.from_generator(
            _tar_samples, features=TAR_FEATURES, gen_kwargs={"shards": shards, "token": token}
        )
    # in the cache of `datasets`, under a name that depends on the arguments; an archive that changed is read again
    stamps = tuple((os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files)
    return datasets.Dataset.from_generator(
        _tar_samples, features=TAR_FEATURES, gen_kwargs={"shards": shards, "stamps": stamps}
    )


def _tar_samples(shards: list[tuple[str, str]], stamps: tuple = (), token: str | bool | None = None) -> Iterator[dict]:
    """The samples of archives: neighbouring files whose names are the same up to the first dot."""
    for file, shown in shards:
        with _open_archive(file, token) as archive:
            named = ((SAMPLE_NAME.match(member.name), member) for member in archive if member.isfile())
            samples = ((name[1], name[2], member) for name, member in named if name)
            for key, members in itertools.groupby(samples, key=lambda sample: sample[0]):
                images, texts = [], {}
                for _, ending, member in members:
                    if ending in IMAGE_ENDINGS:
                        data = archive.extractfile(member).read()  # type: ignore[union-attr]
                        images.append({"path": f"{key}.{ending}", "bytes": data})
                    elif ending.lower() in (*TEXT_ENDINGS, "json"):
                        data = archive.extractfile(member).read()  # type: ignore[union-attr]
                        texts[ending.lower()] = data.decode("utf-8-sig", "replace")
                yield {"__key__": key, "__url__": shown, "images": images, "texts": json.dumps(texts)}


@contextlib.contextmanager
def _open_archive(file: str, token: str | bool | None) -> Iterator[tarfile.TarFile]:
    """
    An archive to read from its start to its end.

    Raises:
        ValueError: if one of the Hub ends too early; a local one was checked before.
    """
    if not file.startswith(HUB):
        with tarfile.open(file, "r:") as archive:
            yield archive
        return
    try:
        with HfFileSystem(token=token).open(file, block_size=0) as stream:  # not in blocks: it is read once, in order
            watched = _WatchedStream(stream)
            with tarfile.open(fileobj=watched, mode="r|") as archive:  # type: ignore[call-overload]
                yield archive
                watched.read_rest()
                if watched.tail.strip(b"\0") and watched.size != archive.offset:
                    raise tarfile.ReadError("unexpected end of data")  # `tarfile` takes half a header for the end
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{file} is not a whole webdataset file ({error}). Upload it again.") from error


class _WatchedStream:
    """Counts what is read from a stream, and keeps its last 512 bytes: those of a whole archive are zeros."""

    def __init__(self, stream: Any):
        self.stream, self.size, self.tail = stream, 0, b""

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.size, self.tail = self.size + len(data), (self.tail + data)[-512:]
        return data

    def read_rest(self) -> None:
        while self.read(1 << 20):
            pass
