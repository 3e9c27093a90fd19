"""Image geometry: how an image becomes square views for the vision tower, and how many image tokens it takes.

A *view* is one square image that enters the tower. An image is one view, cropped (CLIP) or padded (LLaVA-1.5) to a
square, or with `image_grid_pinpoints` several (LLaVA-1.6): the whole image, and tiles of it.

This file is copied into every saved checkpoint.
"""

from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.image_processing_utils import select_best_resolution
from transformers.utils import is_torchvision_available


IMAGE_GEOMETRIES = ("crop", "pad", "anyres")
IMAGE_BACKENDS = ("pil", "torchvision")
# Rows and columns of the tiles that LLaVA-1.6 chooses from
ANYRES_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))

# Vectors a tower puts before its patches, registers not counted: the same table as the model's config has, which this
# file must not import (a test keeps the two equal)
TOWER_CLS_TOKENS = {
    "clip_vision_model": 1,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "siglip_vision_model": 0,
    "vit": 1,
}


class JnanaImageCountMixin:
    """The part of [`JnanaProcessor`] that counts the views and the tokens of images."""

    image_processor: Any
    patch_size: int | None
    num_additional_image_tokens: int
    vision_feature_select_strategy: str
    downsample_factor: int
    tokens_per_view: int | None

    @property
    def image_grid_pinpoints(self) -> list[list[int]] | None:
        """`list[list[int]]` or `None`: resolutions (height, width) that images are cut into tiles at."""
        return getattr(self.image_processor, "image_grid_pinpoints", None)

    def num_image_tokens(self, height: int, width: int) -> int:
        """Image tokens of a view that enters the tower with `height` x `width` pixels."""
        if self.tokens_per_view is not None:
            return self.tokens_per_view
        if self.vision_feature_select_strategy == "pooled":
            return 1
        rows, columns = self._token_grid(height, width)
        return rows * columns + (
            self.num_additional_image_tokens if self.vision_feature_select_strategy == "full" else 0
        )

    def count_image_tokens(self, image_size: tuple[int, int] | None = None, **kwargs) -> int:
        """
        The number of image tokens of one image.

        Args:
            image_size (`tuple[int, int]`, *optional*): (height, width) of the image in pixels, before it is processed.
                Needed where images are cut into tiles; otherwise all images are resized to one size.
            crop_size, size (`dict`, *optional*): instead of the image processor's own.

        Raises:
            ValueError: if the number depends on the size, and the size is not given; if there is no patch size.
        """
        height, width = self.image_height_and_width(**kwargs)
        of_a_view = self.num_image_tokens(height, width)
        if self.image_grid_pinpoints is None:
            return of_a_view
        if self.tokens_per_view is not None:
            return self.count_views(image_size) * of_a_view
        rows, columns = self._token_grid(height, width)
        tile_rows, tile_columns = self._tile_grid(image_size, height)
        kept_rows, kept_columns = unpadded_size(image_size, tile_rows * rows, tile_columns * columns)
        return of_a_view + kept_rows * (kept_columns + 1)  # each row ends with a newline vector

    def count_views(self, image_size: tuple[int, int] | None = None) -> int:
        """
        The number of views of one image, which enter the tower: the whole image, and its tiles if it is cut into such.

        Args:
            image_size (`tuple[int, int]`, *optional*): as in [`~JnanaProcessor.count_image_tokens`].
        """
        if self.image_grid_pinpoints is None:
            return 1
        tile_rows, tile_columns = self._tile_grid(image_size, self.image_height_and_width()[0])
        return 1 + tile_rows * tile_columns

    def _token_grid(self, height: int, width: int) -> tuple[int, int]:
        if self.patch_size is None:
            raise ValueError(
                "patch_size=None: the number of image tokens depends on it. Give the vision tower's patch size to the "
                "processor (or use the strategy 'pooled')."
            )
        side = self.patch_size * self.downsample_factor
        return height // side, width // side

    def _tile_grid(self, image_size: tuple[int, int] | None, view_size: int) -> tuple[int, int]:
        if image_size is None:
            raise ValueError(
                "image_size is missing: this processor cuts images into tiles (image_grid_pinpoints), so the number "
                "of image tokens depends on an image's size. Give its (height, width) in pixels."
            )
        height, width = select_best_resolution(image_size, self.image_grid_pinpoints)
        return height // view_size, width // view_size

    def image_height_and_width(
        self, crop_size: dict | None = None, size: dict | None = None, **kwargs
    ) -> tuple[int, int]:
        """
        The size that the image processor gives every image.

        Args:
            crop_size, size (`dict`, *optional*): instead of the image processor's own.

        Raises:
            ValueError: if its images differ in size.
        """
        crops = getattr(self.image_processor, "do_center_crop", False) or self.image_grid_pinpoints is not None
        target = crop_size or size or (self.image_processor.crop_size if crops else self.image_processor.size)
        if "height" not in target or "width" not in target:
            raise ValueError(
                f"image_processor.size={dict(target)} gives images of different sizes. Use an image processor that "
                "crops or resizes to a fixed height and width."
            )
        return target["height"], target["width"]


