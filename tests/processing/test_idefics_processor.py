"""The processor made of an IDEFICS checkpoint: its pixels, its ids, one token an image."""

import random

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


def test_ids_equal_those_of_the_checkpoints_processor(folder):
    """For a question about two images; the answers differ in what closes them."""
    processor = JnanaProcessor.from_idefics_pretrained(folder)
    stock = IdeficsProcessor.from_pretrained(folder)
    images = [noise(20, 30), noise(40, 10)]
    prompt = ["User:", *images, " what is this?\nAssistant:"]
    expected = stock(text=[prompt], add_end_of_utterance_token=False, return_tensors="pt")
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": "what is this?"}]
    actual = processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    read = processor.tokenizer.decode(actual["input_ids"][0])
    fake = "<fake_token_around_image>"
    assert f"User:{fake}<image>{fake}<image>{fake} what is this?\nAssistant:" in read
    assert torch.equal(actual["pixel_values"], expected["pixel_values"][0])
    ids = [ids[0].tolist() for ids in (actual["input_ids"], expected["input_ids"])]
    special = [[index for index in row if index >= 320] for row in ids]
    assert special[0] == special[1] == [320, 321, 320, 321, 320]
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
