"""Small files in the formats of the real data: text, COCO captions, LLaVA-Instruct, an image folder, tar shards."""

import csv
import io
import json
import tarfile
from pathlib import Path

from PIL import Image


COLOURS = {"white": (245, 245, 245), "black": (10, 10, 10), "red": (220, 20, 30), "blue": (20, 40, 220)}
PLACES = ("top", "bottom")


def pictures(folder: Path) -> list[tuple[str, str, str]]:
    """16 pictures, their upper and lower halves in two colours; returns (file name, colour on top, colour below)."""
    folder.mkdir(parents=True)
    made = []
    for top, top_colour in COLOURS.items():
        for bottom, bottom_colour in COLOURS.items():
            image = Image.new("RGB", (24, 24), bottom_colour)
            image.paste(top_colour, (0, 0, 24, 12))
            image.save(folder / f"{top}_{bottom}.png")
            made.append((f"{top}_{bottom}.png", top, bottom))
    return made


def caption(top: str, bottom: str) -> str:
    return f"{top} on {bottom}"


def make_data(folder: Path) -> Path:
    """Write all of it below `folder`: corpus.txt, captions.json, instruct.json, photos/metadata.csv, images/."""
    made = pictures(folder / "images")
    lines = [f"what is the {place}? {top} on {bottom}" for place in PLACES for _, top, bottom in made]
    (folder / "corpus.txt").write_text("\n\n".join(lines * 6) + "\n")
    coco = {
        "images": [{"id": number, "file_name": name} for number, (name, _, _) in enumerate(made)],
        "annotations": [
            {"id": number, "image_id": number, "caption": caption(top, bottom)}
            for number, (_, top, bottom) in enumerate(made)
        ],
    }
    (folder / "captions.json").write_text(json.dumps(coco))
    instruct = [
        {
            "id": str(number),
            "image": name,
            "conversations": [
                {"from": "human", "value": "<image>\nwhat is the top?"},
                {"from": "gpt", "value": top},
                {"from": "human", "value": "what is the bottom?"},
                {"from": "gpt", "value": bottom},
            ],
        }
        for number, (name, top, bottom) in enumerate(made)
    ]
    (folder / "instruct.json").write_text(json.dumps(instruct))
    pictures(folder / "photos")
    with (folder / "photos" / "metadata.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file_name", "text"])
        writer.writerows([name, caption(top, bottom)] for name, top, bottom in made)
    return folder


def make_shards(images: Path, folder: Path, count: int) -> str:
    """The pictures with their captions as WebDataset's tar files, `count` of them; returns their pattern."""
    folder.mkdir(parents=True)
    pictures = sorted(images.glob("*.png"))
    for number in range(count):
        with tarfile.open(folder / f"{number:03}.tar", "w") as shard:
            for picture in pictures[number::count]:
                for ending, content in (
                    ("png", picture.read_bytes()),
                    ("txt", caption(*picture.stem.split("_")).encode()),
                ):
                    member = tarfile.TarInfo(f"{picture.stem}.{ending}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))
    return str(folder / "*.tar")
