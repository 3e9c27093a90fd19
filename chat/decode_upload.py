"""Decodes one uploaded image in a process of its own, so that a crafted file can end or stop only that process.

Run as a script by `limits.read_image`: the file comes from standard input, and the decoded image goes to standard
output as an uncompressed PNG, upright and without metadata. The process has limits on memory and on CPU time. It
imports Pillow only, so that it starts in a fraction of a second.

    python -I decode_upload.py MAX_PIXELS DIRECTORY_OF_PILLOW < upload > image.png

Exit codes: 0 if the image was decoded, `BAD_IMAGE` if it can't be, another one if the process did not get that far.
"""

import io
import sys


if __name__ == "__main__" and len(sys.argv) > 2:  # isolated (-I), Python looks for Pillow in its own directory only
    sys.path.append(sys.argv[2])

from PIL import Image, ImageOps  # noqa: E402


try:
    import resource
except ImportError:  # Windows: only the time limit of the caller applies
    resource = None  # type: ignore[assignment]


# Without TIFF: the fax decoders of libtiff have crashed on crafted files.
UPLOAD_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "HEIC")
PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")
MEMORY = 2 * 1024**3  # bytes of address space
CPU_SECONDS = 20
DESCRIPTORS = 16
# The largest sides of a JPEG that is scaled down while it is decoded, as a multiple of those that `max_pixels` allows.
JPEG_REDUCTION = 4
# Larger images of these formats are scaled down after they are decoded, which takes the memory of the whole image.
PHOTOGRAPHS = ("HEIF", "AVIF")  # pillow-heif names HEIC so
PHOTOGRAPH_PIXELS = 2  # as a multiple of `max_pixels`
BAD_IMAGE = 3


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """
    Decode an image within limits.

    Args:
        data (`bytes`): The file.
        max_pixels (`int`): A larger JPEG is scaled down while it is decoded, an HEIC or AVIF image of up to twice as
            many pixels afterwards; other larger images are refused.

    Raises:
        ValueError, OSError: If it is too large, or not a complete image of one of the formats.
    """
    Image.MAX_IMAGE_PIXELS = None  # the size is checked below
    image: Image.Image = Image.open(io.BytesIO(data), formats=known_formats())
    pixels = image.width * image.height
    # MPO: a JPEG with further pictures behind the first, as phones write it
    if pixels > max_pixels and image.format in ("JPEG", "MPO") and pixels <= max_pixels * JPEG_REDUCTION**2:
        scale = (max_pixels / pixels) ** 0.5
        image.draft(None, (int(image.width * scale / 2), int(image.height * scale / 2)))
    photograph = image.format in PHOTOGRAPHS and pixels <= max_pixels * PHOTOGRAPH_PIXELS
    if image.width * image.height > max_pixels and not photograph:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {max_pixels}")
    image.load()
    if image.width * image.height > max_pixels:
        scale = (max_pixels / pixels) ** 0.5
        image = image.resize((int(image.width * scale), int(image.height * scale)))
    image = ImageOps.exif_transpose(image)
    if "transparency" in image.info:  # in any mode; `load_image` puts it on white
        image = image.convert("RGBA")
    return image if image.mode in PNG_MODES else image.convert("RGB")


def known_formats() -> list[str]:
    """The formats that Pillow opens here; HEIC only with the package pillow-heif."""
    formats = [name for name in UPLOAD_FORMATS if name != "HEIC"]
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return formats
    register_heif_opener()  # in this process alone
    return [*formats, "HEIF"]


def main() -> None:
    limit_resources()
    try:
        image = decode(sys.stdin.buffer.read(), int(sys.argv[1]))
    except Exception as error:  # Pillow's decoders raise many types of errors for broken files
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(BAD_IMAGE)
    image.info = {}
    image.save(sys.stdout.buffer, format="PNG", compress_level=0)


def limit_resources() -> None:
    """Limits on memory, CPU time, files and descriptors, where the system has them; none above one that is set."""
    if resource is None:
        return
    limits = {"RLIMIT_CPU": CPU_SECONDS, "RLIMIT_CORE": 0, "RLIMIT_FSIZE": 0, "RLIMIT_NOFILE": DESCRIPTORS}
    if sys.platform != "darwin":  # which refuses it
        limits["RLIMIT_AS"] = MEMORY
    for name, limit in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


if __name__ == "__main__":
    main()
