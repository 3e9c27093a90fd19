"""`load_rows`: reads COCO captions, LLaVA-Instruct, an image folder or any `datasets` data set into rows.

Readers convert records and check almost nothing: a record without an image or an answer still becomes a row, so that
`check_rows` can list all such rows at once, with file and record. Readers raise only for what they can't read: a JSON
file that does not parse, a missing file, a missing column.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets

from .dataset_readers import CAPTION_COLUMNS, CHAT_COLUMNS, ReadOptions, read_dataset, rows_of_records
from .line_streams import first_records, stream_lines
from .records import column_names, parse_json, read_records
from .rows import RecordRows, caption_conversation, make_row, rows_to_dataset
from .values import RecordNames, UnusableValue, identifier, image_references, problem_row, record_name, shown, text_of


FORMATS = ("coco_captions", "llava_instruct", "imagefolder", "dataset")
COLUMN_OPTIONS = ("image_column", "text_column", "question_column", "category_column")
METADATA_FILES = ("metadata.csv", "metadata.jsonl")


def load_rows(
    source: str | Path | datasets.Dataset | datasets.IterableDataset,
    *,
    format: str = "auto",
    image_folder: str | Path | None = None,
    split: str = "train",
    streaming: bool = False,
    independent_turns: bool = True,
    prompt: str | None = None,
    captions: bool = False,
    max_rows: int | None = None,
    **options: Any,
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Read a data set into rows of one shape (`ROW_FEATURES`). Images stay references; nothing is decoded.

    Args:
        source (`str`, `Path`, `Dataset` or `IterableDataset`):
            a COCO captions or LLaVA-Instruct file (`.json`, the latter also `.jsonl`), a directory with `metadata.csv`
            or `metadata.jsonl`, a directory written by `save_to_disk`, a `.parquet`, `.jsonl` or `.csv` file, a Hub
            id, or a data set.
        format (`str`, *optional*, defaults to `"auto"`): `coco_captions`, `llava_instruct`, `imagefolder`, `dataset`,
            or `auto`: detected from the file.
        image_folder (`str` or `Path`, *optional*): the directory that image file names are relative to; by default the
            directory of the file that holds the records.
        split (`str`, *optional*, defaults to `"train"`): the split of a Hub data set, or the subdirectory of an image
            folder.
        streaming (`bool`, *optional*, defaults to `False`): return an `IterableDataset`; Hub data is then not
            downloaded as a whole.
        independent_turns (`bool`, *optional*, defaults to `True`):
            LLaVA-Instruct: each question with its answer is a conversation (as jnana and visualize_this train), else
            all turns are one conversation (as LLaVA does).
        prompt (`str`, *optional*): the question for captions that have none ("What do you see in this picture?").
        captions (`bool`, *optional*, defaults to `False`): a conversation of answers without a question is a caption
            of its images, as run_align trains it. Otherwise `check_rows` raises for it.
        max_rows (`int`, *optional*): read the first rows only.
        options: for `dataset`: `image_column`, `text_column`, `question_column`, `category_column`, and the options of
            `load_dataset`.

    Returns:
        `datasets.Dataset` or, with `streaming`, `datasets.IterableDataset`.

    Raises:
        FileNotFoundError, ValueError: if the source is missing, has an unknown format, or does not parse (file,
        line, column).
    """
    rows = read_rows(
        source,
        format=format,
        image_folder=image_folder,
        split=split,
        streaming=streaming,
        independent_turns=independent_turns,
        prompt=prompt,
        captions=captions,
        max_rows=max_rows,
        **options,
    )
    if not isinstance(rows, RecordRows):
        return rows
    rows = rows_to_dataset(rows)
    return rows.to_iterable_dataset(num_shards=min(len(rows), 64)) if streaming else rows


