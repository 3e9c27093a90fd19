"""Image geometry: crop, pad and tiles. Token counts and pixel values against the processors of transformers."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessor, LlavaImageProcessor, LlavaNextImageProcessor
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from jnana.modeling import JnanaConfig
from jnana.modeling.projector_jnana import build_projector, tile_grid, unpadded_region
from jnana.processing import JnanaProcessor, set_image_geometry
from tests.tiny import (
    IMAGE_SIZE,
    PATCH_SIZE,
    save_tiny_llava,
    save_tiny_text,
    save_tiny_vision,
    tiny_text_config,
    tiny_tokenizer,
    tiny_vision_config,
)


EXTREMES = [(1, 1), (1, 4000), (4000, 1), (4000, 4000), (336, 336), (335, 337), (337, 335), (672, 336), (1, 2)]
KNOWN = {  # (height, width): tokens of LLaVA-1.6 at 336 pixels
    (480, 640): 2340,
    (640, 480): 2352,
    (427, 640): 2144,
    (336, 336): 1176,
    (1080, 1920): 1948,
    (400, 1200): 2328,
}


def image(height: int, width: int) -> Image.Image:
    values = np.random.default_rng(height * 5000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def random_sizes(number: int) -> list[tuple[int, int]]:
    rng = random.Random(0)
    return EXTREMES + [(rng.randint(1, 4000), rng.randint(1, 4000)) for _ in range(number - len(EXTREMES))]


@pytest.fixture(scope="module")
def full_size():
    """Our processor and transformers' at the size of the published checkpoints: tiles of 336 pixels, patches of 14."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    side = {"height": 336, "width": 336}
    image_processor = LlavaNextImageProcessor(size={"shortest_edge": 336}, crop_size=side)
    options = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    stock = LlavaNextProcessor(image_processor, tokenizer, **options)
    return JnanaProcessor(image_processor, tokenizer, **options), stock


def test_token_counts_equal_stock(full_size):
    processor, stock = full_size
    sizes = random_sizes(2000)
    expected = stock._get_num_multimodal_tokens([list(size) for size in sizes])["num_image_tokens"]
    assert [processor.count_image_tokens(size) for size in sizes] == expected
    assert processor._get_num_multimodal_tokens(sizes).num_image_tokens == expected
    assert {size: processor.count_image_tokens(size) for size in KNOWN} == KNOWN
    assert max(expected) == 2928
    # The control: without the rule of unpadding most counts differ.
    rough = [576 + 24 * rows * (24 * columns + 1) for rows, columns in (processor._tile_grid(s, 336) for s in sizes)]
    assert sum(a != b for a, b in zip(rough, expected, strict=True)) > 1000


def test_model_and_processor_count_alike(full_size):
    processor, _ = full_size
    pinpoints = processor.image_grid_pinpoints
    for size in random_sizes(2000):
        rows, columns = tile_grid(size, pinpoints, 336)
        assert processor.count_views(size) == 1 + rows * columns
        kept_rows, kept_columns = unpadded_region(size, rows * 24, columns * 24)
        kept = len(range(rows * 24)[kept_rows]) * (len(range(columns * 24)[kept_columns]) + 1)
        assert processor.count_image_tokens(size) == 576 + kept


@pytest.mark.parametrize("geometry", ["crop", "pad", "anyres"])
def test_pixel_values_equal_stock(geometry):
    """60 sizes, extremes among them, through our processor's chats and through transformers' image processors."""
    rng = random.Random(1)
    sizes = [(1, 1), (1, 300), (300, 1), (24, 24), (23, 25)]
    sizes += [(rng.randint(1, 300), rng.randint(1, 300)) for _ in range(55)]
    square = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    base = CLIPImageProcessor(**square)
    pinpoints = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
    stock = {
        "crop": base,
        "pad": LlavaImageProcessor(**square, do_pad=True),
        "anyres": LlavaNextImageProcessor(**square, image_grid_pinpoints=pinpoints),
    }[geometry]
    ours = set_image_geometry(base, geometry)
    images = [image(*size) for size in sizes]
    expected, found = stock(images, return_tensors="pt"), ours(images, return_tensors="pt")
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    if geometry != "crop":  # the control: another geometry gives other pixels
        flat = found["pixel_values"][:, 0] if geometry == "anyres" else found["pixel_values"]
        assert not torch.equal(base(images, return_tensors="pt")["pixel_values"], flat)


def test_padding_has_the_mean_colour():
    processor = set_image_geometry(CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336), "pad")
    pixels = processor(Image.new("RGB", (336, 112), "white"), return_tensors="pt")["pixel_values"][0]
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    colours = (pixels[:, [0, 168, 335], 168].T * std + mean) * 255
    torch.testing.assert_close(colours[[0, 2]], torch.tensor([[122.0, 116.0, 104.0]] * 2), rtol=0, atol=0.51)
    torch.testing.assert_close(colours[1], torch.full((3,), 255.0), rtol=0, atol=0.51)


def test_an_unknown_geometry_is_refused():
    with pytest.raises(ValueError, match="image_geometry='stretch' must be one of crop, pad, anyres"):
        set_image_geometry(CLIPImageProcessor(), "stretch")


