"""Opens data sets: WebDataset's tar files, parquet files, directories of `save_to_disk`, ids on the Hub.

Local files are checked before they are read, so that a file whose end was cut off is named.
"""

import glob
import itertools
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
from datasets import Features, Image, Value

from .paths import names_local_path
from .records import RECORD_FILES


SHARDS = {".parquet": "parquet", ".tar": "webdataset"}
ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
# WebDataset names a column after the ending of the files, whose case `datasets` keeps.
IMAGE_ENDINGS = (*ENDINGS, *(ending.upper() for ending in ENDINGS))
TEXT_ENDINGS = ("txt", "text", "transcript")
# Samples of the first archive from which the fields of the `.json` files are taken
INFERRED_SAMPLES = 100


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
        return datasets.load_dataset(source, split=split, streaming=streaming, **load_options)
    # a path that exists is that file, whatever characters it has
    pattern = glob.escape(source) if path.exists() else source
    files = sorted(glob.glob(pattern))
    for file in files:
        _check_whole(file, shards)
    if shards == "parquet" and path.is_file() and not streaming:
        return datasets.Dataset(read_parquet(path))  # `load_dataset` would write a cache
    features = _tar_features(files[0]) if shards == "webdataset" else None
    try:
        data = datasets.load_dataset(shards, data_files=pattern, split="train", streaming=streaming, features=features)
    except (datasets.exceptions.DatasetsError, pa.ArrowException, ValueError, TypeError, OSError) as error:
        raise ValueError(f"{source} can't be read: {error.__cause__ or error}") from error
    return data


def read_parquet(path: Path) -> pa.Table:
    """
    A parquet file as a table, not copied into memory.

    Raises:
        ValueError: if it is not a whole parquet file.
    """
    _check_whole(str(path), "parquet")
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


def _check_whole(file: str, kind: str) -> None:
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


def _tar_features(file: str) -> Features:
    """
    The columns of WebDataset's archives: all endings of images, and the texts and `.json` fields of the first samples.

    `datasets` takes the endings of the first sample for all of them, so that an archive with `.jpg` and `.png` files
    raises, or loses the images of later samples.
    """
    columns: dict[str, Any] = {"__key__": Value("string"), "__url__": Value("string")}
    columns |= {ending: Image() for ending in IMAGE_ENDINGS}
    tables = []
    for name, content in itertools.islice(_tar_files(file), 3 * INFERRED_SAMPLES):
        ending = name.split(".", 1)[-1]
        if ending.lower() in TEXT_ENDINGS:
            columns[ending] = Value("string")
        elif ending == "json":
            try:
                tables.append(pa.Table.from_pylist([{"json": json.loads(content)}]))
            except (ValueError, pa.ArrowException) as error:
                raise ValueError(f"{file}, {name} can't be read: {error}.") from error
    if tables:
        try:
            schema = pa.concat_tables(tables, promote_options="permissive").schema
        except pa.ArrowException as error:
            remedy = "Give each field one type in all of them, or write the records as one .jsonl file."
            raise ValueError(
                f"{file}: its .json files differ in the types of their fields: {error}. {remedy}"
            ) from error
        columns |= Features.from_arrow_schema(schema)
    return Features(columns)


def _tar_files(file: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files of an archive; images are not read."""
    with tarfile.open(file, "r:") as archive:
        for member in archive:
            name = Path(member.name).name
            stream = archive.extractfile(member) if member.isfile() else None
            if stream is not None:
                yield name, b"" if name.split(".", 1)[-1] in IMAGE_ENDINGS else stream.read()
