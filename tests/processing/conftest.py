"""Processors of a tiny pair of backbones, one for each chat template, and small images on disk."""

from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoConfig, AutoTokenizer

from jnana.processing import JnanaProcessor, chat_template_names
from tests.processing.chats import FORMAT_TOKENS, add_format_tokens
from tests.tiny import save_tiny_text, save_tiny_vision


@pytest.fixture(scope="session")
def backbones(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a vision and a language model checkpoint."""
    folder = tmp_path_factory.mktemp("backbones")
    return save_tiny_vision(folder / "vision"), save_tiny_text(folder / "text")


@pytest.fixture(scope="session")
def processors(backbones, tmp_path_factory) -> dict[str, JnanaProcessor]:
    """A processor for every shipped template. Shared: tests must not change them."""
    found = {}
    for name in chat_template_names():
        text = backbones[1]
        if name in FORMAT_TOKENS:
            text = tmp_path_factory.mktemp(name)
            add_format_tokens(AutoTokenizer.from_pretrained(backbones[1]), name).save_pretrained(text)
            AutoConfig.from_pretrained(backbones[1]).save_pretrained(text)
        found[name] = JnanaProcessor.from_vision_text_pretrained(backbones[0], text, chat_template=name)
    return found


@pytest.fixture(scope="session")
def processor(processors) -> JnanaProcessor:
    return processors["jnana"]


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder with three pictures, `0.png` red, `1.png` green, `2.jpg` blue."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in (("0.png", "red"), ("1.png", "green"), ("2.jpg", "blue")):
        Image.new("RGB", (40, 30), colour).save(folder / name)
    return folder
