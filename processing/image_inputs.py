"""From the images that rows name to what the model takes. The collator's only door to pictures.

Another source of the same thing, such as features stored earlier, has these four methods and gives other tensors.
"""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .image_loading import MAX_IMAGE_PIXELS, load_image
from .processing_jnana import JnanaProcessor


class PixelImages:
    """
    Images as `pixel_values`: decoded in the dataloader's workers, each image of a batch once.

    Args:
        processor (`JnanaProcessor`): its image processor prepares them.
        max_image_pixels (`int`, *optional*, defaults to 67,108,864): larger images are not decoded.
    """

    def __init__(self, processor: JnanaProcessor, max_image_pixels: int = MAX_IMAGE_PIXELS):
        self.processor = processor
        self.max_image_pixels = max_image_pixels

    def key(self, reference: Any) -> Hashable:
        """What two references to one image have in common.

        Args:
            reference (`dict`, `str`, `Path` or `PIL.Image.Image`): `{"path": str | None, "bytes": bytes | None}`, a
                path, or the image itself.
        """
        if not isinstance(reference, dict):
            return str(reference) if isinstance(reference, (str, Path)) else id(reference)
        return reference["bytes"] if reference.get("bytes") is not None else reference.get("path")

    def load(self, reference: Any, source: str) -> Any:
        """
        One image, before it joins a batch.

        Args:
            reference (`dict` or `PIL.Image.Image`): the image.
            source (`str`): file and record that name it.

        Raises:
            BadSampleError: if it can't be used.
        """
        return load_image(reference, source=source, max_image_pixels=self.max_image_pixels)

    def blank(self) -> Any:
        """A grey image, as [`~PixelImages.load`] gives one."""
        return Image.new("RGB", (32, 32), "grey")

    def stack(self, images: list[Any]) -> dict[str, torch.Tensor]:
        """
        Args:
            images (`list`): as [`~PixelImages.load`] gave them.

        Returns:
            `dict[str, torch.Tensor]`: `pixel_values` `(num_images, channels, height, width)`, or nothing of no images.
        """
        if not images:
            return {}
        return {"pixel_values": self.processor.image_processor(images, return_tensors="pt")["pixel_values"]}
