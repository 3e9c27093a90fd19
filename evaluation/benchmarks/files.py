"""What the readers of official benchmark files share: the files of a run, checked fields, one question."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jnana.processing.data.records import parse_json


@dataclass(frozen=True)
class BenchmarkFiles:
    """The official files of one benchmark, as the arguments of run_evaluate name them.

    Attributes:
        questions (`Path`): `questions_file`; a directory where the benchmark has several files.
        annotations (`Path`, *optional*): `annotations_file`.
        ocr (`Path`, *optional*): `ocr_file`.
        images (`Path`): `image_folder`; the directory of the questions where it is not given.
        split (`str`, *optional*): `eval_split`, or the benchmark's own default.
    """

    questions: Path
    annotations: Path | None
    ocr: Path | None
    images: Path
    split: str | None


@dataclass
class Item:
    """One question of a benchmark.

    Attributes:
        source (`str`): File and record, for messages.
        question_id (`int` or `str`): As in the file, and in the file for the benchmark's server.
        image (`Path`): The image file.
        fields (`dict[str, str]`): What the benchmark's prompt is filled with.
        references (`list[str]`): Accepted answers; empty where the files hold none.
        category (`str`, *optional*): Question type, or the split of a benchmark that is reported by split.
        details (`dict`): What else the scores and the server's file need; a record of an answer holds it too.
    """

    source: str
    question_id: int | str
    image: Path
    fields: dict[str, str]
    references: list[str]
    category: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


def read_object(path: Path, option: str, expected: str) -> dict[str, Any]:
    """A JSON file that holds an object.

    Args:
        path (`Path`): The file.
        option (`str`): The argument that names it, for messages.
        expected (`str`): The official file that the argument takes.

    Raises:
        FileNotFoundError, ValueError: if it is missing, is a directory, is not JSON (line and column), or holds no
            object.
    """
    check_no_directory(path, option, expected)
    content = parse_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {_kind(content)}, not an object; {option} takes {expected}")
    return content


def check_no_directory(path: Path, option: str, expected: str) -> None:
    """Raise a ValueError that says what the option takes, if it was given a directory."""
    if path.is_dir():
        raise ValueError(f"{option} {str(path)!r} is a directory; {option} takes the file {expected}")


def read_list(path: Path, name: str, option: str, expected: str) -> list[Any]:
    """A list in the object of a JSON file; arguments and errors as [`read_object`], `name` is its key."""
    return list_in(read_object(path, option, expected), name, path, option, expected)


def list_in(content: dict[str, Any], name: str, path: Path, option: str, expected: str) -> list[Any]:
    """A list in the content of a file that was read; as [`read_list`]."""
    records = content.get(name)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} has no records under {name!r}; {option} takes {expected}")
    return records


def value_of(record: Any, name: str, kinds: type | tuple[type, ...], source: str, may_be_empty: bool = False) -> Any:
    """A field of a record.

    Args:
        record (`Any`): An object of an official file.
        name (`str`): The field.
        kinds (`type` or `tuple[type, ...]`): What it must be.
        source (`str`): File and record, for messages.
        may_be_empty (`bool`): Whether a text may be empty.

    Raises:
        ValueError: if the record is no object, or the field is missing, empty or of another kind.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{source}: an object with named fields is needed, not {_kind(record)}")
    if name not in record:
        raise ValueError(f"{source}: the field {name!r} is missing; the record has {', '.join(record) or 'no fields'}")
    value = record[name]
    if not isinstance(value, kinds) or isinstance(value, bool):
        expected = " or ".join(KINDS[kind] for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise ValueError(f"{source}: the field {name!r} is {value!r:.60}; it must be {expected}")
    if isinstance(value, str) and not value.strip() and not may_be_empty:
        raise ValueError(f"{source}: the field {name!r} is empty")
    return value


def texts_of(record: Any, name: str, source: str) -> list[str]:
    """A field of a record that is a list of texts; errors as [`value_of`]."""
    texts = value_of(record, name, list, source)
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{source}: {name}[{position}] is {text!r:.60}; it must be a text")
    return texts


def check_unique(ids: Sequence[int | str], path: Path) -> None:
    """Raise a ValueError that names the first id which two records of a file share."""
    seen: set[int | str] = set()
    for question_id in ids:
        if question_id in seen:
            raise ValueError(f"{path}: two records have the id {question_id!r}; each question needs its own")
        seen.add(question_id)


def check_answered(missing: Sequence[int | str], total: int, path: Path) -> None:
    """Raise a ValueError that counts the questions without annotations and names the first."""
    if missing:
        raise ValueError(
            f"{path} has no answers to {len(missing)} of {total} questions (first: question {missing[0]}); give the "
            "annotations of the same split"
        )


def check_images(items: Iterable[Item], option: str = "image_folder") -> None:
    """Check that the image files exist.

    Raises:
        FileNotFoundError: that counts the missing files and names the first.
    """
    wanted = {item.image: item.source for item in items}
    missing = [image for image in wanted if not image.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(wanted)} images do not exist (first: {missing[0]}, of {wanted[missing[0]]}); "
            f"give the directory of the benchmark's images as {option}"
        )


def coco_image(folder: Path, subset: str, image_id: int) -> Path:
    """The file of a COCO image: `COCO_val2014_000000000042.jpg`, or `000000000042.jpg` as COCO names it since 2017."""
    official = folder / f"COCO_{subset}_{image_id:012d}.jpg"
    short = folder / f"{image_id:012d}.jpg"
    return short if short.is_file() and not official.is_file() else official


KINDS: dict[type, str] = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}


def _kind(value: Any) -> str:
    return KINDS.get(type(value), f"{value!r:.40}")