def read_rows(
    source: str | Path | datasets.Dataset | datasets.IterableDataset,
    *,
    format: str = "auto",
    image_folder: str | Path | None = None,
    split: str = "train",
    streaming: bool = False,
    independent_turns: bool = True,
    prompt: str | None = None,
    captions: bool = False,
    max_rows: int | None = None,
    **options: Any,
) -> RecordRows | datasets.Dataset | datasets.IterableDataset:
    """As [`load_rows`], but the rows of a file of records one by one, without an Arrow table of all of them."""
    if format not in ("auto", *FORMATS):
        raise ValueError(f"format={format!r} must be 'auto' or one of {', '.join(FORMATS)}.")
    is_data_set = isinstance(source, (datasets.Dataset, datasets.IterableDataset))
    path = Path("data set" if is_data_set else source)
    content = None
    streamed = streaming and not is_data_set and _is_lines(path, format)
    if format == "auto" and not is_data_set:
        format, content = _guess_format(path, split, first_records(path) if streamed else None)
    if streamed:
        reading = ReadOptions(image_folder or path.parent, prompt, independent_turns, captions)
        return _stream(path, str(source), format, reading, max_rows, options)
    if is_data_set or format == "dataset":
        return read_dataset(
            source if is_data_set else str(source),
            split=split,
            streaming=streaming,
            image_folder=image_folder,
            prompt=prompt,
            independent_turns=independent_turns,
            captions=captions,
            max_rows=max_rows,
            **options,
        )
    if options:
        raise ValueError(f"{', '.join(options)}: options of format='dataset'; format={format!r} does not take them.")
    if not path.exists():
        raise FileNotFoundError(f"source={str(source)!r} does not exist.")
    if format == "coco_captions":
        content = parse_json(path) if content is None else content
        folder = path.parent if image_folder is None else Path(image_folder)
        number, iterator = _read_coco(content, path, folder, prompt)
        number = number if max_rows is None else min(number, max_rows)
        rows = RecordRows(number, itertools.islice(iterator, max_rows))
    else:
        reading = ReadOptions(image_folder, prompt, independent_turns, captions)
        read = _read_image_folder if format == "imagefolder" else _read_llava
        rows = read(path, split if format == "imagefolder" else content, reading, max_rows)
    if len(rows) == 0:
        raise ValueError(f"source={str(source)!r} (format={format!r}) holds no records.")
    return rows


def _is_lines(path: Path, format: str) -> bool:
    """Whether a source is a JSON Lines file whose records are read one by one."""
    lines = path.suffix.lower() == ".jsonl" and path.name.lower() not in METADATA_FILES and path.is_file()
    return lines and format in ("auto", "llava_instruct", "dataset")


def _stream(
    path: Path, name: str, format: str, reading: ReadOptions, max_rows: int | None, options: dict[str, Any]
) -> datasets.IterableDataset:
    """The rows of a JSON Lines file as a stream; `options` are the columns that [`load_rows`] takes for `dataset`."""
    if format == "llava_instruct" and options:
        raise ValueError(f"{', '.join(options)}: options of format='dataset'; format={format!r} does not take them.")
    other = [option for option in options if option not in COLUMN_OPTIONS]
    if other:
        raise ValueError(f"{', '.join(other)}: not an option of a local file ({name}).")
    source_of = RecordNames(path.name) if format == "llava_instruct" else None
    return stream_lines(path, name, replace(reading, **options), max_rows, source_of)


def _guess_format(path: Path, split: str, first: list[Any] | None = None) -> tuple[str, Any]:
    """
    The format of a source, and its parsed content if detecting the format required reading it.

    Args:
        path (`Path`): the source.
        split (`str`): of an image folder.
        first (`list`, *optional*): the first records, if the source is streamed.
    """
    if path.is_dir():
        is_image_folder = any((folder / name).is_file() for folder in (path, path / split) for name in METADATA_FILES)
        return ("imagefolder" if is_image_folder else "dataset"), None
    if path.name.lower() in METADATA_FILES:
        return "imagefolder", None
    if path.suffix.lower() not in (".json", ".jsonl") or not path.is_file():
        return "dataset", None
    content = parse_json(path) if first is None else first
    if isinstance(content, dict) and "annotations" in content and "images" in content:
        return "coco_captions", content
    if isinstance(content, list) and any(
        isinstance(record, dict) and "conversations" in record for record in content[:100]
    ):
        return "llava_instruct", content
    if isinstance(content, list) and all(isinstance(record, dict) for record in content[:100]):
        return "dataset", None
    raise ValueError(
        f"{path}: neither COCO captions ('images' and 'annotations') nor LLaVA-Instruct (a list of records with "
        "'conversations'). Set its format."
    )


# ---------------------------------------------------------------------- COCO captions