def set_image_geometry(image_processor: Any, image_geometry: str) -> Any:
    """
    An image processor that normalises as another does and gives images of its size, with a given geometry.

    Args:
        image_processor (`BaseImageProcessor`): the vision checkpoint's, with square output.
        image_geometry (`str`):
            `crop` (the shortest side is resized, the middle is cut out: CLIP), `pad` (padded to a square in the mean
            colour: stage 2 of LLaVA-1.5) or `anyres` (the whole image squashed to a square, and up to four tiles:
            LLaVA-1.6).

    Returns:
        `BaseImageProcessor`: transformers' processor of that geometry.

    Raises:
        ValueError: if the geometry is unknown, the image processor's output is not square, or transformers has no
            image processor of that geometry for its library here.
    """
    # The classes are named here and not imported above, because each import warns where torchvision is missing.
    if image_geometry not in IMAGE_GEOMETRIES:
        raise ValueError(f"image_geometry={image_geometry!r} must be one of {', '.join(IMAGE_GEOMETRIES)}.")
    crops = getattr(image_processor, "do_center_crop", False)
    size = dict(image_processor.crop_size if crops else image_processor.size)
    side = size.get("height")
    if side is None or size.get("width") != side:
        raise ValueError(
            f"image_geometry={image_geometry!r} needs an image processor with square output, and this one has "
            f"size={size}. Give the vision tower's own size in its preprocessor_config.json."
        )
    names = ("image_mean", "image_std", "resample", "rescale_factor", "do_normalize", "do_rescale", "do_convert_rgb")
    fields: dict[str, Any] = {name: getattr(image_processor, name) for name in names}
    resized = dict(image_processor.size).get("shortest_edge", side) if image_geometry == "crop" else side
    fields |= {"size": {"shortest_edge": resized}, "crop_size": {"height": side, "width": side}}
    if image_geometry == "anyres":
        fields["image_grid_pinpoints"] = [[side * rows, side * columns] for rows, columns in ANYRES_GRIDS]
    if image_geometry == "pad":
        fields["do_pad"] = True
    name = {"anyres": "LlavaNextImageProcessor", "pad": "LlavaImageProcessor", "crop": "CLIPImageProcessor"}
    backend = image_backend(image_processor)
    found = backend_class(name[image_geometry], backend)
    if found is None:
        raise ValueError(
            f"image_geometry={image_geometry!r}: {type(image_processor).__name__} resizes with {backend!r}, for which "
            f"transformers has no {name[image_geometry]} here. Install {backend}, or give an image processor that "
            "resizes with Pillow (`AutoImageProcessor.from_pretrained(path, backend='pil')`)."
        )
    return found(**fields)


def image_backend(image_processor: Any) -> str:
    """The library that an image processor resizes with: `pil` or `torchvision`."""
    return getattr(image_processor, "backend", "pil")


def backend_class(name: str, backend: str) -> Any:
    """The class of transformers for a library, `None` if there is none; `name` as for torchvision."""
    if backend not in IMAGE_BACKENDS or (backend == "torchvision" and not is_torchvision_available()):
        return None  # by this name transformers gives the one for Pillow
    return getattr(transformers, f"{name}Pil" if backend == "pil" else name, None)


def with_image_backend(image_processor: Any, backend: str) -> Any:
    """
    An image processor with the same settings that resizes with another library.

    Args:
        image_processor (`BaseImageProcessor`): any.
        backend (`str`): `pil` or `torchvision`.

    Returns:
        `BaseImageProcessor`: `image_processor` itself if it resizes with this library, or if there is no such class
            here: the library is not installed, or transformers has no such class. So does one that is not
            transformers' own, also where it has the name of one that is.

    Raises:
        ValueError: if `backend` is another word.
    """
    if backend not in IMAGE_BACKENDS:
        raise ValueError(
            f"image_backend={backend!r} must be one of {', '.join(IMAGE_BACKENDS)}; a checkpoint has it in its "
            "processor_config.json."
        )
    own = not type(image_processor).__module__.startswith("transformers.")
    if own or image_backend(image_processor) == backend:
        return image_processor
    found = backend_class(type(image_processor).__name__.removesuffix("Pil"), backend)
    return image_processor if found is None else found.from_dict(image_processor.to_dict())


def unpadded_size(image_size: tuple[int, int] | None, rows: int, columns: int) -> tuple[int, int]:
    """
    Rows and columns of the tiles' map that are left when the padding around the image is cut off.

    The same rule as in the model's projector, which this file must not import (a test keeps the two equal).
    """
    height, width = image_size  # type: ignore[misc]  # `_tile_grid` raised where it is missing
    if width / height > columns / rows:
        return rows - (rows - int(round(height * (columns / width), 7))) // 2 * 2, columns
    return rows, columns - (columns - int(round(width * (rows / height), 7))) // 2 * 2


def count_prefix_tokens(vision_config: PreTrainedConfig) -> int:
    """
    Vectors that a tower puts before its patches, CLS and registers.

    Args:
        vision_config (`PreTrainedConfig`): the tower's config.

    Raises:
        ValueError: if the tower is not known.
    """
    if vision_config.model_type not in TOWER_CLS_TOKENS:
        raise ValueError(
            f"vision tower of model_type={vision_config.model_type!r}: how many vectors it puts before its patches is "
            f"not known here. Give num_additional_image_tokens (1 for a CLS vector), or choose one of "
            f"{', '.join(TOWER_CLS_TOKENS)}."
        )
    return TOWER_CLS_TOKENS[vision_config.model_type] + getattr(vision_config, "num_register_tokens", 0)
