"""Draws the demo's data set in the file formats of the real data: COCO captions, LLaVA-Instruct, a text corpus.

    python examples/chess_demo/make_data.py --output_dir outputs/chess_demo/data

    corpus.txt                     stage 0: boards of letters, row by row, with questions about them
    single/, captions_single.json  images of one piece, 36 pixels: first phase of the vision tower
    train/, captions_train.json    COCO captions: second phase of the vision tower, align
    train/, instruct_train.json    LLaVA-Instruct: supervised fine-tuning
    validation/, test/, unseen/    images for choosing settings, for the result, and with pairs of pieces that no
                                   training image shows together; a record of instruct_*.json holds one question
    scenes.json                    the pieces of every image

The same arguments give the same bytes on every machine and under every PYTHONHASHSEED: all random numbers come from
numpy generators, and no set is iterated. The test images have a separate seed.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from corpus import ask, documents
from drawing import draw_images
from PIL import Image
from scenes import (
    IMAGE_SIZE,
    QUESTION_TYPES,
    Scene,
    caption,
    draw_scene,
    draw_scenes,
    held_out_pairs,
    question_of_type,
)


SINGLE_SIZE = 36
CHUNK = 256  # images drawn at once
PAIRS_SEED = 2024  # fixed, because the held-out pairs define the data set; independent of --seed


def write_images(folder: Path, scenes: list[Scene], rng: np.random.Generator, size: int) -> list[str]:
    """Draw scenes into PNG files; returns the file names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{index:06d}.png" for index in range(len(scenes))]
    for start in range(0, len(scenes), CHUNK):
        images = draw_images(rng, scenes[start : start + CHUNK], size)
        for name, image in zip(names[start:], images, strict=False):
            Image.fromarray(image).save(folder / name, compress_level=0)  # noise does not compress
    return names


def coco_captions(scenes: list[Scene], names: list[str], size: int) -> dict:
    """One caption for each image, in the format of `captions_train2017.json`."""
    images = [{"id": i, "file_name": name, "height": size, "width": size} for i, name in enumerate(names)]
    annotations = [{"id": i, "image_id": i, "caption": caption(scene)} for i, scene in enumerate(scenes)]
    return {"info": {"description": "chess demo"}, "images": images, "annotations": annotations}


def instruct_records(scenes: list[Scene], names: list[str], rng: np.random.Generator) -> list[dict]:
    """LLaVA-Instruct records: one for each image, with all its questions."""
    records = []
    for name, scene in zip(names, scenes, strict=True):
        turns = []
        for position, (question, answer) in enumerate(ask(scene, rng, extra=2)):
            turns.append({"from": "human", "value": ("<image>\n" if position == 0 else "") + question})
            turns.append({"from": "gpt", "value": answer})
        records.append({"id": name.removesuffix(".png"), "image": name, "conversations": turns})
    return records


def question_records(scenes: list[Scene], names: list[str], rng: np.random.Generator, number: int) -> list[dict]:
    """`number` records of one question each, in rotating types; each type goes through the images in order."""
    records: list[dict] = []
    next_image = dict.fromkeys(QUESTION_TYPES, 0)
    while len(records) < number:
        before = len(records)
        for kind in QUESTION_TYPES:
            while next_image[kind] < len(scenes) and len(records) < number:
                index = next_image[kind]
                next_image[kind] += 1
                pair = question_of_type(kind, scenes[index], rng)
                if pair is None:
                    continue
                human = {"from": "human", "value": "<image>\n" + pair[0]}
                turns = [human, {"from": "gpt", "value": pair[1]}]
                record = {"id": f"{names[index].removesuffix('.png')}-{kind}", "image": names[index]}
                records.append({**record, "category": kind, "conversations": turns})
                break
        if len(records) == before:
            raise ValueError(f"{len(scenes)} images allow only {before} questions, not {number}; draw more images")
    return records


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def make_data(arguments: argparse.Namespace) -> None:
    """Write every file listed in the docstring of this module."""
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = held_out_pairs(np.random.default_rng(PAIRS_SEED))
    # Every part has its own generator, so that the size of one part does not change the others.
    parts = ("corpus", "single", "train", "validation", "validation_unseen", "test", "unseen")
    seeds = [arguments.test_seed if part in ("test", "unseen") else arguments.seed for part in parts]
    rngs = {part: np.random.default_rng([i, seed]) for i, (part, seed) in enumerate(zip(parts, seeds, strict=True))}
    everything: dict[str, list] = {}

    if arguments.part in ("all", "text"):
        # The text may name every pair of pieces; only images are held out. Blank lines separate documents.
        corpus = "\n\n".join(documents(rngs["corpus"], arguments.documents))
        (folder / "corpus.txt").write_text(corpus + "\n", encoding="utf-8")
    if arguments.part == "text":
        return

    singles = [draw_scene(rngs["single"], 1, SINGLE_SIZE) for _ in range(arguments.single_images)]
    names = write_images(folder / "single", singles, rngs["single"], SINGLE_SIZE)
    write_json(folder / "captions_single.json", coco_captions(singles, names, SINGLE_SIZE))

    size = arguments.image_size
    train = draw_scenes(rngs["train"], arguments.train_images, pairs, image_size=size)
    names = write_images(folder / "train", train, rngs["train"], size)
    write_json(folder / "captions_train.json", coco_captions(train, names, size))
    write_json(folder / "instruct_train.json", instruct_records(train, names, rngs["train"]))
    everything["train"] = train

    questions = {"validation": arguments.validation_questions, "validation_unseen": arguments.validation_questions}
    questions |= {"test": arguments.test_questions, "unseen": arguments.unseen_questions}
    for part, number in questions.items():
        scenes = draw_scenes(rngs[part], number, pairs, unseen="unseen" in part, image_size=size)
        names = write_images(folder / part, scenes, rngs[part], size)
        write_json(folder / f"instruct_{part}.json", question_records(scenes, names, rngs[part], number))
        write_json(folder / f"captions_{part}.json", coco_captions(scenes, names, size))
        everything[part] = scenes

    described = {
        part: [[asdict(placed) for placed in scene] for scene in scenes] for part, scenes in everything.items()
    }
    # Written last, so that a directory with this file is complete.
    write_json(folder / "scenes.json", {"held_out_pairs": pairs, "scenes": described})


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seed", type=int, default=0, help="seed of everything except the test and unseen images")
    parser.add_argument("--test_seed", type=int, default=1000, help="seed of the test and unseen images")
    parser.add_argument("--part", choices=("all", "text", "images"), default="all", help="to make both in parallel")
    parser.add_argument("--documents", type=int, default=30400, help="number of documents in the corpus")
    parser.add_argument("--image_size", type=int, default=IMAGE_SIZE, help="pixels; pieces keep their size")
    parser.add_argument("--single_images", type=int, default=4000)
    parser.add_argument("--train_images", type=int, default=8000)
    parser.add_argument("--validation_questions", type=int, default=270)
    parser.add_argument("--test_questions", type=int, default=540)
    parser.add_argument("--unseen_questions", type=int, default=270)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    make_data(parse_arguments())
