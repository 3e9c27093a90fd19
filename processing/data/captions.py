"""The `metadata.csv` of an image folder, filled in by hand, and the data set for the Hub that is made of such folders.

`run_photos.py` writes its lines. Captions are a person's work, so lines are only ever added: no byte of the file is
changed.
"""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from PIL import Image, UnidentifiedImageError

from .dataset_readers import CAPTION_COLUMNS
from .files import write_whole
from .images import MAX_IMAGE_PIXELS, load_image
from .records import read_records


SPLITS = ("train", "test")
METADATA = "metadata.csv"
# What PIL tells about a JPEG or PNG file besides its pixels, without a trace of person, place, time or camera.
HARMLESS = {"jfif", "jfif_version", "jfif_unit", "jfif_density", "dpi", "progressive", "progression", "interlace"}


@dataclass
class CaptionFile:
    """
    A `metadata.csv`.

    Attributes:
        path (`Path`): the file, which need not exist.
        columns (`list[str]`): of its header; empty if it does not exist.
        lines (`list[tuple[int, dict]]`): its records, each after the number of its last line.
    """

    path: Path
    columns: list[str] = field(default_factory=list)
    lines: list[tuple[int, dict[str, str]]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "CaptionFile":
        """
        Read a file, or make an empty one.

        Raises:
            ValueError: if it does not parse or lacks a column (file, line, remedy), or if there is a `metadata.jsonl`,
                which a `metadata.csv` would hide from the reader.
        """
        if not path.is_file():
            other = path.with_suffix(".jsonl")
            if other.is_file():
                raise ValueError(f"{other}: captions in JSON Lines can't be added to; convert it to {METADATA}")
            return cls(path)
        read_records(path)  # raises with file and line
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            lines = [(reader.line_num, record) for record in reader]
            columns = list(reader.fieldnames or [])
        if columns and ("file_name" not in columns or not set(CAPTION_COLUMNS) & set(columns)):
            raise ValueError(
                f"{path}: columns {columns}; needed are 'file_name' and 'text'. Save it as CSV with commas, in UTF-8"
            )
        return cls(path, columns, lines)

    @property
    def caption_column(self) -> str:
        """The column that holds the captions, as [`load_rows`] chooses it."""
        return next(name for name in CAPTION_COLUMNS if name in self.columns)

    @property
    def names(self) -> dict[str, str]:
        """The file names, each under its [`name_key`]."""
        return {name_key(record["file_name"]): record["file_name"] for _, record in self.lines}

    @property
    def empty(self) -> list[str]:
        """The lines without a caption, each with the name of its file."""
        return [
            f"{self.path}, line {number} ({record['file_name']})"
            for number, record in self.lines
            if not record[self.caption_column].strip()
        ]

    def append(self, names: Iterable[str], prompt: str | None = None) -> None:
        """
        Add lines without captions behind the content of the file.

        Args:
            names (`Iterable[str]`): file names.
            prompt (`str`, *optional*): the question in each new line.
        """
        if self.columns:
            content = self.path.read_bytes()
        else:
            self.columns = ["file_name", "text", *(["question"] if prompt else [])]
            content = f"\ufeff{','.join(self.columns)}\n".encode()  # Excel recognises UTF-8 by the first character
        end = "\r\n" if b"\r\n" in content else "\n"
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator=end)
        writer.writerows({"file_name": name, **({"question": prompt} if prompt else {})} for name in names)
        if not content.endswith((b"\n", b"\r")):
            content += end.encode()
        write_whole(self.path, content + text.getvalue().encode("utf-8"))


def read_captions(folder: Path, prompt: str | None = None) -> dict[str, CaptionFile]:
    """
    The `metadata.csv` of each split.

    Args:
        folder (`Path`): holds `train/` and `test/`.
        prompt (`str`, *optional*): the question that lines are to be added with.

    Raises:
        ValueError: as [`CaptionFile.read`], and if a file has no column for the prompt.
    """
    files = {split: CaptionFile.read(folder / split / METADATA) for split in SPLITS}
    for file in files.values():
        if prompt and file.columns and "question" not in file.columns:
            raise ValueError(
                f"prompt is {prompt!r}, but {file.path} has no column 'question'; add it, or leave it out"
            )
    return files


def name_key(name: str) -> str:
    """A file name without ending and in lower case: by it a photograph and the line of its copy are matched."""
    return Path(name).with_suffix("").as_posix().lower() if name else ""


def captioned_images(folder: Path, max_image_pixels: int = MAX_IMAGE_PIXELS) -> datasets.DatasetDict:
    """
    Images and captions as a data set with the columns `image`, `text` and, if a `metadata.csv` has it, `question`.

    Args:
        folder (`Path`): holds `train/metadata.csv`, `test/metadata.csv` or both.
        max_image_pixels (`int`, *optional*): larger images raise.

    Returns:
        `datasets.DatasetDict`: `train` and `test`, without one that has no image.

    Raises:
        ValueError: if a caption is empty, or an image is missing, broken, or holds EXIF data. All lines are named.
    """
    files = read_captions(folder)
    has_question = any("question" in file.columns for file in files.values())
    splits: dict[str, datasets.Dataset] = {}
    problems: list[str] = []
    for split, file in files.items():
        if not file.lines:
            continue
        images = [file.path.parent / record["file_name"] for _, record in file.lines]
        problems += [f"{line}: no caption" for line in file.empty]
        for image, (number, _) in zip(images, file.lines, strict=True):
            problems += _problems(image, f"{file.path}, line {number}", max_image_pixels)
        columns = {"image": [str(image) for image in images]}
        columns["text"] = [record[file.caption_column] for _, record in file.lines]
        if has_question:
            columns["question"] = [record.get("question", "") for _, record in file.lines]
        types = {name: datasets.Image() if name == "image" else datasets.Value("string") for name in columns}
        splits[split] = datasets.Dataset.from_dict(columns, datasets.Features(types))
    if problems:
        raise ValueError("not uploaded:\n" + "\n".join(f"  {problem}" for problem in problems))
    if not splits:
        raise ValueError(f"{str(folder)!r} holds no captioned images; give photos first, and fill in {METADATA}")
    return datasets.DatasetDict(splits)


def _problems(path: Path, source: str, max_image_pixels: int) -> list[str]:
    """The reason why an image can't be uploaded, if there is one."""
    try:
        load_image(path, source=source, max_image_pixels=max_image_pixels)
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            image.load()  # a PNG may hold EXIF data behind its pixels
            found = sorted(str(name) for name in image.info if name not in HARMLESS)
            found += ["exif"] if len(image.getexif()) and "exif" not in found else []
    except UnidentifiedImageError:
        return [f"{source}: {path.name} is not a JPEG or PNG file. Let run_photos.py copy it."]
    except ValueError as error:
        return [str(error)]
    remedy = "Let run_photos.py copy it, which leaves that out."
    return [f"{source}: {path.name} holds more than pixels: {', '.join(found)}. {remedy}"] if found else []