def test_chats_have_the_tokens_of_the_checkpoints_own_processor(tmp_path):
    folder = save_tiny_llava(tmp_path)
    stock, processor = AutoProcessor.from_pretrained(folder), JnanaProcessor.from_llava_pretrained(folder)
    sizes = [(31, 77), (90, 20)]
    parts = [{"type": "image", "image": image(*size)} for size in sizes]
    chat = [{"role": "user", "content": [*parts, {"type": "text", "text": "which pieces do you see?"}]}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected, found = stock.apply_chat_template(chat, **options), processor.apply_chat_template(chat, **options)
    for name in ("input_ids", "pixel_values", "image_sizes"):
        assert torch.equal(found[name], expected[name]), name
    without = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, chat[0]["content"][-1]]}]
    assert processor.encode_chat(without, image_sizes=sizes) == expected["input_ids"][0].tolist()
    with pytest.raises(ValueError, match="image_size is missing: this processor cuts images into tiles"):
        processor.encode_chat(without)


def test_a_processor_of_two_backbones(tmp_path):
    vision, text = save_tiny_vision(tmp_path / "vision"), save_tiny_text(tmp_path / "text")
    options = {"image_geometry": "anyres", "downsample_factor": 2}
    processor = JnanaProcessor.from_vision_text_pretrained(vision, text, **options)
    assert processor.image_grid_pinpoints == [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
    # Two tiles of 2 x 2 patches, joined to one token each; half a token of padding on each side is not cut off.
    assert processor.count_image_tokens((24, 24)) == 1 + 1 * (2 + 1)
    processor.save_pretrained(tmp_path / "saved")
    again = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert isinstance(again, JnanaProcessor) and again.count_image_tokens((50, 90)) == processor.count_image_tokens(
        (50, 90)
    )


def wide_config(projector_type: str, tiles: bool, **fields) -> JnanaConfig:
    """A tower of 4 x 4 patches."""
    vision = tiny_vision_config("clip")
    vision.image_size = 4 * PATCH_SIZE
    pinpoints = [[48, 96], [96, 48], [96, 96]] if tiles else None
    return JnanaConfig(
        vision_config=vision,
        text_config=tiny_text_config(),
        projector_type=projector_type,
        image_grid_pinpoints=pinpoints,
        **fields,
    )


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("projector_type", ["pixel_shuffle", "avg_pool"])
def test_downsampling_projectors(projector_type, factor, tiles, layers):
    fields = {"projector_downsample_factor": factor, "projector_num_layers": layers}
    config = wide_config(projector_type, tiles, **fields)
    torch.manual_seed(0)
    projector = build_projector(config)
    projector.init_weights()
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    side = {"height": 48, "width": 48}
    image_processor = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=side)
    if tiles:
        pinpoints = config.image_grid_pinpoints
        image_processor = LlavaNextImageProcessor(
            size={"shortest_edge": 48}, crop_size=side, image_grid_pinpoints=pinpoints
        )
    processor = JnanaProcessor(image_processor, tokenizer, patch_size=12, downsample_factor=factor)
    sizes = [(48, 48), (30, 100), (100, 33)]
    views = sum(processor.count_views(size) for size in sizes)
    features = torch.randn(views, config.num_view_features, config.vision_feature_size)
    vectors = projector(features, sizes if tiles else None)
    assert [len(of_image) for of_image in vectors] == [processor.count_image_tokens(size) for size in sizes]
    assert config.num_image_tokens == (4 // factor) ** 2
    # The first token of a view depends on the patches of the first square, and on no other patch.
    features = features[:1].repeat(projector.count_views([(48, 48)])[0] if tiles else 1, 1, 1).requires_grad_()
    projector(features, [(48, 48)] if tiles else None)[0][0].sum().backward()
    used = features.grad[0].abs().sum(-1).view(4, 4) > 0
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[:factor, :factor] = True
    assert torch.equal(used, expected)


def test_pixel_shuffle_keeps_every_value():
    """What enters the Linear layer is the patches of a square, in reading order."""
    config = wide_config("pixel_shuffle", False, projector_num_layers=1)
    projector = build_projector(config)
    features = torch.randn(2, 16, 32)
    squares = projector.squares(features)
    grid = features.view(2, 4, 4, 32)
    assert torch.equal(squares[:, 1, 2], grid[:, 1, 2]) and torch.equal(squares[:, 3, 1], grid[:, 2, 3])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"projector_type": "avg_pool", "projector_downsample_factor": 3}, "`projector_downsample_factor` is 3"),
        ({"projector_type": "pixel_shuffle", "vision_feature_select_strategy": "full"}, "joins neighbouring patches"),
        ({"projector_type": "pixel_shuffle", "projector_num_layers": 3}, "`projector_num_layers` is 3; choose 1 or 2"),
        ({"image_grid_pinpoints": [[24, 30]]}, r"has \[24, 30\]; give \(height, width\) in multiples"),
        ({"image_grid_pinpoints": []}, "give at least one resolution"),
        ({"image_grid_pinpoints": [[24, 48]], "vision_feature_select_strategy": "pooled"}, "choose 'default'"),
    ],
)
def test_fields_that_fit_no_model(fields, message):
    with pytest.raises(ValueError, match=message):
        JnanaConfig(vision_config=tiny_vision_config(), text_config=tiny_text_config(), **fields)
