"""The demo's data set: independent of the hash seed, answers that follow from the scenes, an unseen split."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from jnana.processing.data import load_rows, load_text


DEMO = Path(__file__).resolve().parents[2] / "examples" / "chess_demo"
SMALL = {"documents": 60, "single_images": 12, "train_images": 60, "validation_questions": 27}
SMALL |= {"test_questions": 200, "unseen_questions": 90}
SPLITS = ("validation", "validation_unseen", "test", "unseen")


def make_data(folder: Path, hash_seed: str, **options) -> Path:
    words = [word for name, value in {**SMALL, **options}.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(DEMO / "make_data.py"), "--output_dir", str(folder), *words]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": hash_seed})
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), "0")


@pytest.fixture(scope="module")
def scenes(data) -> dict:
    return json.loads((data / "scenes.json").read_text(encoding="utf-8"))


def read(data: Path, name: str):
    return json.loads((data / name).read_text(encoding="utf-8"))


def test_every_byte_is_the_same_under_another_hash_seed(data, tmp_path):
    assert digests(make_data(tmp_path / "again", "12345")) == digests(data)


def test_another_seed_changes_all_but_the_test_pictures(data, tmp_path):
    other = digests(make_data(tmp_path / "other", "0", seed=1))
    same = {name for name, digest in digests(data).items() if other[name] == digest}
    assert {name for name in same if name.startswith("train/")} == set()
    assert {name.split("/")[0] for name in same if "/" in name} == {"test", "unseen"}
    assert "corpus.txt" not in same


def test_vocabularies_are_the_same_under_another_hash_seed():
    program = "from vocabulary import caption_vocabulary; print(caption_vocabulary().to_str())"
    texts = {
        subprocess.run(
            [sys.executable, "-c", program],
            check=True,
            capture_output=True,
            text=True,
            cwd=DEMO,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(texts) == 1


def test_the_font_has_every_piece():
    import matplotlib

    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 40)
    missing = bytes(font.getmask("\U000e1234"))
    pictures = {bytes(font.getmask(character)) for character in "♔♕♖♗♘♙♚♛♜♝♞♟"}
    assert len(pictures) == 12
    assert missing not in pictures


def true_answer(question: str, scene: list[dict]) -> str:
    """The answer to a question, computed from its wording and the positions of the pieces."""
    from_top = [placed["piece"] for placed in sorted(scene, key=lambda placed: placed["y"])]
    from_left = [placed["piece"] for placed in sorted(scene, key=lambda placed: placed["x"])]
    words = question.rstrip("?").split()
    if question.startswith("What do you see"):
        return " and ".join(", ".join(f"a {piece}" for piece in from_top).rsplit(", ", 1))
    if question.startswith("How many"):
        return {1: "one", 2: "two", 3: "three"}[len(scene)]
    if question.startswith("Is there a"):
        return "yes" if " ".join(words[-2:]) in from_top else "no"
    if question.startswith("What colour"):
        (colour,) = {piece.split()[0] for piece in from_top if piece.split()[1] == words[-1]}
        return colour
    place = words[-1]
    if place == "middle":
        assert len(scene) == 3
    if place in ("left", "right"):
        assert len(scene) == 2
        assert abs(scene[0]["x"] - scene[1]["x"]) >= 15
    order = from_left if place in ("left", "right") else from_top
    return "a " + order[{"top": 0, "left": 0, "middle": 1, "bottom": -1, "right": -1}[place]]


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_follows_from_the_scene(data, scenes, split):
    for record in read(data, f"instruct_{split}.json"):
        question, answer = (turn["value"] for turn in record["conversations"])
        scene = scenes["scenes"][split][int(record["image"].removesuffix(".png"))]
        assert true_answer(question.removeprefix("<image>\n"), scene) == answer, record


def test_training_answers_follow_from_the_scene_too(data, scenes):
    for record, scene in zip(read(data, "instruct_train.json"), scenes["scenes"]["train"], strict=True):
        turns = record["conversations"]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            assert true_answer(question["value"].removeprefix("<image>\n"), scene) == answer["value"]


def test_pieces_are_clearly_above_one_another(scenes):
    for scene in (scene for split in scenes["scenes"].values() for scene in split):
        for upper, lower in zip(scene, scene[1:], strict=False):
            assert lower["y"] - upper["y"] >= (upper["size"] + lower["size"]) / 2 - 1e-6


def test_training_pictures_hold_no_unseen_pair_and_unseen_ones_do(data, scenes):
    pairs = [set(pair) for pair in scenes["held_out_pairs"]]
    assert len(pairs) == 12

    def shows_one(scene: list[dict]) -> bool:
        return any(pair <= {placed["piece"] for placed in scene} for pair in pairs)

    for split in ("train", "validation", "test"):
        assert not any(shows_one(scene) for scene in scenes["scenes"][split])
    for split in ("validation_unseen", "unseen"):
        assert all(shows_one(scene) for scene in scenes["scenes"][split])
    for annotation in read(data, "captions_train.json")["annotations"]:
        named = {part.removeprefix("a ") for part in annotation["caption"].replace(" and ", ", ").split(", ")}
        assert not any(pair <= named for pair in pairs)


def test_no_picture_is_in_two_splits(data):
    pictures = [digest for name, digest in digests(data).items() if name.endswith(".png")]
    assert len(set(pictures)) == len(pictures)


def test_questions_take_turns_and_yes_is_as_frequent_as_no(data):
    records = read(data, "instruct_test.json")
    kinds = [record["category"] for record in records]
    assert len(records) == 200
    assert {kinds.count(kind) for kind in set(kinds)} <= {22, 23}
    answers = [
        turn["value"]
        for record in read(data, "instruct_train.json")
        for question, turn in zip(record["conversations"][::2], record["conversations"][1::2], strict=True)
        if "Is there a" in question["value"]
    ]
    assert 0.35 < answers.count("yes") / len(answers) < 0.65


def test_the_readers_of_the_real_data_read_it(data):
    rows = load_rows(
        str(data / "instruct_test.json"),
        format="llava_instruct",
        image_folder=str(data / "test"),
        independent_turns=True,
    )
    assert len(rows) == 200
    assert rows[0]["categories"] == ["describe"]
    captions = load_rows(str(data / "captions_train.json"), format="coco_captions", image_folder=str(data / "train"))
    assert len(captions) == 60
    documents = load_text(str(data / "corpus.txt"))
    assert len(documents) == 60
    assert all("\ncaption image: " in text for text in documents["text"])


def test_pictures_are_varied(data):
    pictures = np.stack([np.asarray(Image.open(data / "train" / f"{index:06d}.png")) for index in range(60)])
    assert pictures.shape == (60, 72, 72, 3)
    corners = pictures[:, :4, :4].reshape(60, -1).mean(1)
    assert corners.std() > 15
