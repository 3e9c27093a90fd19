"""Images as bytes: after normalisation the image processor's own pixels, bit for bit, in every geometry and size."""

import json
import pickle

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)
from transformers.utils import is_torchvision_available

from jnana.modeling import normalize_pixels
from jnana.processing import JnanaProcessor, set_image_geometry, with_image_backend
from jnana.processing.data import JnanaCollator, PixelImages, load_image
from jnana.processing.data.pixels import PixelViews
from tests.processing.data.test_collator import row


SQUARE = {"height": 30, "width": 30}
PROCESSORS = {
    "CLIP": CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size=SQUARE),
    "CLIP, a smaller crop": CLIPImageProcessorPil(size={"shortest_edge": 37}, crop_size={"height": 24, "width": 31}),
    "CLIP, padded to the crop": CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size=SQUARE),
    "SigLIP": SiglipImageProcessorPil(size=SQUARE),
    "SigLIP, not square": SiglipImageProcessorPil(size={"height": 20, "width": 35}),
    "ViT": ViTImageProcessorPil(size=SQUARE, resample=2),
    "DINOv2": BitImageProcessorPil(size={"shortest_edge": 34}, crop_size=SQUARE),
    "LLaVA-1.5": LlavaImageProcessorPil(size={"shortest_edge": 30}, crop_size=SQUARE, do_pad=True),
    "LLaVA-1.6": set_image_geometry(CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size=SQUARE), "anyres"),
    "LLaVA-1.6, other sizes": LlavaNextImageProcessorPil(
        size=SQUARE, crop_size=SQUARE, image_grid_pinpoints=[[30, 60], [60, 90]], resample=2
    ),
}
# (width, height) in pixels: square, of the target's size, wide, tall, tiny, odd
SIZES = [(64, 64), (30, 30), (97, 41), (33, 120), (7, 5), (1, 40), (31, 29), (60, 61), (200, 30)]


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Noise over a gradient, in all levels."""
    rng = np.random.default_rng(seed)
    values = np.linspace(0, 255, size[0])[None, :, None] + rng.normal(0, 60, (size[1], size[0], 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def stock(image_processor, image: Image.Image) -> torch.Tensor:
    """The views of an image as transformers makes them."""
    pixels = image_processor(image, return_tensors="pt")["pixel_values"]
    return pixels[0] if pixels.ndim == 5 else pixels


@pytest.mark.parametrize("name", PROCESSORS)
def test_views_are_the_image_processors_own(name):
    views = PixelViews(PROCESSORS[name])
    assert views.direct
    for seed, size in enumerate(SIZES):
        image = picture(size, seed)
        (held,) = views([image])
        assert held.dtype == torch.uint8
        expected = stock(PROCESSORS[name], image)
        assert torch.equal(normalize_pixels(held, views.table), expected), size
        wrong = held.clone()
        wrong[0, 0, 3, 3] ^= 1  # the control: one level
        assert not torch.equal(normalize_pixels(wrong, views.table), expected)


@pytest.mark.parametrize(
    ("changes", "direct", "as_bytes"),
    [
        ({}, True, True),
        ({"size": {"shortest_edge": 30, "longest_edge": 60}, "do_center_crop": True}, False, True),
        ({"do_normalize": False}, True, True),
        ({"rescale_factor": 1 / 127.5}, True, True),
        ({"do_rescale": False, "do_normalize": False}, True, True),  # levels, which the model takes as floats
        ({"do_rescale": False}, True, True),
    ],
)
def test_other_settings(changes, direct, as_bytes):
    """What is not known here is left to the image processor, in its bytes or in its floats; never other pixels."""
    image_processor = CLIPImageProcessorPil(**{"size": {"shortest_edge": 30}, "crop_size": SQUARE, **changes})
    views = PixelViews(image_processor)
    assert (views.direct, views.table is not None) == (direct, as_bytes)
    for size in SIZES:
        (held,) = views([picture(size)])
        pixels = normalize_pixels(held, views.table) if as_bytes else held
        assert torch.equal(pixels, stock(image_processor, picture(size)).float())


@pytest.mark.parametrize(("side", "crop"), [(256, 224), (128, 112), (36, 17), (16, 16)])
@pytest.mark.parametrize("kind", [BitImageProcessorPil, CLIPImageProcessorPil])
def test_levels_are_not_lost_by_a_crop(kind, side, crop):
    """The published settings of DINOv2 are 256 and 224: a crop must hold each level."""
    image_processor = kind(size={"shortest_edge": side}, crop_size={"height": crop, "width": crop})
    views = PixelViews(image_processor)
    assert views.direct and views.table is not None
    image = picture((side + 40, side + 3))
    (held,) = views([image])
    assert torch.equal(normalize_pixels(held, views.table), stock(image_processor, image))


def test_the_slow_way_is_logged(caplog):
    with caplog.at_level("INFO"):
        PixelViews(PROCESSORS["CLIP"])
        assert caplog.text == ""
        PixelViews(CLIPImageProcessorPil(size={"shortest_edge": 15}, crop_size={"height": 15, "width": 15}))
        assert "CLIPImageProcessorPil makes the floats of images itself" in caplog.text
        PixelViews(Sharper(size={"shortest_edge": 30}, crop_size=SQUARE))
        assert "makes the bytes of images itself" in caplog.text


class Foreign:
    """An image processor of another interface: one image, no options."""

    size = SQUARE

    def __init__(self, error: Exception | None):
        self.error = error

    def __call__(self, images, return_tensors=None, **options):
        if options and self.error is not None:
            raise self.error
        return {"pixel_values": torch.zeros(len(images), 3, 30, 30)}


@pytest.mark.parametrize("error", [None, AttributeError("x"), RuntimeError("x"), TypeError("x")])
def test_a_foreign_image_processor_gives_its_floats(error):
    views = PixelViews(Foreign(error))
    assert views.table is None and not views.direct
    assert views([picture((40, 40))])[0].dtype == torch.float32


@pytest.mark.parametrize("normalize_on_device", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_levels_that_are_not_normalised_train(processor, pictures, normalize_on_device, own):
    """Of an image processor whose `do_rescale` and `do_normalize` are off, the model takes the floats."""
    kind = type("OwnImageProcessor", (CLIPImageProcessorPil,), {}) if own else CLIPImageProcessorPil
    levels = kind(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, do_rescale=False)
    levels.do_normalize = False
    fields = {"patch_size": 12, "num_additional_image_tokens": 1, "chat_template": processor.chat_template}
    chosen = JnanaProcessor(levels, processor.tokenizer, **fields)
    image = load_image(pictures / "0.png")
    (expected,) = torch.unbind(levels(image, return_tensors="pt")["pixel_values"])
    assert expected.dtype == torch.uint8
    batch = JnanaCollator(chosen, normalize_on_device=normalize_on_device)([row([pictures / "0.png"])])
    assert ("pixel_table" in batch) == normalize_on_device
    table = batch.get("pixel_table")
    pixels = batch["pixel_values"] if table is None else normalize_pixels(batch["pixel_values"], table)
    assert pixels.dtype == torch.float32 and torch.equal(pixels[0], expected.float())
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}]}]
    inputs = chosen.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    called = chosen(images=[image], text="<image>?", return_tensors="pt")
    for given in (inputs, called):
        assert given["pixel_values"].dtype == torch.float32
        assert torch.equal(given["pixel_values"][0], expected.float())
    listed = chosen(images=[image], text="<image>?")["pixel_values"]
    assert torch.equal(torch.as_tensor(np.asarray(listed[0])), expected.float())


class Brighter(CLIPImageProcessorPil):
    """An image processor of its own: what it adds depends on the image."""

    def normalize(self, image, *args, **kwargs):
        return super().normalize(image, *args, **kwargs) + image.mean()


class Sharper(CLIPImageProcessorPil):
    """An image processor of its own, under a known name: it resizes otherwise."""

    def resize(self, image, size, resample=None, **kwargs):
        return super().resize(image, size, resample=0, **kwargs)


Sharper.__name__ = "CLIPImageProcessorPil"


@pytest.mark.parametrize(("kind", "as_bytes"), [(Brighter, False), (Sharper, True)])
def test_an_image_processor_that_does_more_is_not_replaced(kind, as_bytes):
    image_processor = kind(size={"shortest_edge": 30}, crop_size=SQUARE)
    views = PixelViews(image_processor)
    assert not views.direct and (views.table is not None) == as_bytes
    (held,) = views([picture((97, 41))])
    pixels = normalize_pixels(held, views.table) if as_bytes else held
    assert torch.equal(pixels, stock(image_processor, picture((97, 41))))


def test_bytes_need_their_table_and_floats_none():
    pixels, table = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.arange(768.0).view(3, 256)
    assert normalize_pixels(pixels, table)[1, :, 0, 0].tolist() == [0, 256, 512]
    for wrong in ((pixels.float(), table), (pixels, table[:1]), (pixels, table[:, :255]), (pixels[0, 0], table)):
        with pytest.raises(ValueError, match=r"`pixel_table` of shape .* is given with `pixel_values`"):
            normalize_pixels(*wrong)


@pytest.mark.parametrize("packing", ["none", "rows", "shared_image"])
@pytest.mark.parametrize("geometry", ["crop", "pad", "anyres"])
def test_a_batch_of_bytes_is_the_batch_of_floats(processor, pictures, geometry, packing):
    chosen = JnanaProcessor(
        set_image_geometry(processor.image_processor, geometry),
        processor.tokenizer,
        patch_size=12,
        num_additional_image_tokens=1,
        chat_template=processor.chat_template,
    )
    rows = [row([pictures / name]) for name in ("0.png", "1.png", "2.jpg", "0.png")] + [row()]
    floats = JnanaCollator(chosen, packing=packing)(rows)
    held = pickle.loads(pickle.dumps(JnanaCollator(chosen, packing=packing, normalize_on_device=True)))(rows)
    assert held["pixel_values"].dtype == torch.uint8 and "pixel_table" not in floats
    assert torch.equal(normalize_pixels(held["pixel_values"], held["pixel_table"]), floats["pixel_values"])
    images = [load_image(pictures / name) for name in ("0.png", "1.png", "2.jpg")]
    assert torch.equal(floats["pixel_values"], torch.cat([stock(chosen.image_processor, image) for image in images]))
    assert held.keys() - floats.keys() == {"pixel_table"} and floats.counts == held.counts
    only_text = JnanaCollator(chosen, packing=packing, normalize_on_device=True)([row()])
    assert "pixel_table" not in only_text and "pixel_values" not in only_text


# ---------------------------------------------------------------------- smaller decoding of JPEG files


def test_jpeg_files_are_decoded_smaller_only_where_that_is_asked_for(processor, tmp_path):
    file = tmp_path / "large.jpg"
    picture((160, 120)).resize((640, 480), Image.Resampling.BICUBIC).save(file, quality=95)
    usual, fast = PixelImages(processor), PixelImages(processor, jpeg_draft=True)
    whole, smaller = (images.load(file, "row 0") for images in (usual, fast))
    assert whole.size == (640, 480) and smaller.size == (80, 60)  # an eighth; both sides have 24 pixels and more
    difference = usual.stack([whole])["pixel_values"] - fast.stack([smaller])["pixel_values"]
    levels = difference.abs() * torch.tensor(processor.image_processor.image_std).view(3, 1, 1) * 255
    assert 0 < levels.max() < 40 and levels.mean() < 6  # other pixels of the same image
    small = tmp_path / "small.jpg"
    picture((47, 47)).save(small)
    png = tmp_path / "large.png"
    picture((640, 480)).save(png)
    for same, size in ((small, (47, 47)), (png, (640, 480))):  # less than twice the target, and another format
        assert fast.load(same, "row 0").size == size


def test_tiles_are_not_cut_from_smaller_images(processor):
    tiled = JnanaProcessor(set_image_geometry(processor.image_processor, "anyres"), processor.tokenizer, patch_size=12)
    with pytest.raises(ValueError, match=r"jpeg_draft=True, but images are cut into tiles"):
        JnanaCollator(tiled, jpeg_draft=True)


@pytest.mark.parametrize(
    "settings",
    [{"do_resize": False}, {"size": {"longest_edge": 40}, "do_center_crop": False}],
)
def test_smaller_decoding_needs_a_known_size(processor, settings):
    """Without resizing a crop would be cut from a smaller image; an unknown target would be 0 pixels."""
    chosen = clip_pair(processor)
    for name, value in settings.items():
        setattr(chosen.image_processor, name, value)
    with pytest.raises(ValueError, match=r"jpeg_draft=True, but the image processor has do_resize=.* and size="):
        PixelImages(chosen, jpeg_draft=True)
    assert PixelImages(chosen).jpeg_draft is False
    assert PixelImages(clip_pair(processor), jpeg_draft=True).jpeg_draft


# ---------------------------------------------------------------------- Pillow and torchvision


class CLIPImageProcessor(CLIPImageProcessorPil):
    """Stands for torchvision's image processor: another name, another backend, pixels that differ."""

    backend = "torchvision"

    def resize(self, image, size, resample=None, **kwargs):
        return super().resize(image, size, resample=2, **kwargs)


