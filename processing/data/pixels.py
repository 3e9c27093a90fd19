"""Images as pixels for the model: views of one size as bytes, and the value of each byte when it is normalised.

transformers' image processors return floats. What they do to an image before the last step (resize, crop, pad, cut
into tiles) gives bytes, and the last step maps each byte of a channel to one value. So a view can travel to the model
as bytes, and its normalisation can be looked up in a table of 256 values a channel.

For the image processors of the usual towers this module makes the bytes itself, by the same calls of Pillow. The
image processors copy an image from Pillow to NumPy, transpose it, copy it back before each resize, and normalise it in
float64; that costs more than resizing.

Whether all this gives what the image processor gives is not assumed. [`PixelViews`] compares both, to the last bit, on
a few images, and otherwise leaves the work to the image processor.
"""

import logging
import math
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from jnana.modeling import normalize_pixels
from jnana.processing.processing_jnana import JnanaProcessor

from .images import MAX_IMAGE_PIXELS, image_size, load_image


logger = logging.getLogger(__name__)

# The image processors that resize, and perhaps crop: of CLIP, SigLIP, ViT and DINOv2.
RESIZING = ("CLIPImageProcessorPil", "SiglipImageProcessorPil", "ViTImageProcessorPil", "BitImageProcessorPil")
PADDING = "LlavaImageProcessorPil"  # of LLaVA-1.5, with `do_pad` to a square first
FIXED = {"height", "width"}  # the names in a fixed size
TILING = "LlavaNextImageProcessorPil"  # of LLaVA-1.6
LEVELS = 256
BLOCK = 16  # its square is `LEVELS`
# What an image processor of another interface raises; it is left to give its floats.
OTHER_INTERFACE = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
# (width, height) of the images that are compared, in shares of the target's shorter side: wide, tall, small
PROBES = ((2.3, 1.1), (0.9, 2.6), (0.4, 0.3))


