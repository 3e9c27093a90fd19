"""Makes an image folder of one's own photographs: finds them, splits them, and writes copies that hold pixels only.

folder/train/metadata.csv       file_name,text: one line for each photograph (captions.py)
folder/train/IMG_1_heic.jpg     upright, RGB, without EXIF data
folder/test/...                 the same for the test photographs
"""

import io
import json
import logging
import os
import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image
from tqdm.auto import tqdm

from .captions import SPLITS, CaptionFile, name_key, read_captions
from .files import digest_of, write_whole
from .images import MAX_IMAGE_PIXELS, check_image, load_image


logger = logging.getLogger(__name__)

PHOTO_ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".heic", ".heif", ".hif", ".avif", ".png", ".webp", ".tif")
PHOTO_RECORD = "photos.json"  # SHA-256 of the photograph of each copy
PHOTO_ENDINGS += (".tiff", ".bmp", ".gif", ".ppm", ".pgm")


@dataclass
class Photo:
    """
    A photograph of the folder that is read.

    Attributes:
        path (`Path`): the file.
        name (`str`): its path in the folder, with `/`.
        stem (`str`): the path of its copy below the split's directory, without ending.
        split (`str`, *optional*): `train` or `test`, once it is known.
    """

    path: Path
    name: str
    stem: str
    split: str | None = None

    @property
    def key(self) -> str:
        """As [`name_key`] of its copy."""
        return self.stem.lower()


# ---------------------------------------------------------------------- finding


def find_photos(folder: Path, exclude: Path, test_files: Path | None = None) -> tuple[list[Photo], Counter[str]]:
    """
    The photographs in a folder and its subfolders, without hidden ones.

    Those below a subfolder `train` or `test` are of that split. With a list of test files all others are for training.

    Args:
        folder (`Path`): the folder.
        exclude (`Path`): a directory that is not searched: that of the copies.
        test_files (`Path`, *optional*): a text file that names one test photograph a line, by its path in `folder`.

    Returns:
        `tuple[list[Photo], Counter]`: the photographs, sorted by name; the number of other files by their ending.

    Raises:
        ValueError: if two copies would have one name, a listed photograph does not exist, or there is none at all.
    """
    photos: list[Photo] = []
    others: Counter[str] = Counter()
    for directory, subfolders, files in os.walk(folder):
        subfolders[:] = [
            name for name in subfolders if name[0] != "." and Path(directory, name).resolve() != exclude.resolve()
        ]
        for path in (Path(directory, name) for name in files if name[0] != "."):
            if path.suffix.lower() in PHOTO_ENDINGS:
                photos.append(_photo(path, path.relative_to(folder).as_posix()))
            else:
                others[path.suffix.lower() or path.name] += 1
    if not photos:
        raise ValueError(f"photos {str(folder)!r} holds no photograph; endings read: {' '.join(PHOTO_ENDINGS)}")
    photos.sort(key=lambda photo: photo.name)
    if test_files is not None:
        _choose_by_list(photos, test_files)
    copies = defaultdict(list)
    for photo in photos:
        for split in SPLITS if photo.split is None else (photo.split,):
            copies[split, photo.key].append(photo.name)
    same = {" and ".join(names) for names in copies.values() if len(names) > 1}
    if same:
        raise ValueError(f"copies of {'; of '.join(sorted(same))} would have one name; rename one of the photographs")
    return photos, others


def _photo(path: Path, name: str) -> Photo:
    first, _, rest = name.partition("/")
    split = first.lower() if rest and first.lower() in SPLITS else None
    copy = Path(name if split is None else rest)
    ending = copy.suffix.lower()[1:]
    # with the ending, because phones put an edited IMG_1.JPG beside IMG_1.HEIC
    return Photo(path, name, copy.with_suffix("").as_posix() + ("" if ending == "jpg" else f"_{ending}"), split)


def _choose_by_list(photos: list[Photo], test_files: Path) -> None:
    names = {photo.name for photo in photos}
    lines = test_files.read_text(encoding="utf-8-sig").splitlines()
    listed = {line.strip().replace("\\", "/"): number for number, line in enumerate(lines, 1) if line.strip()}
    for name, number in listed.items():
        if name not in names:
            raise ValueError(f"{test_files}, line {number}: {name!r} is not among the {len(photos)} photographs")
    pictures = {name_key(name) for name in listed}  # IMG_1.JPG beside a listed IMG_1.HEIC shows the same
    for photo in photos:
        photo.split = "test" if name_key(photo.name) in pictures else photo.split or "train"