@pytest.fixture
def torchvision_double(monkeypatch):
    """As if torchvision were installed, with an image processor for CLIP."""
    monkeypatch.setattr(transformers, "CLIPImageProcessor", CLIPImageProcessor, raising=False)
    monkeypatch.setattr("jnana.processing.image_geometry_jnana.is_torchvision_available", lambda: True)


def clip_pair(processor, image_processor=None, **options) -> JnanaProcessor:
    image_processor = image_processor or CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size=SQUARE)
    return JnanaProcessor(
        image_processor, processor.tokenizer, patch_size=10, chat_template=processor.chat_template, **options
    )


def test_the_backend_is_saved_and_found_again(processor, tmp_path, torchvision_double, monkeypatch):
    pil = clip_pair(processor)
    assert pil.image_backend == "pil"
    other = clip_pair(processor, image_backend="torchvision")
    assert other.image_backend == "torchvision" and type(other.image_processor) is CLIPImageProcessor
    assert dict(other.image_processor.size) == {"shortest_edge": 30}
    image = picture((97, 41))
    assert not torch.equal(stock(pil.image_processor, image), stock(other.image_processor, image))
    for saved in (pil, other):
        saved.set_image_backend(saved.image_backend)
        saved.save_pretrained(tmp_path / saved.image_backend)
        loaded = JnanaProcessor.from_pretrained(tmp_path / saved.image_backend)
        assert loaded.image_backend == saved.image_backend
        assert torch.equal(stock(loaded.image_processor, image), stock(saved.image_processor, image))
    monkeypatch.undo()  # a machine without torchvision
    if not is_torchvision_available():
        assert JnanaProcessor.from_pretrained(tmp_path / "torchvision").image_backend == "pil"


