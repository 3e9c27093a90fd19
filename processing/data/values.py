"""The values of records: what is a text, an image or a name, and what can't be read as one.

A value that is none of these would reach the model as Python writes it (`['a dog', 'a cat']`, `nan`), so it raises
[`UnusableValue`]. The readers add file and record, and the record becomes a bad sample.
"""

import json
import math
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets

from .rows import make_row, message


MAX_NAME_LENGTH = 1000  # characters of a file name; longer ones are embedded images
NO_FILE_NAME = "Give the name of an image file, relative to image_folder."


class UnusableValue(ValueError):
    """
    A value of a record that can't be read.

    Args:
        problem (`str`): the field and its value.
        remedy (`str`): how to solve it.
    """

    def __init__(self, problem: str, remedy: str):
        super().__init__(f"{problem} {remedy}".strip())


def problem_row(source: str, problem: Exception) -> dict:
    """
    The row of a record that can't be read. `check_row` raises the problem.

    Args:
        source (`str`): file and record.
        problem (`UnusableValue`): of the record.
    """
    part = {"type": "problem", "text": encodable(str(problem))}
    return make_row([], [[message("user", part)]], encodable(source))


def shown(value: Any) -> str:
    """A value for an error message, on one line and in at most 100 characters."""
    if isinstance(value, (str, bytes)):
        return encodable(repr(value[:60])) + "..." * (len(value) > 60)
    return encodable(reprlib.repr(value).replace("\n", " "))[:100]


def encodable(text: str) -> str:
    """A text with `?` for unpaired surrogates, which JSON can hold and UTF-8 can't."""
    return text.encode("utf-8", "replace").decode("utf-8")


def is_missing(value: Any) -> bool:
    """Whether a value is null: `None`, or NaN, which pandas writes instead."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def text_of(value: Any, name: str, plain: bool = False) -> str:
    """
    A value as a text; null is an empty text.

    Args:
        value (`Any`): of a record.
        name (`str`): its field, for the error.
        plain (`bool`, *optional*, defaults to `False`): whether all values of the column are numbers or all are
            booleans ([`plain_columns`]). They become texts as JSON writes them.

    Raises:
        UnusableValue: if it is no text.
    """
    if value is None or (plain and is_missing(value)):
        return ""
    if isinstance(value, str):
        return value
    if plain and isinstance(value, (bool, int, float)):
        return json.dumps(value)
    raise UnusableValue(f"{name} is {shown(value)}, not a text.", "Write it as one text in quotes.")


def name_of(value: Any, name: str) -> str | None:
    """
    A category, or `None`. It is never trained, so numbers and booleans are taken as JSON writes them.

    Raises:
        UnusableValue: if it is a list or an object.
    """
    if is_missing(value) or value == "":
        return None
    if isinstance(value, (str, bool, int, float)):
        return encodable(text_of(value, name, plain=True))
    raise UnusableValue(f"{name} is {shown(value)}, not a name.", "Write one name.")


def identifier(value: Any) -> str | None:
    """An id as a text, by which ids of different types that mean the same are equal; `None` if it is no id."""
    if isinstance(value, float) and value.is_integer():  # pandas' form of a column with missing ids
        value = int(value)
    return encodable(str(value)) if isinstance(value, (str, int)) and not isinstance(value, bool) else None


def record_name(name: str, index: int, identity: Any) -> str:
    """File and record for error messages: `data.json, record 3 (id 17)`."""
    if identity is None:
        return f"{name}, record {index}"
    text = encodable(identity) if isinstance(identity, str) and len(identity) <= 100 else shown(identity)
    return f"{name}, record {index} (id {text})"


class RecordNames:
    """
    Names the records of a file by their number and their `id`. Can be pickled.

    Args:
        name (`str`): the file.
    """

    def __init__(self, name: str):
        self.name = name

    def __call__(self, record: dict, index: int) -> str:
        return record_name(self.name, index, record.get("id"))


def image_references(value: Any, folder: str | Path | None, name: str = "image") -> list[dict]:
    """
    References `{"path": str | None, "bytes": bytes | None}` to the images of a record.

    Args:
        value (`Any`): a file name, the bytes of a file, `{"path", "bytes"}`, a list of these, or null for no image.
        folder (`str` or `Path`, *optional*): the directory that file names are relative to.
        name (`str`, *optional*): the field, for the error.

    Raises:
        UnusableValue: if it is anything else.
    """
    if value is None or value == "" or value == {"path": None, "bytes": None}:
        return []
    if not isinstance(value, list):
        return [image_reference(value, folder, name)]
    return [image_reference(item, folder, f"{name} {index}") for index, item in enumerate(value)]


def image_reference(item: Any, folder: str | Path | None, name: str) -> dict:
    """The reference of one image, see [`image_references`]."""
    if isinstance(item, dict):
        data, path = item.get("bytes"), next((item[key] for key in ("path", "url") if item.get(key)), None)
        if isinstance(data, bytes):
            return {"path": path if isinstance(path, str) and len(path) <= MAX_NAME_LENGTH else None, "bytes": data}
        item = path if path is not None and data is None else item
    if isinstance(item, bytes) and item:
        return {"path": None, "bytes": item}
    if not isinstance(item, str) or not item:
        raise UnusableValue(f"{name} is {shown(item)}, not a file name.", NO_FILE_NAME)
    if item.startswith("data:") or len(item) > MAX_NAME_LENGTH:
        raise UnusableValue(
            f"{name} is a text of {len(item):,} characters ({shown(item[:40])}), not a file name.",
            "Save the image as a file and give its name.",
        )
    if "\0" in item or encodable(item) != item:
        raise UnusableValue(f"{name} is {shown(item)}, which no file can be named.", NO_FILE_NAME)
    item = item.removeprefix("file://")
    return {"path": item if folder is None or "://" in item else str(Path(folder) / item), "bytes": None}


def plain_columns(records: Iterable[dict], columns: Iterable[str]) -> dict[str, Any]:
    """
    The columns of which all values, nulls aside, are numbers or all are booleans, each with its first value.

    Args:
        records (`Iterable[dict]`): all records of a file.
        columns (`Iterable[str]`): the columns of interest.
    """
    kinds: dict[str, set[type]] = {name: set() for name in columns}
    first: dict[str, Any] = {}
    for record in records:
        for name in kinds:
            value = record.get(name)
            for item in value if isinstance(value, list) else [value]:
                item = item.get("answer") if isinstance(item, dict) else item
                if not is_missing(item):
                    kinds[name].add(float if type(item) is int else type(item))
                    first.setdefault(name, item)
    return {name: first[name] for name, found in kinds.items() if found in ({float}, {bool})}


def plain_features(features: datasets.Features, columns: Iterable[str]) -> set[str]:
    """The columns of a data set whose type is a number or a boolean, or a list of them."""

    def kind(feature: Any) -> str:
        while isinstance(feature, datasets.List):
            feature = feature.feature
        if isinstance(feature, dict):
            feature = feature.get("answer")
        return getattr(feature, "dtype", "") if isinstance(feature, datasets.Value) else ""

    return {name for name in columns if kind(features.get(name)).startswith(("int", "uint", "float", "bool"))}
