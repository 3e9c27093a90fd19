"""Loads images for the collator, safely and with errors that name the file and the record.

Image files are untrusted. The size is read from the header before pixels are decoded, so a decompression bomb is
rejected at once; only raster formats are opened; URLs are not downloaded. HEIC is read from named files only: the
decoder, libheif, gets uploads to the chat page, which have no name, in a process of their own only.
"""

import base64
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from .heif import open_heic
from .rows import BadSampleError, bad_sample


logger = logging.getLogger(__name__)

# 64 megapixels: more than the photographs one trains on, and 192 MB when decoded.
MAX_IMAGE_PIXELS = 64 * 1024 * 1024

# An image processor that scales the shorter side to 224 pixels would make gigabytes of a longer image.
MAX_ASPECT_RATIO = 100

# Without EPS, which runs an interpreter on the file. JPEG opens MPO too. HEIC is opened by heif.py.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "ICO")
ORIENTATION = ExifTags.Base.Orientation
BITS_PER_SAMPLE = ExifTags.Base.BitsPerSample

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")


def load_image(
    image: Any,
    *,
    source: str = "image",
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    draft_side: int | None = None,
) -> Image.Image:
    """
    Decode one image to RGB, upright.

    Args:
        image (`PIL.Image.Image`, `str`, `Path` or `dict`): an image, a path, or a row's reference
            `{"path": str | None, "bytes": bytes | None}`.
        source (`str`, *optional*): file and record that refer to it, for the error.
        max_image_pixels (`int`, *optional*, defaults to 67,108,864): larger images raise before they are
            decoded.
        draft_side (`int`, *optional*): decode a JPEG file at a half, a quarter or an eighth of its size, the smallest
            of them with this many pixels a side at least. Faster, and other pixels.

    Returns:
        `PIL.Image.Image`: mode RGB; EXIF orientation applied, transparency on white, greys of 9 to 16 bits scaled to
            8, CMYK converted as PIL does it, colour profiles ignored.

    Raises:
        BadSampleError: if it is missing, not an image, truncated, too large, or more than 100 times as long as wide.
            The message holds `source`, the path and the remedy.
        ImportError: if it is an HEIC file and pillow-heif is not installed.
    """
    if isinstance(image, Image.Image):
        name = f"image of {image.width}x{image.height}"
        _check_size(image, name, source, max_image_pixels)
        return _decode(image, name, source)
    name, opened = _open(image, source, max_image_pixels)
    with opened:
        if draft_side is not None:
            opened.draft(None, (draft_side, draft_side))  # without effect on other formats
        return _decode(opened, name, source)


def check_image(image: Any, *, source: str = "image", max_image_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
    """
    Check by its header that an image exists, is an image, and is not too large. A truncated file passes.

    Args:
        image, source, max_image_pixels: as in [`load_image`].

    Returns:
        `tuple[int, int]`: (height, width) in pixels that [`load_image`] will give.

    Raises:
        BadSampleError, ImportError: as [`load_image`].
    """
    if isinstance(image, Image.Image):
        _check_size(image, f"image of {image.width}x{image.height}", source, max_image_pixels)
        return _upright_size(image)
    opened = _open(image, source, max_image_pixels)[1]
    with opened:
        return _upright_size(opened)


def image_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of an image in pixels, the order in which `JnanaProcessor.count_image_tokens` takes it."""
    return image.height, image.width


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) after the EXIF orientation is applied, without decoding pixels."""
    height, width = image_size(image)
    if image.format == "TIFF":  # PIL applies its orientation itself
        return height, width
    try:
        if image.format == "PNG" and "exif" not in image.info:
            if not _has_metadata_behind_pixels(image):
                return height, width
            image.load()  # PIL reads what lies behind the pixels after them
        turned = image.getexif().get(ORIENTATION, 1) in range(5, 9)  # by 90 degrees to the left or right
    except Exception:  # unreadable EXIF data: `_decode` keeps the stored orientation too
        turned = False
    return (width, height) if turned else (height, width)


def _has_metadata_behind_pixels(image: Image.Image) -> bool:
    """Whether a PNG that is open has EXIF data or text, which may hold an orientation, behind its pixels. Reads the
    headers of its chunks (PNG specification, section 5.3) and leaves the file where it was."""
    file = getattr(image, "fp", None)
    if file is None:  # decoded already
        return False
    start = file.tell()
    try:
        file.seek(len(PNG_SIGNATURE))
        seen_pixels = False
        while len(header := file.read(8)) == 8:
            kind = header[4:]
            if seen_pixels and kind in PNG_METADATA:
                return True
            seen_pixels = seen_pixels or kind == b"IDAT"
            file.seek(int.from_bytes(header[:4], "big") + 4, 1)  # the content and its checksum
        return False
    finally:
        file.seek(start)


def read_image_bytes(image: dict, *, source: str = "image") -> bytes:
    """
    The bytes of an image file.

    Args:
        image (`dict`): a row's reference `{"path": str | None, "bytes": bytes | None}`.
        source (`str`, *optional*): file and record that refer to it, for the error.

    Raises:
        BadSampleError: if the file does not exist or can't be read.
    """
    path, data = image.get("path"), image.get("bytes")
    if data is not None:
        return data
    if not path:
        raise _no_reference(source)
    name = f"image {path!r}"
    try:
        file = _local_or_hub_file(path, name, source)
        return Path(file).read_bytes() if isinstance(file, str) else file.read()
    except FileNotFoundError as error:
        raise _no_file(name, source) from error
    except (OSError, ValueError) as error:
        raise bad_sample(source, f"{name} can't be read: {error}.", "Replace the file.") from error


def thumbnail(image: Image.Image, side: int) -> dict[str, Any]:
    """
    A small copy of an image as a JPEG in a data URL, for an HTML page that loads no other file.

    Args:
        image (`PIL.Image.Image`): of any mode.
        side (`int`): length of the longer side in pixels; smaller images keep their size.

    Returns:
        `dict`: `url` (`data:image/jpeg;base64,...`), `width` and `height` (pixels).
    """
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"url": f"data:image/jpeg;base64,{data}", "width": small.width, "height": small.height}


