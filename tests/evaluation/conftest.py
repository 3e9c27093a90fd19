"""A tiny checkpoint and a test set on disk, shared by the evaluation tests."""

import json
from pathlib import Path

import pytest
from PIL import Image

from jnana.processing import JnanaProcessor
from jnana.training.model_setup import build_pair
from tests.tiny import save_tiny_text, save_tiny_vision


QUESTIONS = [
    ("how many pieces are there?", "two", "count"),
    ("is there a white king?", "yes", "exists"),
    ("what do you see in this picture?", "a white king and a black rook stand on the board", "describe"),
    ("is there a black rook?", "no", "exists"),
    ("how many pieces are there on the board?", "three", "count"),
    ("is there a dog?", "no", "exists"),
]


def save_tiny_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A full Jnana checkpoint of random weights, as run_sft leaves it."""
    vision, text = save_tiny_vision(folder / "vision", seed=seed), save_tiny_text(folder / "text", seed=seed)
    processor = JnanaProcessor.from_vision_text_pretrained(vision, text, chat_template="jnana")
    model = build_pair(str(vision), str(text), processor)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


def write_test_set(folder: Path, questions=QUESTIONS) -> Path:
    """A LLaVA-Instruct file, with one image for each question; returns the path of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number, (question, answer, category) in enumerate(questions):
        name = f"{number}.png"
        # different widths, so that a test can check the sizes of the grey images
        Image.new("RGB", (30 + number, 28), (40 * number % 256, 90, 200)).save(folder / name)
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        records.append({"id": str(number), "image": name, "category": category, "conversations": turns})
    path = folder / "test.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def test_set(tmp_path) -> Path:
    return write_test_set(tmp_path / "data")