def check_photos(
    photos: list[Photo], captions: dict[str, CaptionFile], max_image_pixels: int = MAX_IMAGE_PIXELS
) -> tuple[list[Photo], list[str]]:
    """
    The photographs that can be used, and a reason for each other one: not readable by its header, or a second copy of
    a file, which could get into both splits.

    Args:
        photos (`list[Photo]`): from [`find_photos`].
        captions (`dict[str, CaptionFile]`): of each split. Of two copies the one with a line is used.
        max_image_pixels (`int`, *optional*): larger photographs can't be used.

    Raises:
        ImportError: if one is an HEIC file and pillow-heif is not installed.
    """
    known = {key for file in captions.values() for key in file.names}
    good, problems = [], []
    sizes = {photo.name: photo.path.stat().st_size for photo in photos}
    frequent = {size for size, count in Counter(sizes.values()).items() if count > 1}  # other files have no copy
    contents: dict[bytes, str] = {}
    for photo in sorted(photos, key=lambda photo: (photo.key not in known, len(photo.name), photo.name)):
        try:
            check_image(photo.path, source=photo.name, max_image_pixels=max_image_pixels)
        except ValueError as error:
            problems.append(str(error))
            continue
        if sizes[photo.name] in frequent:
            first = contents.setdefault(digest_of(photo.path), photo.name)
            if first != photo.name:
                problems.append(f"{photo.name}: the same file as {first}.")
                continue
        good.append(photo)
    return sorted(good, key=lambda photo: photo.name), problems


# ---------------------------------------------------------------------- splitting


def assign_splits(photos: list[Photo], captions: dict[str, CaptionFile], test_share: float | None, seed: int) -> None:
    """
    Set the split of each photograph.

    A photograph stays in the split whose `metadata.csv` names it. Of the others that were not chosen by hand, as many
    are drawn for testing as `test_share` of all photographs lacks. Photographs of one name, such as `IMG_1.HEIC` and
    the `IMG_1.JPG` made of it, go together.

    Args:
        photos (`list[Photo]`): from [`find_photos`].
        captions (`dict[str, CaptionFile]`): of each split.
        test_share (`float`, *optional*): share of the test photographs, at least one; by default 0.1, or 0 if some
            were chosen by hand.
        seed (`int`): of the draw.

    Raises:
        ValueError: if a photograph was chosen by hand for one split and has a line in the other.
    """
    chosen = {(photo.split, photo.key) for photo in photos if photo.split is not None}
    moved = []
    for photo in photos:
        line_in = [split for split in SPLITS if photo.key in captions[split].names]
        if not line_in or photo.split in line_in:
            continue
        if photo.split is None:
            photo.split = line_in[0]
        elif (line_in[0], photo.key) not in chosen:  # else the line is that of another photograph of this name
            moved.append(f"{photo.name} is chosen for {photo.split} and has a line in {captions[line_in[0]].path}")
    if moved:
        raise ValueError(f"{'; '.join(moved)}. Move its copy and its line too, so that the caption is kept")
    pictures: dict[str, list[Photo]] = defaultdict(list)
    for photo in photos:
        # IMG_1.HEIC and IMG_1.JPG show the same, also if one of them lies in a split's folder
        first, _, rest = photo.name.partition("/")
        pictures[name_key(rest if rest and first.lower() in SPLITS else photo.name)].append(photo)
    share = (0.0 if chosen else 0.1) if test_share is None else test_share
    lacking = max(round(share * len(photos)), 1) if share > 0 and len(pictures) > 1 else 0
    lacking -= sum(photo.split == "test" for photo in photos)
    for key in random.Random(seed).sample(sorted(pictures), len(pictures)):
        new = [photo for photo in pictures[key] if photo.split is None]
        given = [photo.split for photo in pictures[key] if photo.split is not None]
        split = given[0] if given else "test" if lacking > 0 else "train"
        for photo in new:
            photo.split = split
        lacking -= len(new) if split == "test" else 0


# ---------------------------------------------------------------------- copies