class PixelImages:
    """
    Loads images for the collator, as `pixel_values`. Images are decoded and resized in the dataloader's workers.

    Args:
        processor (`JnanaProcessor`): its image processor prepares them.
        max_image_pixels (`int`, *optional*, defaults to 67,108,864): larger images are not decoded.
        normalize_on_device (`bool`, *optional*, defaults to `False`): give the model bytes and the table that
            normalises them. (An image processor whose result can't be made so gives floats.)
        jpeg_draft (`bool`, *optional*, defaults to `False`): decode JPEG files of twice the target's size and more at
            a smaller size; see [`load_image`]. Their pixels are others.

    Raises:
        ValueError: if `jpeg_draft` is set and images are cut into tiles, whose number depends on their size, or are
            not resized to a known size.
    """

    def __init__(
        self,
        processor: JnanaProcessor,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        normalize_on_device: bool = False,
        jpeg_draft: bool = False,
    ):
        self.processor = processor
        self.max_image_pixels = max_image_pixels
        self.normalize_on_device = normalize_on_device
        self.jpeg_draft = jpeg_draft
        if jpeg_draft and processor.image_grid_pinpoints is not None:
            raise ValueError(
                "jpeg_draft=True, but images are cut into tiles (image_geometry: anyres), and the number of tiles "
                "depends on the size that an image has before; leave jpeg_draft out."
            )
        resizes = getattr(processor.image_processor, "do_resize", False)
        if jpeg_draft and not (resizes and min(_target(processor.image_processor)) > 0):
            size = _size(processor.image_processor)
            raise ValueError(
                f"jpeg_draft=True, but the image processor has do_resize={resizes} and size={size}: decoding smaller "
                "needs images that are resized to a known size (height and width, or shortest_edge); leave jpeg_draft "
                "out."
            )
        self.views = PixelViews(processor.image_processor)

    def key(self, reference: Any) -> Hashable:
        """A key that is equal for two references to one image.

        Args:
            reference (`dict`, `str`, `Path` or `PIL.Image.Image`): `{"path": str | None, "bytes": bytes | None}`, a
                path, or the image itself.
        """
        if not isinstance(reference, dict):
            return str(reference) if isinstance(reference, (str, Path)) else id(reference)
        return reference["bytes"] if reference.get("bytes") is not None else reference.get("path")

    def load(self, reference: Any, source: str) -> Any:
        """
        Load one image.

        Args:
            reference (`dict` or `PIL.Image.Image`): the image.
            source (`str`): file and record that refer to it.

        Raises:
            BadSampleError: if it can't be used.
        """
        side = max(self.views.target) if self.jpeg_draft else None
        return load_image(reference, source=source, max_image_pixels=self.max_image_pixels, draft_side=side)

    def size(self, image: Any) -> tuple[int, int]:
        """(height, width) in pixels of an image from [`~PixelImages.load`]."""
        return image_size(image)

    def blank(self, size: tuple[int, int], num_views: int) -> Any:
        """
        A grey image, of the type that [`~PixelImages.load`] returns.

        Args:
            size (`tuple[int, int]`): (height, width) in pixels.
            num_views (`int`): the number of views that an image of this size has; not used here.
        """
        return Image.new("RGB", size[::-1], "grey")

    def stack(self, images: list[Any]) -> dict[str, Any]:
        """
        The model inputs of the images of a batch.

        Args:
            images (`list`): from [`~PixelImages.load`].

        Returns:
            `dict[str, Any]`: `pixel_values` `(num_views, channels, height, width)`, the image processor's floats, or
            with `normalize_on_device` bytes, and `pixel_table` `(channels, 256)`, which normalises them. Where images
            are cut into tiles also `image_sizes`, (height, width) in pixels of each, as a list: shapes depend on them,
            and reading them from a GPU would make it wait. Empty without images.
        """
        if not images:
            return {}
        inputs: dict[str, Any] = {"pixel_values": torch.cat(self.views(images))}
        if self.views.table is not None and self.normalize_on_device:
            inputs["pixel_table"] = self.views.table
        elif self.views.table is not None:
            inputs["pixel_values"] = normalize_pixels(inputs["pixel_values"], self.views.table)
        if self.processor.image_grid_pinpoints is not None:
            inputs["image_sizes"] = [image_size(image) for image in images]
        return inputs


class PixelViews:
    """
    Makes the views of images, as bytes where that is exact. Can be pickled and sent to dataloader workers.

    Args:
        image_processor (`BaseImageProcessor`): what the views must equal.

    Attributes:
        table (`torch.FloatTensor` of shape `(channels, 256)`, *optional*): the normalised value of each level of each
            channel, as the image processor gives it; `None` if views can't be made as bytes.
        direct (`bool`): whether this class makes the bytes itself.
    """

    def __init__(self, image_processor: Any):
        self.image_processor = image_processor
        self.table: torch.Tensor | None = None
        self.direct = False
        try:
            self._compare()
        except OTHER_INTERFACE:
            self.table, self.direct = None, False
        if not self.direct:
            logger.info(
                f"{type(image_processor).__name__} makes the {'floats' if self.table is None else 'bytes'} of images "
                "itself, which is slower than the collator's own calls of Pillow (docs/data.md)"
            )

    def _compare(self) -> None:
        """Find out what gives the image processor's own values."""
        self.table = find_table(self.image_processor)
        if self.table is None:
            return
        probes = [_probe(self.image_processor, *shares) for shares in PROBES]
        expected = [_floats(self.image_processor, [probe])[0] for probe in probes]
        self.direct = knows(self.image_processor) and self._gives(probes, expected)
        if not self.direct and not self._gives(probes, expected, direct=False):
            self.table = None

    @property
    def target(self) -> tuple[int, int]:
        """(width, height) of the smallest image that is not enlarged, by the settings of the image processor."""
        return _target(self.image_processor)

    def _gives(self, probes: list[Image.Image], expected: list[torch.Tensor], direct: bool = True) -> bool:
        """Whether the bytes of all probes, normalised, are the image processor's own values."""
        found = [self._bytes([probe], direct)[0] for probe in probes]
        return all(
            views.dtype == torch.uint8 and torch.equal(normalize_pixels(views, self.table), floats)  # type: ignore[arg-type]
            for views, floats in zip(found, expected, strict=True)
        )

    def _bytes(self, images: Sequence[Image.Image], direct: bool) -> list[torch.Tensor]:
        if direct:
            return [to_tensor(make_views(self.image_processor, image)) for image in images]
        return _by_image(self.image_processor, images, do_rescale=False, do_normalize=False)

    def __call__(self, images: Sequence[Image.Image]) -> list[torch.Tensor]:
        """
        The views of images.

        Args:
            images (`Sequence[PIL.Image.Image]`): of mode RGB.

        Returns:
            `list[torch.Tensor]`: for each image its views `(num_views, channels, height, width)`: bytes, which
                [`normalize_pixels`] normalises with `table`; without a table floats.
        """
        if self.table is None:
            return _floats(self.image_processor, images)
        return self._bytes(images, self.direct)


