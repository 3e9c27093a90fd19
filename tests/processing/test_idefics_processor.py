"""The processor made of an IDEFICS checkpoint: its pixels, its ids, one token an image."""

import random
import shutil

import numpy
import pytest
import torch
from PIL import Image
from transformers import IdeficsImageProcessorPil, IdeficsProcessor

from jnana.processing import JnanaProcessor
from tests.modeling.tiny_idefics import save_tiny_idefics


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("idefics")
    save_tiny_idefics(folder)
    return folder


def noise(width: int, height: int) -> Image.Image:
    pixels = numpy.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)


def test_pixel_values_equal_those_of_the_checkpoints_image_processor(folder):
    processor = JnanaProcessor.from_idefics_pretrained(folder)
    stock = IdeficsImageProcessorPil.from_pretrained(folder)
    rng = random.Random(0)
    sizes = [(1, 1), (1, 300), (300, 1), (12, 12), *((rng.randint(1, 300), rng.randint(1, 300)) for _ in range(30))]
    for size in sizes:
        image = noise(*size)
        expected = stock([image], return_tensors="pt")
        actual = processor(images=[image], return_tensors="pt")["pixel_values"]
        assert actual.shape == (1, 3, 12, 12) and torch.equal(actual, expected)
        assert not torch.equal(actual, stock([image.rotate(180)], return_tensors="pt")) or size == (1, 1)


def question(images: list) -> list[dict]:
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": "what is this?"}]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("instruct", [False, True])
def test_prompts_equal_those_of_the_checkpoints_processor(folder, tmp_path, instruct):
    """Token for token, behind the begin-of-text token, which equals the end token in the tiny tokenizer."""
    stock = IdeficsProcessor.from_pretrained(folder)
    if instruct:
        shutil.copytree(folder, tmp_path / "instruct")
        stock.tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_utterance>"]})
        stock.save_pretrained(tmp_path / "instruct")
    processor = JnanaProcessor.from_idefics_pretrained(tmp_path / "instruct" if instruct else folder)
    images = [noise(20, 30), noise(40, 10)]
    end = "<end_of_utterance>" if instruct else ""
    for shown in ([], images[:1], images):
        prompt = (
            ["User:", *shown, f"what is this?{end}\nAssistant:"]
            if shown
            else [f"User: what is this?{end}\nAssistant:"]
        )
        expected = stock(text=[prompt], add_end_of_utterance_token=False, return_tensors="pt")
        actual = processor.apply_chat_template(
            [question(shown)], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        assert torch.equal(actual["input_ids"], expected["input_ids"][:, 1:])
        if shown:
            assert torch.equal(actual["pixel_values"], expected["pixel_values"][0])
    assert not torch.equal(actual["input_ids"][:, :-1], expected["input_ids"][:, 1:])  # negative control
    answered = [*question(images), {"role": "assistant", "content": "a cat"}]
    row = processor.apply_chat_template([answered], tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    supervised = [index for index, on in zip(row["input_ids"][0], row["assistant_masks"][0], strict=True) if on]
    closing = "<end_of_utterance>" if instruct else processor.tokenizer.eos_token
    assert processor.tokenizer.decode(supervised) == f" a cat{closing}"
    assert processor.count_image_tokens((20, 30)) == 1


def test_it_travels(folder, tmp_path):
    processor = JnanaProcessor.from_idefics_pretrained(folder)
    processor.save_pretrained(tmp_path)
    loaded = JnanaProcessor.from_pretrained(tmp_path)
    assert loaded.tokens_per_view == 1 and loaded.image_token_id == 321
    image = noise(30, 20)
    pixels = [each(images=[image], return_tensors="pt")["pixel_values"] for each in (processor, loaded)]
    assert torch.equal(*pixels)


def test_a_tokenizer_without_an_image_token_is_refused(tmp_path):
    from tests.tiny import save_tiny_text

    save_tiny_text(tmp_path)
    with pytest.raises(ValueError, match="has no '<image>'"):
        JnanaProcessor.from_idefics_pretrained(tmp_path)
