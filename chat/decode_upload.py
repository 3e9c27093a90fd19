"""Decodes one uploaded image in a process of its own, so that a crafted file can harm only that process.

Run as a script by `limits.read_image`: the file comes from standard input, and the decoded image goes to standard
output as an uncompressed PNG, upright and without metadata. The process has limits on memory and on CPU time. It
imports Pillow only, so that it starts in a fraction of a second.

    python -I decode_upload.py MAX_PIXELS < upload > image.png
"""

import io
import sys
import warnings

from PIL import Image, ImageOps


try:
    import resource
except ImportError:  # Windows: only the time limit of the caller applies
    resource = None  # type: ignore[assignment]


# Without TIFF: the fax decoders of libtiff have crashed on crafted files.
UPLOAD_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")
MEMORY = 2 * 1024**3  # bytes of address space
CPU_SECONDS = 20
# A JPEG is decoded at an eighth of its size or more, so photographs above the limit can be scaled down while decoding.
JPEG_REDUCTION = 4  # times the limit of the sides


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """
    Decode an image within limits.

    Args:
        data (`bytes`): The file.
        max_pixels (`int`): A larger JPEG is scaled down while it is decoded; other larger images are refused.

    Raises:
        ValueError, OSError: If it is too large, or not a complete image of one of the formats.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked below
        image: Image.Image = Image.open(io.BytesIO(data), formats=UPLOAD_FORMATS)
    pixels = image.width * image.height
    if pixels > max_pixels and image.format == "JPEG" and pixels <= max_pixels * JPEG_REDUCTION**2:
        scale = (max_pixels / pixels) ** 0.5
        image.draft(None, (int(image.width * scale / 2), int(image.height * scale / 2)))
    if image.width * image.height > max_pixels:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {max_pixels}")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode in PNG_MODES else image.convert("RGB")


def main() -> None:
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    image = decode(sys.stdin.buffer.read(), int(sys.argv[1]))
    image.info = {}
    image.save(sys.stdout.buffer, format="PNG", compress_level=0)


if __name__ == "__main__":
    main()