def _no_reference(source: str) -> BadSampleError:
    return bad_sample(source, "the image reference has neither a path nor bytes.", "Give one of them.")


def _no_file(name: str, source: str) -> BadSampleError:
    return bad_sample(source, f"{name} does not exist.", "Check image_folder and the file name.")


def _open(image: Any, source: str, max_image_pixels: int) -> tuple[str, Image.Image]:
    """The name of an image for errors, and the image, opened but not decoded."""
    reference: dict[str, Any] = {"path": str(image), "bytes": None} if isinstance(image, (str, Path)) else image
    path, data = reference.get("path"), reference.get("bytes")
    name = f"image {path!r}" if path else "embedded image"
    if data is not None:
        file: Any = io.BytesIO(data)
    elif path:
        file = _local_or_hub_file(path, name, source)
    else:
        raise _no_reference(source)
    try:
        opened = _open_file(file, path, name, source)
    except FileNotFoundError as error:
        raise _no_file(name, source) from error
    except Image.DecompressionBombError as error:
        raise bad_sample(source, f"{name} is too large: {error}", "Scale it down.") from error
    except UnidentifiedImageError as error:
        raise bad_sample(
            source,
            f"{name} is not an image of a known format.",
            f"Formats read: {', '.join(IMAGE_FORMATS)}, and HEIC from files with a name.",
        ) from error
    except (OSError, ValueError, SyntaxError) as error:
        raise bad_sample(source, f"{name} can't be opened: {str(error).strip()}.", "Replace the file.") from error
    try:
        _check_size(opened, name, source, max_image_pixels)
    except BadSampleError:
        opened.close()
        raise
    return name, opened


def _open_file(file: Any, path: str | None, name: str, source: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # `_check_size` applies max_image_pixels instead
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(file, formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        heic = open_heic(file, name, source) if path else None
        if heic is None:
            raise
        return heic


def _local_or_hub_file(path: str, name: str, source: str) -> Any:
    """A local path unchanged, or the content of a file of a streamed Hub data set (`hf://...`). Web URLs raise."""
    if "://" not in path:
        return path
    if "http://" in path or "https://" in path:
        raise bad_sample(source, f"{name} is a web address.", "Images are not downloaded: save it and give its path.")
    from datasets.utils.file_utils import xopen

    try:
        with xopen(path, "rb") as file:
            return io.BytesIO(file.read())
    except (OSError, KeyError) as error:  # KeyError: datasets 4 on a name that an archive does not have
        raise bad_sample(source, f"{name} can't be read: {error}.") from error


def _check_size(image: Image.Image, name: str, source: str, max_image_pixels: int) -> None:
    pixels = image.width * image.height
    if pixels == 0:
        raise bad_sample(source, f"{name} has no pixels ({image.width}x{image.height}).", "Replace the file.")
    if pixels > max_image_pixels:
        raise bad_sample(
            source,
            f"{name} has {image.width}x{image.height} = {pixels:,} pixels, more than "
            f"max_image_pixels={max_image_pixels:,}.",
            "Scale it down, or raise max_image_pixels.",
        )
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise bad_sample(
            source,
            f"{name} has {image.width}x{image.height} pixels, one side more than {MAX_ASPECT_RATIO} times the other.",
            "Crop it.",
        )


def _decode(image: Image.Image, name: str, source: str) -> Image.Image:
    bits = _grey_bits(image)
    try:
        image.load()
    except Exception as error:  # PIL's decoders raise many types of errors for broken files
        raise bad_sample(
            source, f"{name} is truncated or corrupt: {str(error).strip()}.", "Replace the file."
        ) from error
    try:
        if image.getexif().get(ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # unreadable EXIF data: keep the stored orientation
        logger.debug("%s: %s has unreadable EXIF data (%s)", source, name, error)
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise bad_sample(
            source, f"{name} has values that are NaN or infinite.", "Replace them, or save the image as 8-bit PNG."
        )
    return _to_rgb(image, bits)


def _grey_bits(image: Image.Image) -> int:
    """Bits of a grey value in the file: 9 to 15 in some TIFFs, which PIL opens as 16-bit greys without scaling."""
    bits = image.tag_v2.get(BITS_PER_SAMPLE) if isinstance(image, TiffImagePlugin.TiffImageFile) else None
    return bits[0] if bits and 8 < bits[0] < 16 else 16


def _to_rgb(image: Image.Image, grey_bits: int) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        # PIL would clip most 16-bit greys to white
        values = np.asarray(image, dtype=np.float64)
        top = 2.0**grey_bits - 1
        if values.max() <= 255 and not image.mode.startswith("I;16"):
            top = 255.0
        if image.mode == "F" and values.max() <= 1:
            top = 1.0
        values = np.clip(values / top, 0, 1) * 255
        return Image.fromarray(values.round().astype(np.uint8), mode="L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