def recorded(folder) -> str | None:
    return json.loads((folder / "processor_config.json").read_text()).get("image_backend")


@pytest.mark.skipif(is_torchvision_available(), reason="stands for a machine without torchvision")
def test_a_processor_that_is_saved_again_keeps_its_record(processor, tmp_path):
    for record in ("torchvision", "pil", None):
        first, second = (tmp_path / f"{record} {number}" for number in range(2))
        clip_pair(processor, image_backend=record).save_pretrained(first)
        loaded = JnanaProcessor.from_pretrained(first)
        assert loaded.image_backend == "pil"  # here
        loaded.save_pretrained(second)  # as a merged adapter's
        assert recorded(first) == recorded(second) == record
        loaded.set_image_backend("torchvision")  # a training that asks for it, and gets Pillow
        loaded.save_pretrained(second)
        assert recorded(second) == "pil"


@pytest.mark.parametrize("option", [{"backend": "pil"}, {"use_fast": False}])
def test_a_backend_that_is_asked_for_outweighs_the_record(processor, tmp_path, torchvision_double, option):
    clip_pair(processor, image_backend="torchvision").save_pretrained(tmp_path)
    assert JnanaProcessor.from_pretrained(tmp_path).image_backend == "torchvision"
    asked = JnanaProcessor.from_pretrained(tmp_path, **option)
    assert asked.image_backend == "pil"
    asked.save_pretrained(tmp_path / "again")
    assert recorded(tmp_path / "again") == "torchvision"  # what the model was trained with has not changed


