"""Opens data sets: WebDataset's tar files, parquet files, directories of `save_to_disk`, ids on the Hub.

Local files are checked before they are read, so that a file whose end was cut off is named.
"""

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

from .paths import names_local_path
from .records import RECORD_FILES


SHARDS = {".parquet": "parquet", ".tar": "webdataset"}
ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
# WebDataset names a column after the ending of the files, whose case `datasets` keeps.
IMAGE_ENDINGS = (*ENDINGS, *(ending.upper() for ending in ENDINGS))
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
    """A data set on the Hub, or a directory of files."""
    try:
        return datasets.load_dataset(source, split=split, streaming=streaming, **load_options)
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{source} can't be read: {error.__cause__ or error}") from error
    except ValueError as error:
        if "split" not in str(error):
            raise
        raise ValueError(f"{source}: {error} Set train_split or eval_split to one of them.") from error


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


def check_whole(file: str, kind: str) -> None:
    """Raise if the end of a shard was cut off."""
    try:
        if kind == "parquet":
            pa.parquet.read_metadata(file)
        else:
            _check_tar(file)
    except (pa.ArrowException, OSError, tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{file} is not a whole {kind} file ({error}). Was it copied to its end? Copy or write it again."
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


def _load_tar_files(files: list[str], streaming: bool) -> Any:
    """
    The samples of WebDataset's archives, with the columns of `TAR_FEATURES`.

    The contents of texts and `.json` files stay texts. `datasets` would give their fields the types of the first
    sample, so that one odd sample raises for all, or loses the images of later ones.
    """
    if streaming:
        return datasets.IterableDataset.from_generator(
            _tar_samples, features=TAR_FEATURES, gen_kwargs={"files": files}
        )
    # in the cache of `datasets`, under a name that depends on the arguments; an archive that changed is read again
    stamps = tuple((os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files)
    return datasets.Dataset.from_generator(
        _tar_samples, features=TAR_FEATURES, gen_kwargs={"files": files, "stamps": stamps}
    )


def _tar_samples(files: list[str], stamps: tuple = ()) -> Iterator[dict]:
    """The samples of archives: neighbouring files whose names are the same up to the first dot."""
    for file in files:
        with tarfile.open(file, "r:") as archive:
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
                yield {"__key__": key, "__url__": file, "images": images, "texts": json.dumps(texts)}
