"""Make a data set of one's own photographs: upright copies without EXIF data, and captions to fill in.

    python run_photos.py --photos my_photos --output_dir data/my_photos --max_size 1024
    python run_photos.py --output_dir data/my_photos --push_to_hub me/my-photos

The first command reads `my_photos` and its subfolders (JPEG, PNG, HEIC, AVIF, WebP, TIFF, ...; HEIC needs `pip install
'jnana[photos]'`). It writes `train/` and `test/` below `data/my_photos`: RGB copies, turned as EXIF says, and a
`metadata.csv` of `file_name,text`. Write a caption into each line; the two directories are then `train_data` and
`eval_data` of a stage. EXIF data, which tells where a photograph was taken, is not copied.

A photograph in a subfolder `train` or `test` goes there; `test_files` lists test photographs instead; of others the
share `test_share` is drawn. Run again, the script adds new photographs. It changes no line and moves no photograph. A
line whose photograph was removed stays, with its copy, until you delete both. Photographs that can't be read are
listed, and the others are copied.

The second command uploads the images and captions as a Hub data set. It raises an error if a caption is empty. Log in
first (`hf auth login`).
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from huggingface_hub.utils import validate_repo_id

from jnana.processing.data.captions import SPLITS, captioned_images, read_captions
from jnana.processing.data.images import MAX_IMAGE_PIXELS
from jnana.processing.data.photos import assign_splits, check_photos, find_photos, report, write_copies
from jnana.training.console import log_to_stdout
from jnana.training.options.path_checks import check_output_dir
from jnana.training.options.recipes import parse_arguments


logger = logging.getLogger("run_photos")


@dataclass
class PhotoArguments:
    """The photographs, the data set to make of them, and where to share it."""

    photos: str | None = field(default=None, metadata={"help": "Folder of photographs; its subfolders are read too."})
    output_dir: str | None = field(default=None, metadata={"help": "The data set, `train/` and `test/` in it."})
    test_share: float | None = field(
        default=None, metadata={"help": "Share of test photographs; default: 0.1, or 0 if some are chosen by hand."}
    )
    test_files: str | None = field(
        default=None, metadata={"help": "Text file with the path in `photos` of one test photograph a line."}
    )
    seed: int = field(default=42, metadata={"help": "Of the draw of test photographs."})
    image_format: Literal["jpeg", "png"] = field(default="jpeg", metadata={"help": "png: without loss."})
    max_size: int | None = field(default=None, metadata={"help": "Pixels of the longer side of a copy at most."})
    max_image_pixels: int = field(default=MAX_IMAGE_PIXELS, metadata={"help": "Larger photographs are not read."})
    prompt: str | None = field(
        default=None, metadata={"help": "Adds a column `question`, filled in with this text, to be changed by hand."}
    )
    overwrite_images: bool = field(
        default=False, metadata={"help": "Write all copies again, as with another max_size; captions stay."}
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "NAME/DATA_SET on the Hub to upload to."})
    private: bool = field(default=False, metadata={"help": "push_to_hub: create the repository as a private one."})


def check_arguments(args: PhotoArguments) -> None:
    """Raise a `ValueError` that names an option, its value and the remedy."""
    if args.output_dir is None or (args.photos is None and args.push_to_hub is None):
        raise ValueError("give photos and output_dir, or output_dir and push_to_hub")
    if args.photos is not None and not Path(args.photos).is_dir():
        raise ValueError(f"photos {args.photos!r} is not a directory; give the directory of your photographs")
    if args.photos is not None:
        check_apart(Path(args.photos), Path(args.output_dir))
    if args.test_files is not None and not Path(args.test_files).is_file():
        raise ValueError(f"test_files {args.test_files!r} is not a file; give a text file of names")
    if args.test_share is not None and not 0 <= args.test_share < 1:
        raise ValueError(f"test_share is {args.test_share}; give a share of at least 0 and below 1")
    if args.max_size is not None and args.max_size < 1:
        raise ValueError(f"max_size is {args.max_size}; give a number of pixels above 0")
    if args.push_to_hub is not None:
        validate_repo_id(args.push_to_hub)
    if args.photos is not None:
        check_output_dir(args.output_dir)


def check_apart(photos: Path, output_dir: Path) -> None:
    """Raise a `ValueError` if copies could be written over photographs, or photographs be taken for copies."""
    source, target = photos.resolve(), output_dir.resolve()
    shared = source == target
    for outer, inner in ((source, target), (target, source)):
        shared |= outer in inner.parents and inner.relative_to(outer).parts[0].lower() in SPLITS
    if shared:
        raise ValueError(
            f"photos {str(photos)!r} and output_dir {str(output_dir)!r} are one directory, or one is the train or "
            "test directory of the other; give an output_dir beside photos"
        )


def main(argv: list[str]) -> None:
    # 1. Arguments and logging
    (args,) = parse_arguments([PhotoArguments], argv)
    log_to_stdout()
    check_arguments(args)
    folder = Path(args.output_dir)

    if args.photos is not None:
        # 2. Captions that are there, photographs, and the split of each
        captions = read_captions(folder, args.prompt)
        found, others = find_photos(Path(args.photos), folder, Path(args.test_files) if args.test_files else None)
        photos, problems = check_photos(found, captions, args.max_image_pixels)
        assign_splits(photos, captions, args.test_share, args.seed)

        # 3. Copies, and a line for the caption of each new one
        new, broken = write_copies(
            photos,
            captions,
            image_format=args.image_format,
            max_size=args.max_size,
            max_image_pixels=args.max_image_pixels,
            overwrite=args.overwrite_images,
        )
        for split, names in new.items():
            if names:
                captions[split].append(names, args.prompt)
        report(folder, found, new, problems + broken, others)

    # 4. Upload
    if args.push_to_hub is not None:
        data = captioned_images(folder, args.max_image_pixels)
        data.push_to_hub(args.push_to_hub, private=args.private or None)
        logger.info(f"pushed to {args.push_to_hub}")


if __name__ == "__main__":
    main(sys.argv[1:])