def test_an_unknown_backend_is_named(processor, tmp_path):
    message = r"image_backend='torchvison' must be one of pil, torchvision; .* processor_config\.json"
    with pytest.raises(ValueError, match=message):
        with_image_backend(CLIPImageProcessorPil(), "torchvison")
    clip_pair(processor, image_backend="pil").save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_backend": "torchvison"}))
    with pytest.raises(ValueError, match=message):
        JnanaProcessor.from_pretrained(tmp_path)


def test_an_image_processor_of_its_own_is_not_replaced_by_its_name(torchvision_double):
    """`Sharper` has the name of transformers' class, and other pixels."""
    own = Sharper(size={"shortest_edge": 30}, crop_size=SQUARE)
    assert with_image_backend(own, "torchvision") is own
    stock_one = CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size=SQUARE)
    assert type(with_image_backend(stock_one, "torchvision")) is CLIPImageProcessor  # the control


@pytest.mark.parametrize("backend", ["torchvision", "mlx"])
@pytest.mark.skipif(is_torchvision_available(), reason="stands for a machine without torchvision")
def test_a_geometry_without_a_class_is_an_error_that_says_so(backend):
    own = type("Own", (CLIPImageProcessorPil,), {"backend": backend})(size={"shortest_edge": 30}, crop_size=SQUARE)
    with pytest.raises(ValueError, match=f"Own resizes with '{backend}', for which transformers has no LlavaImage"):
        set_image_geometry(own, "pad")


