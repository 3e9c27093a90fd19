"""`load_rows`: reads COCO captions, LLaVA-Instruct, an image folder or any `datasets` data set into rows.

Readers convert records and check almost nothing: a record without an image or an answer still becomes a row, so that
`check_rows` can list all such rows at once, with file and record. Readers raise only for what they can't read: a JSON
file that does not parse, a missing file, a missing column.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from .dataset_readers import CAPTION_COLUMNS, llava_row, read_dataset
from .records import column_names, parse_json, read_records
from .rows import caption_conversation, make_row, rows_to_dataset


FORMATS = ("coco_captions", "llava_instruct", "imagefolder", "dataset")
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
        max_rows (`int`, *optional*): read the first rows only.
        options: for `dataset`: `image_column`, `text_column`, `question_column`, `category_column`, and the options of
            `load_dataset`.

    Returns:
        `datasets.Dataset` or, with `streaming`, `datasets.IterableDataset`.

    Raises:
        FileNotFoundError, ValueError: if the source is missing, has an unknown format, or does not parse (file,
        line, column).
    """
    if format not in ("auto", *FORMATS):
        raise ValueError(f"format={format!r} must be 'auto' or one of {', '.join(FORMATS)}.")
    is_data_set = isinstance(source, (datasets.Dataset, datasets.IterableDataset))
    path = Path("data set" if is_data_set else source)
    content = None
    if format == "auto" and not is_data_set:
        format, content = _guess_format(path, split)
    if is_data_set or format == "dataset":
        return read_dataset(
            source if is_data_set else str(source),
            split=split,
            streaming=streaming,
            image_folder=image_folder,
            prompt=prompt,
            independent_turns=independent_turns,
            max_rows=max_rows,
            **options,
        )
    if options:
        raise ValueError(f"{', '.join(options)}: options of format='dataset'; format={format!r} does not take them.")
    if not path.exists():
        raise FileNotFoundError(f"source={str(source)!r} does not exist.")
    if format == "imagefolder":
        iterator = _read_image_folder(path, split, image_folder, prompt)
    else:
        content = parse_json(path) if content is None else content
        folder = path.parent if image_folder is None else Path(image_folder)
        if format == "coco_captions":
            iterator = _read_coco(content, path, folder, prompt)
        else:
            iterator = _read_llava(content, path, folder, independent_turns)
    rows = (
        rows_to_dataset(row for row, _ in zip(iterator, range(max_rows), strict=False))
        if max_rows is not None
        else rows_to_dataset(iterator)
    )
    if len(rows) == 0:
        raise ValueError(f"source={str(source)!r} (format={format!r}) holds no records.")
    return rows.to_iterable_dataset(num_shards=min(len(rows), 64)) if streaming else rows


def _guess_format(path: Path, split: str) -> tuple[str, Any]:
    """The format of a source, and its parsed content if detecting the format required reading it."""
    if path.is_dir():
        is_image_folder = any((folder / name).is_file() for folder in (path, path / split) for name in METADATA_FILES)
        return ("imagefolder" if is_image_folder else "dataset"), None
    if path.name.lower() in METADATA_FILES:
        return "imagefolder", None
    if path.suffix.lower() not in (".json", ".jsonl") or not path.is_file():
        return "dataset", None
    content = parse_json(path)
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


def _read_coco(content: Any, path: Path, folder: Path, prompt: str | None) -> Iterator[dict]:
    """One row for each image, one conversation for each caption. Images without captions are skipped."""
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise ValueError(f"{path}: COCO captions need an object with the lists 'images' and 'annotations'.")
    for field in ("images", "annotations"):
        for index, entry in enumerate(content.get(field, [])):
            if not isinstance(entry, dict):
                raise ValueError(f"{path}, {field} {index}: an object with named fields is needed, not {entry!r:.80}.")
    names = {image.get("id"): image.get("file_name") for image in content.get("images", [])}
    captions: dict[Any, list[str]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(annotation.get("image_id"), []).append(annotation.get("caption"))
    for index, (image_id, texts) in enumerate(captions.items()):
        name = names.get(image_id)
        images = [] if name is None else [_reference(folder, name)]
        chats = [caption_conversation(text, prompt) for text in texts]
        yield make_row(images, chats, f"{path.name}, image {index} (id {image_id})")


def _reference(folder: Path, name: str) -> dict:
    return {"path": str(folder / str(name)), "bytes": None}


# ---------------------------------------------------------------------- LLaVA-Instruct


def _read_llava(content: Any, path: Path, folder: Path, independent_turns: bool) -> Iterator[dict]:
    if not isinstance(content, list):
        raise ValueError(f"{path}: LLaVA-Instruct needs a list of records, not {type(content).__name__}.")
    for index, record in enumerate(content):
        source = f"{path.name}, record {index}"
        if not isinstance(record, dict):
            yield make_row([], [], f"{source} (not an object)")
            continue
        if "id" in record:
            source += f" (id {record['id']})"
        names = record.get("image") or record.get("images") or []
        images = [_reference(folder, name) for name in ([names] if isinstance(names, str) else names)]
        yield llava_row(record, images, source, independent_turns)


# ---------------------------------------------------------------------- image folder


def _read_image_folder(path: Path, split: str, image_folder: str | Path | None, prompt: str | None) -> Iterator[dict]:
    """Rows of `metadata.csv` or `.jsonl`: `file_name`, one of `CAPTION_COLUMNS`, and optionally `question`."""
    candidates = [path] if path.is_file() else [f / name for f in (path, path / split) for name in METADATA_FILES]
    metadata = next((candidate for candidate in candidates if candidate.is_file()), None)
    if metadata is None:
        raise FileNotFoundError(f"{path}: no {' or '.join(METADATA_FILES)} in it, nor in its subdirectory {split!r}.")
    folder = metadata.parent if image_folder is None else Path(image_folder)
    records = read_records(metadata)
    columns = column_names(records)
    caption_column = next((name for name in CAPTION_COLUMNS if name in columns), None)
    if records and ("file_name" not in columns or caption_column is None):
        raise ValueError(
            f"{metadata}: columns {columns}; needed are 'file_name' and one of {', '.join(CAPTION_COLUMNS)} "
            "('question' is optional)."
        )
    for index, record in enumerate(records):
        name = record.get("file_name")
        images = [_reference(folder, name)] if name else []
        chat = caption_conversation(record.get(caption_column), record.get("question") or prompt)
        category = record.get("category") or None
        yield make_row(images, [chat], f"{metadata.name}, record {index} ({name})", categories=[category])