def write_copies(
    photos: list[Photo],
    captions: dict[str, CaptionFile],
    *,
    image_format: Literal["jpeg", "png"] = "jpeg",
    max_size: int | None = None,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    overwrite: bool = False,
) -> tuple[dict[str, list[str]], list[str]]:
    """
    Write a copy of each photograph that has no copy yet, with a progress bar. A digest of each photograph is kept in
    `photos.json`, so that another photograph of the same name is noticed.

    Args:
        photos (`list[Photo]`): with their splits.
        captions (`dict[str, CaptionFile]`): of each split; the copies go beside them.
        image_format (`str`, *optional*, defaults to `"jpeg"`): `jpeg` (of quality 95) or `png`. A copy with a line
            keeps the format that its name says.
        max_size (`int`, *optional*): length of the longer side in pixels at most; smaller images keep their size.
        max_image_pixels (`int`, *optional*): larger photographs are not decoded.
        overwrite (`bool`, *optional*, defaults to `False`): write all copies again.

    Returns:
        `tuple[dict[str, list[str]], list[str]]`: names of copies that have no line yet, for each split; a reason for
        each photograph that can't be read, or that has the name of another one with a copy.
    """
    new: dict[str, list[str]] = {split: [] for split in SPLITS}
    problems = []
    record = captions["train"].path.parents[1] / PHOTO_RECORD
    digests = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    for photo in tqdm(photos, desc="Photographs", unit="photo"):
        file = captions[photo.split or "train"]
        known = file.names.get(photo.key)
        name = known or photo.stem + (".png" if image_format == "png" else ".jpg")
        copy = file.path.parent / name
        entry, digest = f"{photo.split or 'train'}/{name}", digest_of(photo.path)
        has_copy = bool(known) and copy.is_file()
        if has_copy and digests.setdefault(entry, digest) != digest:
            if not overwrite:
                problems.append(
                    f"{photo.name}: {copy} is the copy of another photograph of this name. Rename the new one, or, if "
                    "it is the old one edited, write all copies again (overwrite_images)."
                )
                continue
            logger.warning(f"{copy}: the photograph has changed; check its caption")
        if has_copy and not overwrite:
            continue
        try:
            _write_copy(photo, copy, max_size, max_image_pixels)
        except ValueError as error:
            problems.append(str(error))
            continue
        digests[entry] = digest
        if not known:
            new[photo.split or "train"].append(name)
    write_whole(record, json.dumps(digests, indent=0, sort_keys=True).encode())
    return new, problems


def _write_copy(photo: Photo, copy: Path, max_size: int | None, max_image_pixels: int) -> None:
    """An upright RGB copy that holds pixels only: no EXIF data, no comment, no colour profile."""
    image = load_image(photo.path, source=photo.name, max_image_pixels=max_image_pixels)
    if max_size is not None:
        image.thumbnail((max_size, max_size), Image.Resampling.LANCZOS)
    plain = Image.new("RGB", image.size)
    plain.paste(image)  # PIL would save a comment or colour profile that it read with an image
    content = io.BytesIO()
    if copy.suffix.lower() == ".png":
        plain.save(content, "PNG")
    else:
        plain.save(content, "JPEG", quality=95)
    write_whole(copy, content.getvalue())


def report(
    folder: Path, found: list[Photo], new: dict[str, list[str]], problems: list[str], others: Counter[str]
) -> None:
    """
    Log what a run did, and what is left to do.

    Args:
        folder (`Path`): the data set.
        found (`list[Photo]`): all photographs of the folder, readable or not.
        new (`dict[str, list[str]]`): the copies that got a line, of each split.
        problems (`list[str]`): a reason for each photograph that was left out.
        others (`Counter`): the number of other files by their ending.
    """
    captions = read_captions(folder)
    logger.info(f"{len(found)} photographs, {sum(map(len, new.values()))} new, {len(problems)} left out")
    for problem in problems:
        logger.warning(f"left out: {problem}")
    keys = {photo.key for photo in found}
    for file in captions.values():
        for key, name in file.names.items():
            if key not in keys:
                logger.warning(f"{file.path.parent / name}: its photograph is gone; copy and line are kept")
    if others:
        logger.info(f"other files: {', '.join(f'{count} {ending}' for ending, count in sorted(others.items()))}")
    for file in captions.values():
        logger.info(f"{file.path}: {len(file.lines)} lines, {len(file.empty)} without a caption")