def find_table(image_processor: Any) -> torch.Tensor | None:
    """
    The value that an image processor gives each level of each channel.

    Args:
        image_processor (`BaseImageProcessor`): any.

    Returns:
        `torch.FloatTensor` of shape `(3, 256)`, or `None` if a level has no value of its own, or the sides of views
            are shorter than 16 pixels.
    """
    width, height = _target(image_processor)
    if min(width, height) < BLOCK:
        return None
    # Of the size that the image processor resizes to, so that it stays as it is. Each window of 16 x 16 pixels holds
    # each level once, so a crop of that size holds all of them.
    block = np.arange(LEVELS, dtype=np.uint8).reshape(BLOCK, BLOCK)
    grid = np.tile(block, (math.ceil(height / BLOCK), math.ceil(width / BLOCK)))[:height, :width]
    image = Image.fromarray(np.repeat(grid[:, :, None], 3, axis=2))
    (held,) = _by_image(image_processor, [image], do_rescale=False, do_normalize=False)
    (values,) = _floats(image_processor, [image])
    if held.shape != values.shape or held.dtype != torch.uint8 or values.dtype != torch.float32:
        return None
    table = torch.full((held.shape[-3], LEVELS), torch.nan)
    for row, of_held, of_values in zip(table, held.unbind(-3), values.unbind(-3), strict=True):
        row[of_held.flatten().int()] = of_values.flatten()
    return table if table.isfinite().all() else None


def knows(image_processor: Any) -> bool:
    """Whether [`make_views`] can try the views of an image processor (`BaseImageProcessor`), by its settings."""
    if type(image_processor).__name__ not in (*RESIZING, PADDING, TILING) or not image_processor.do_resize:
        return False
    crop = _crop(image_processor)
    return {*_size(image_processor)} in ({"shortest_edge"}, FIXED) and (crop is None or {*crop} == FIXED)


def make_views(image_processor: Any, image: Image.Image) -> list[Image.Image]:
    """
    The views of an image as an image processor of Pillow makes them, without its copies.

    Args:
        image_processor (`BaseImageProcessor`): one that [`knows`] does.
        image (`PIL.Image.Image`): of mode RGB.
    """
    name, size, crop = type(image_processor).__name__, _size(image_processor), _crop(image_processor)
    resample = image_processor.resample
    views = [image]
    if name == TILING:
        side = dict(image_processor.crop_size or size).get("height", size.get("shortest_edge"))
        views = [image.resize(_target(image_processor), resample)]
        views += tiles(image, image_processor.image_grid_pinpoints, side, resample)
    elif name == PADDING and image_processor.do_pad:
        views = [pad_to_square(image, tuple(int(mean * 255) for mean in image_processor.image_mean))]
    views = [view.resize(resized_size(view.size, size), resample) for view in views]
    return views if crop is None else [center_crop(view, crop["width"], crop["height"]) for view in views]


