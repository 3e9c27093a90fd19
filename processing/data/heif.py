"""Opens HEIC files, the photographs of iPhones and many other phones, with the optional package pillow-heif.

Its opener is not registered with PIL: HEIC is decoded where this module is called, and nowhere else in the process.
"""

from typing import Any

from PIL import Image


# Images coded with HEVC, by the names in a file's first box (ISO/IEC 23008-12, annex B). AVIF is read by PIL itself.
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")


def is_heic(start: bytes) -> bool:
    """
    Whether a file holds HEIC images.

    Args:
        start (`bytes`): the first bytes of the file, 64 or more.
    """
    if start[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(start[:4], "big"), len(start))
    brands = [start[8:12], *(start[place : place + 4] for place in range(16, end, 4))]
    return any(brand in HEIC_BRANDS for brand in brands)


def open_heic(file: Any, name: str, source: str) -> Image.Image | None:
    """
    Open an HEIC image without decoding it.

    Rotation and mirroring are part of an HEIC image, so it decodes upright, and its `getexif()` holds no other
    orientation. Of several images in a file the primary one is opened.

    Args:
        file (`str` or binary file): a path, or the file's content.
        name (`str`): the image, for the error.
        source (`str`): file and record that refer to it, for the error.

    Returns:
        `PIL.Image.Image` or `None`: `None` if the file holds no HEIC image.

    Raises:
        ImportError: if pillow-heif is not installed. Not a `BadSampleError`, so that `on_bad_sample='skip'` does not
            leave out all photographs of a phone.
        SyntaxError: if the file is corrupt.
    """
    if isinstance(file, str):
        with open(file, "rb") as opened:
            start = opened.read(64)
    else:
        file.seek(0)
        start = file.read(64)
    if not is_heic(start):
        return None
    try:
        from pillow_heif import HeifImageFile
    except ImportError as error:
        raise ImportError(
            f"{source}: {name} is an HEIC image, which needs pillow-heif, and that is not installed: "
            "pip install 'jnana[photos]'"
        ) from error
    return HeifImageFile(file)