def _read_coco(content: Any, path: Path, folder: Path, prompt: str | None) -> tuple[int, Iterator[dict]]:
    """
    One row for each image, one conversation for each caption. Images without captions are skipped.

    Returns:
        `tuple[int, Iterator[dict]]`: the number of rows, and the rows.
    """
    lists = isinstance(content, dict) and [content.get("images", []), content.get("annotations")]
    if not lists or not all(isinstance(entries, list) for entries in lists):
        raise ValueError(f"{path}: COCO captions need an object with the lists 'images' and 'annotations'.")
    for field in ("images", "annotations"):
        for index, entry in enumerate(content.get(field, [])):
            if not isinstance(entry, dict):
                raise ValueError(f"{path}, {field} {index}: an object with named fields is needed, not {entry!r:.80}.")
    names = _coco_names(content.get("images", []), path)
    captions: dict[str | None, list[Any]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(identifier(annotation.get("image_id")), []).append(annotation)
    return len(captions), _coco_rows(captions, names, path, folder, prompt)


def _coco_rows(
    captions: dict[str | None, list[Any]], names: dict[str | None, Any], path: Path, folder: Path, prompt: str | None
) -> Iterator[dict]:
    """The rows of images, from their annotations and file names by their ids."""
    for index, (image_id, annotations) in enumerate(captions.items()):
        source = f"{path.name}, image {index} (id {image_id})"
        try:
            if image_id not in names:
                given = shown(annotations[0].get("image_id"))
                raise UnusableValue(
                    f"image_id {given} is the id of no image in 'images'.", "Add it, or correct the id."
                )
            images = image_references(names[image_id], folder, "file_name")
            texts = [text_of(annotation.get("caption"), "a caption") for annotation in annotations]
        except UnusableValue as problem:
            yield problem_row(source, problem)
            continue
        yield make_row(images, [caption_conversation(text, prompt) for text in texts], source)


def _coco_names(images: list[dict], path: Path) -> dict[str | None, Any]:
    """The file name of each image, by its id as a text. An id that two images have would put captions on a wrong one.

    Raises:
        ValueError: if two images have one id.
    """
    names: dict[str | None, Any] = {}
    for index, image in enumerate(images):
        image_id = identifier(image.get("id"))
        if image_id is None:
            continue  # no annotation can name it
        if image_id in names:
            raise ValueError(
                f"{path}, images {index}: id {image_id} is that of {shown(names[image_id])} and of "
                f"{shown(image.get('file_name'))}. Give each image an id of its own."
            )
        names[image_id] = image.get("file_name")
    return names


# ---------------------------------------------------------------------- LLaVA-Instruct


def _read_llava(path: Path, content: Any, options: ReadOptions, max_rows: int | None) -> RecordRows:
    content = parse_json(path) if content is None else content
    if not isinstance(content, list):
        raise ValueError(f"{path}: LLaVA-Instruct needs a list of records, not {type(content).__name__}.")
    if not content:
        raise ValueError(f"{path} holds no records.")
    options.image_folder = path.parent if options.image_folder is None else options.image_folder
    return rows_of_records(content[:max_rows], str(path), options, RecordNames(path.name))


# ---------------------------------------------------------------------- image folder


def _read_image_folder(path: Path, split: str, options: ReadOptions, max_rows: int | None) -> RecordRows:
    """
    Rows of `metadata.csv` or `.jsonl`: `file_name`, and one of `CAPTION_COLUMNS` with an optional `question`, or
    `conversations` or `messages`.
    """
    candidates = [path] if path.is_file() else [f / name for f in (path, path / split) for name in METADATA_FILES]
    metadata = next((candidate for candidate in candidates if candidate.is_file()), None)
    if metadata is None:
        raise FileNotFoundError(f"{path}: no {' or '.join(METADATA_FILES)} in it, nor in its subdirectory {split!r}.")
    options.image_folder = metadata.parent if options.image_folder is None else options.image_folder
    records = read_records(metadata, keep_others=True)[:max_rows]
    columns = column_names([record for record in records if isinstance(record, dict)])
    has_chats = bool(set(CHAT_COLUMNS) & set(columns))
    if records and not has_chats and ("file_name" not in columns or not set(CAPTION_COLUMNS) & set(columns)):
        raise ValueError(
            f"{metadata}: columns {columns}; needed are 'file_name' and one of {', '.join(CAPTION_COLUMNS)} "
            "('question' is optional), or 'conversations' or 'messages'."
        )
    if not records:
        raise ValueError(f"{metadata} holds no records.")

    def source_of(record: dict, index: int) -> str:
        return f"{record_name(metadata.name, index, None)} ({str(record.get('file_name')):.200})"

    return rows_of_records(records, str(metadata), options, source_of)