def resized_size(size: tuple[int, int], target: dict[str, int]) -> tuple[int, int]:
    """(width, height) that an image of (width, height) is resized to: a fixed size, or a given shorter side."""
    if "shortest_edge" not in target:
        return target["width"], target["height"]
    shorter, longer = min(size), max(size)
    of_longer = int(target["shortest_edge"] * longer / shorter)
    return (target["shortest_edge"], of_longer) if size[0] <= size[1] else (of_longer, target["shortest_edge"])


def center_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of an image; black around it where the image is smaller."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """An image in the middle of a square of one colour, whose side is the longer one."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def tiles(image: Image.Image, pinpoints: Sequence[Sequence[int]], side: int, resample: Any) -> list[Image.Image]:
    """The tiles of an image, row by row: resized to fit the best of the resolutions (height, width), padded, cut."""
    height, width = select_best_resolution((image.height, image.width), pinpoints)
    scale_w, scale_h = width / image.width, height / image.height
    if scale_w < scale_h:
        fitted = width, min(math.ceil(image.height * scale_w), height)
    else:
        fitted = min(math.ceil(image.width * scale_h), width), height
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(fitted, resample), ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
    corners = [(left, top) for top in range(0, height, side) for left in range(0, width, side)]
    return [canvas.crop((left, top, left + side, top + side)) for left, top in corners]


def to_tensor(views: Sequence[Image.Image]) -> torch.Tensor:
    """Images of one size and mode RGB as bytes `(num_views, 3, height, width)`."""
    tensor = torch.empty(len(views), 3, views[0].height, views[0].width, dtype=torch.uint8)
    for number, view in enumerate(views):
        tensor[number] = torch.from_numpy(np.array(view)).permute(2, 0, 1)
    return tensor


def _size(image_processor: Any) -> dict[str, int]:
    """What an image processor resizes to, empty if it does not say."""
    return dict(getattr(image_processor, "size", None) or {})


def _crop(image_processor: Any) -> dict[str, int] | None:
    """What an image processor crops to, `None` if it does not crop."""
    return dict(image_processor.crop_size or {}) if getattr(image_processor, "do_center_crop", False) else None


def _target(image_processor: Any) -> tuple[int, int]:
    """(width, height) of a square-ish image that resizing leaves as it is."""
    size = _size(image_processor)
    side = size.get("shortest_edge", 0)
    return size.get("width", side), size.get("height", side)


def _probe(image_processor: Any, width: float, height: float) -> Image.Image:
    """An image of random pixels; its sides are given in shares of the target's shorter side."""
    side = min(_target(image_processor))
    shape = (max(1, round(height * side)), max(1, round(width * side)), 3)
    return Image.fromarray(np.random.default_rng(0).integers(0, LEVELS, shape, dtype=np.uint8))


def _floats(image_processor: Any, images: Sequence[Image.Image]) -> list[torch.Tensor]:
    """The views of images as the image processor gives them, `(num_views, channels, height, width)` for each. Levels
    that it neither rescales nor normalises are written as floats, which the model takes."""
    views = _by_image(image_processor, images)
    return [of_image.float() if of_image.dtype == torch.uint8 else of_image for of_image in views]


def _by_image(image_processor: Any, images: Sequence[Image.Image], **options: bool) -> list[torch.Tensor]:
    if getattr(image_processor, "image_grid_pinpoints", None) is not None:
        # Not padded to the largest number of views in the batch, which would be sent to the GPU for nothing
        views = image_processor(list(images), do_pad=False, **options)["pixel_values"]
        return [torch.as_tensor(np.asarray(of_image)) for of_image in views]
    views = image_processor(list(images), return_tensors="pt", **options)["pixel_values"]
    return list(views[:, None])