def test_a_geometry_keeps_the_backend(processor, torchvision_double):
    for backend in ("pil", "torchvision"):
        chosen = with_image_backend(CLIPImageProcessorPil(size=SQUARE, do_center_crop=False), backend)
        kept = set_image_geometry(chosen, "crop")
        assert getattr(kept, "backend") == backend and dict(kept.crop_size) == SQUARE  # noqa: B009
    siglip = SiglipImageProcessorPil(size=SQUARE)
    siglip.__class__ = type("OwnImageProcessorPil", (SiglipImageProcessorPil,), {})
    assert with_image_backend(siglip, "torchvision") is siglip  # transformers has no such class


def test_the_views_of_either_backend_are_its_own(processor, torchvision_double):
    for backend in ("pil", "torchvision"):
        chosen = clip_pair(processor, image_backend=backend)
        views = PixelViews(chosen.image_processor)
        assert views.direct == (backend == "pil") and views.table is not None
        for size in SIZES:
            (held,) = views([picture(size)])
            expected = stock(chosen.image_processor, picture(size))
            assert torch.equal(normalize_pixels(held, views.table), expected)


@pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed")
@pytest.mark.parametrize("name", ["CLIP", "SigLIP", "LLaVA-1.5", "LLaVA-1.6"])
def test_torchvisions_pixels_differ_by_a_level(name):
    """Two where it enlarges."""
    pillow = PROCESSORS[name]
    torchvisions = with_image_backend(pillow, "torchvision")
    assert torchvisions is not pillow
    own = PixelViews(torchvisions)
    assert own.table is not None
    for size in SIZES:
        image = picture(size)
        (theirs,), (ours,) = own([image]), PixelViews(pillow)([image])
        assert torch.equal(normalize_pixels(theirs, own.table), stock(torchvisions, image))
        enlarges = min(size) < 30
        assert (theirs.int() - ours.int()).abs().max() <= (2 if enlarges else 1), size
