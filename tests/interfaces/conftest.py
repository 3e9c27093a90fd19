"""A stock LLaVA and ours of the same weights, which the tests of this directory run side by side."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from jnana import JnanaForConditionalGeneration, JnanaProcessor
from tests.tiny import save_tiny_llava


class Side(NamedTuple):
    """One of the two: a model, its processor, and the checkpoint that both were saved in."""

    model: Any
    processor: Any
    folder: Path

    def inputs(self, text: str = "what is this?", **processor_kwargs) -> dict:
        """Model inputs of a chat with one image and a question."""
        return self.processor.apply_chat_template(
            chat(text),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=processor_kwargs,
        )

    def answer(self, model: Any = None, **kwargs) -> list[int]:
        """Eight new tokens, greedy."""
        inputs = self.inputs()
        settings = {"max_new_tokens": 8, "do_sample": False, **kwargs}
        tokens = (model or self.model).generate(**inputs, **settings)[0]
        return tokens[inputs["input_ids"].shape[1] :].tolist()


def picture(seed: int = 0) -> Image.Image:
    pixels = torch.randint(0, 256, (30, 40, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def chat(text: str = "what is this?") -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": text}]}]


@pytest.fixture(scope="session")
def _saved(tmp_path_factory) -> tuple[Side, Side]:
    folder = tmp_path_factory.mktemp("interfaces")
    stock_folder, our_folder = save_tiny_llava(folder / "stock", "llava"), folder / "ours"
    stock = LlavaForConditionalGeneration.from_pretrained(stock_folder)
    ours = JnanaForConditionalGeneration.from_llava_pretrained(str(stock_folder))
    processor = JnanaProcessor.from_llava_pretrained(stock_folder)
    ours.save_pretrained(our_folder)
    processor.save_pretrained(our_folder)
    return (
        Side(stock, AutoProcessor.from_pretrained(stock_folder), stock_folder),
        Side(ours, processor, our_folder),
    )


@pytest.fixture
def stock(_saved) -> Side:
    return _saved[0]._replace(model=copy.deepcopy(_saved[0].model))


@pytest.fixture
def ours(_saved) -> Side:
    return _saved[1]._replace(model=copy.deepcopy(_saved[1].model))
