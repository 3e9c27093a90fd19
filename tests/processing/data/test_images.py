"""Unusual images: rotated, transparent, 16-bit, truncated, or with extreme sizes."""

import base64
import io
import struct
import sys
import zipfile
import zlib

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from jnana.processing.data import (
    BadSampleError,
    PixelImages,
    check_image,
    check_rows,
    load_image,
    load_rows,
    thumbnail,
)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels: what a decompression bomb looks like from outside."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(b"\0")), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def encoded(image: Image.Image, format: str = "PNG", **options) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return {"path": None, "bytes": buffer.getvalue()}


def test_paths_bytes_and_images_are_taken(pictures):
    for image in (pictures / "0.png", str(pictures / "0.png"), {"path": str(pictures / "0.png"), "bytes": None}):
        loaded = load_image(image)
        assert loaded.mode == "RGB" and loaded.size == (40, 30) and loaded.getpixel((0, 0)) == (255, 0, 0)
        assert check_image(image) == (30, 40)
    data = {"path": "name only.png", "bytes": (pictures / "1.png").read_bytes()}
    assert load_image(data).getpixel((0, 0)) == (0, 128, 0)
    assert load_image(Image.new("L", (3, 2), 7)).getpixel((0, 0)) == (7, 7, 7)


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (40, 20))
    image.paste("white", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    for format in ("PNG", "JPEG", "WEBP", "TIFF"):
        reference = encoded(image, format, exif=exif)
        loaded = load_image(reference)
        assert loaded.size == (20, 40) and min(loaded.getpixel((19, 0))) > 128 > max(loaded.getpixel((0, 39)))
        assert check_image(reference) == (40, 20)
        plain = encoded(image, format)  # negative control
        assert load_image(plain).size == (40, 20) and check_image(plain) == (20, 40)


def with_exif_behind_pixels(reference: dict) -> dict:
    """The same PNG with its eXIf chunk moved to its end, where the specification allows it too."""
    data = reference["bytes"]
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    return {"path": None, "bytes": data[:start] + data[end:-12] + data[start:end] + data[-12:]}


def test_a_png_with_exif_behind_its_pixels_is_measured_as_it_is_decoded(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (40, 20), "red")
    reference = with_exif_behind_pixels(encoded(image, exif=exif))
    assert "exif" not in Image.open(io.BytesIO(reference["bytes"])).info  # behind the pixels, not before them
    assert load_image(reference).size == (20, 40) and check_image(reference) == (40, 20)
    (tmp_path / "turned.png").write_bytes(reference["bytes"])
    assert check_image(tmp_path / "turned.png") == (40, 20)
    plain = encoded(image)
    assert load_image(plain).size == (40, 20) and check_image(plain) == (20, 40)


def transparent_palette() -> Image.Image:
    """Red in a palette whose first entry is transparent, as in GIFs."""
    image = Image.new("P", (2, 2), 0)
    image.putpalette([255, 0, 0])
    image.info["transparency"] = 0
    return image


def test_unreadable_exif_is_no_reason_to_lose_an_image():
    data = encoded(Image.new("RGB", (4, 4), "red"), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff broken")
    assert load_image(data).size == (4, 4) and check_image(data) == (4, 4)


@pytest.mark.parametrize(
    "image, expected",
    [
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), (255, 255, 255)),  # transparent red is white, not black or red
        (Image.new("RGBA", (2, 2), (255, 0, 0, 255)), (255, 0, 0)),
        (Image.new("LA", (2, 2), (10, 255)), (10, 10, 10)),
        (Image.new("RGB", (2, 2), (9, 8, 7)).convert("P", palette=Image.Palette.ADAPTIVE), (9, 8, 7)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.fromarray(np.full((2, 2), 32896, dtype=np.uint16)), (128, 128, 128)),
        (Image.fromarray(np.full((2, 2), 200, dtype=np.int32)), (200, 200, 200)),
        (Image.fromarray(np.full((2, 2), 0.5, dtype=np.float32)), (128, 128, 128)),
        (Image.new("L", (2, 2), 77), (77, 77, 77)),
        (Image.new("RGB", (2, 2), (1, 2, 3)), (1, 2, 3)),
        (Image.new("LA", (2, 2), (10, 0)), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)).convert("RGBa"), (255, 255, 255)),
        (transparent_palette(), (255, 255, 255)),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("YCbCr", (2, 2), (128, 128, 128)), (128, 128, 128)),
        (Image.new("HSV", (2, 2), (0, 255, 255)), (255, 0, 0)),
        (Image.new("LAB", (2, 2), (255, 128, 128)), (254, 255, 254)),  # as LittleCMS rounds
        (Image.fromarray(np.full((2, 2), 40000, dtype=np.int32)), (156, 156, 156)),
        (Image.fromarray(np.full((2, 2), 32896, dtype=">u2")), (128, 128, 128)),
        (Image.fromarray(np.full((2, 2), 51.0, dtype=np.float32)), (51, 51, 51)),
    ],
    ids=[
        *("transparent", "opaque", "grey with alpha", "palette", "bilevel", "16 bit", "32 bit", "float", "grey"),
        *("rgb", "transparent grey", "premultiplied alpha", "transparent palette", "cmyk", "ycbcr", "hsv", "lab"),
        *("32 bit, large", "16 bit big-endian", "float to 255"),
    ],
)
def test_every_mode_becomes_rgb(image, expected):
    loaded = load_image(image)
    assert loaded.mode == "RGB" and loaded.getpixel((1, 1)) == expected


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(value):
    pixels = np.full((4, 4), 0.5, dtype=np.float32)
    assert load_image(encoded(Image.fromarray(pixels), "TIFF")).getpixel((0, 0)) == (128, 128, 128)
    pixels[1, 2] = value
    with pytest.raises(BadSampleError, match="row 7: embedded image has values that are NaN or infinite"):
        load_image(encoded(Image.fromarray(pixels), "TIFF"), source="row 7")


def grey_tiff_of_12_bits(value: int) -> dict:
    """PIL writes no such file: 2 x 2 pixels of 12 bits, each row in 3 bytes, little-endian header."""
    row = bytes([value >> 4, (value & 15) << 4 | value >> 8, value & 255])
    entries = [(256, 3, 1, 2), (257, 3, 1, 2), (258, 3, 1, 12), (259, 3, 1, 1), (262, 3, 1, 1)]
    entries += [(273, 4, 1, 8), (277, 3, 1, 1), (278, 3, 1, 2), (279, 4, 1, 6)]
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return {
        "path": None,
        "bytes": b"II*\0" + struct.pack("<I", 14) + 2 * row + struct.pack("<H", len(entries)) + table + b"\0" * 4,
    }


@pytest.mark.parametrize("value, expected", [(4095, 255), (2056, 128), (0, 0)])
def test_12_bit_greys_are_scaled(value, expected):
    """As 16-bit greys they would have at most 16 of 255."""
    assert load_image(grey_tiff_of_12_bits(value)).getpixel((1, 1)) == (expected,) * 3


def test_16_bit_png_and_cmyk_jpeg_files():
    grey = load_image(encoded(Image.fromarray(np.full((4, 4), 65535, dtype=np.uint16))))
    assert grey.getpixel((0, 0)) == (255, 255, 255)
    half = load_image(encoded(Image.fromarray(np.full((4, 4), 200, dtype=np.uint16))))
    assert half.getpixel((0, 0)) == (1, 1, 1)  # dark, not clipped to 200
    cmyk = load_image(encoded(Image.new("CMYK", (4, 4), (0, 0, 0, 0)), "JPEG"))
    assert min(cmyk.getpixel((0, 0))) > 250


def ramp() -> np.ndarray:
    """16-bit greys, dark on the left and bright on the right, all but one above 255."""
    return np.tile(np.arange(0, 65536, 257 * 15, dtype=np.uint16), (4, 1))


@pytest.mark.parametrize("format, dtype", [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")])
def test_16_bit_greys_are_scaled(format, dtype):
    """Their bright half stays apart; clipping makes all of it white."""
    image = Image.fromarray(ramp().astype(dtype))
    loaded = load_image(encoded(image, format))
    values = np.asarray(loaded)[0, :, 0]
    assert values.tolist() == [15 * step for step in range(18)]
    clipped = np.asarray(image.convert("I").convert("L"))[0]  # negative control: PIL's own conversion
    assert clipped.tolist() == [0] + [255] * 17


def test_16_bit_greys_are_turned_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    for format in ("PNG", "TIFF"):
        reference = encoded(Image.fromarray(ramp()), format, exif=exif)
        loaded = load_image(reference)
        assert loaded.size == (4, 18) and check_image(reference) == (18, 4)
        assert np.asarray(loaded)[:, 0, 0].tolist() == [15 * step for step in range(18)]


def rgb_tiff_of_16_bits(colour: tuple[int, int, int]) -> dict:
    """PIL writes no such file: 2 x 2 pixels, uncompressed, little-endian."""
    pixels = struct.pack("<3H", *colour) * 4
    entries = [(256, 3, 1, 2), (257, 3, 1, 2), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2)]
    entries += [(273, 4, 1, 14), (277, 3, 1, 3), (278, 3, 1, 2), (279, 4, 1, len(pixels))]
    header = b"II*\0" + struct.pack("<I", 14 + len(pixels)) + struct.pack("<3H", 16, 16, 16)
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return {"path": None, "bytes": header + pixels + struct.pack("<H", len(entries)) + table + b"\0" * 4}


def rgb_png_of_16_bits(colour: tuple[int, int, int]) -> dict:
    """Nor this: 2 x 2 pixels; each line starts with the number of its filter."""
    header, pixels = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0), (b"\0" + struct.pack(">3H", *colour) * 2) * 2
    chunks = [png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(pixels)), png_chunk(b"IEND", b"")]
    return {"path": None, "bytes": b"\x89PNG\r\n\x1a\n" + b"".join(chunks)}


@pytest.mark.parametrize("write", [rgb_tiff_of_16_bits, rgb_png_of_16_bits])
def test_16_bit_colours(write):
    assert load_image(write((0x0102, 0x80FF, 0xFF00))).getpixel((1, 1)) == (0x01, 0x80, 0xFF)


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk(format):
    """Known inks: the colours are their complements, darkened by black."""
    inks = {(0, 0, 0, 0): (255, 255, 255), (0, 255, 255, 0): (255, 0, 0), (255, 0, 0, 128): (0, 127, 127)}
    for ink, colour in inks.items():
        options = {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
        reference = encoded(Image.new("CMYK", (16, 16), ink), format, **options)
        loaded = load_image(reference)
        assert loaded.mode == "RGB" and np.abs(np.subtract(loaded.getpixel((8, 8)), colour)).max() <= 2
        as_stored = Image.open(io.BytesIO(reference["bytes"])).getpixel((8, 8))[
            :3
        ]  # negative control: inks as colours
        assert np.abs(np.subtract(as_stored, colour)).max() > 100


def test_avif_is_turned_and_keeps_its_colours():
    image = Image.new("RGB", (64, 32), (200, 30, 60))
    image.paste((20, 120, 220), (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned by 90 degrees anticlockwise
    reference = encoded(image, "AVIF", quality=95, exif=exif)
    loaded = load_image(reference)
    assert loaded.size == (32, 64) and check_image(reference) == (64, 32)
    assert np.abs(np.subtract(loaded.getpixel((16, 50)), (20, 120, 220))).max() <= 6
    assert np.abs(np.subtract(loaded.getpixel((16, 10)), (200, 30, 60))).max() <= 6
    assert load_image(encoded(image, "AVIF")).size == (64, 32)  # negative control


def heic(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, **{"quality": 95, **options})
    return buffer.getvalue()


class TestHeic:
    """Photographs of iPhones. They are read from files with a name, whatever the name."""

    @pytest.fixture
    def photo(self, tmp_path):
        """(64, 32) as stored, to be turned by 90 degrees clockwise: blue at the top, red below."""
        image = Image.new("RGB", (64, 32), (200, 30, 60))
        image.paste((20, 120, 220), (0, 0, 32, 32))
        exif = Image.Exif()
        exif[0x0112] = 6
        path = tmp_path / "IMG_1.HEIC"
        path.write_bytes(heic(image, exif=exif.tobytes()))
        return path

    def test_colours_and_rotation(self, photo):
        for reference in (photo, str(photo), {"path": "IMG_1.HEIC", "bytes": photo.read_bytes()}):
            loaded = load_image(reference)
            assert loaded.mode == "RGB" and loaded.size == (32, 64) and check_image(reference) == (64, 32)
            assert np.abs(np.subtract(loaded.getpixel((16, 10)), (20, 120, 220))).max() <= 6
            assert np.abs(np.subtract(loaded.getpixel((16, 50)), (200, 30, 60))).max() <= 6

    def test_the_rotation_is_needed_and_applied_once(self, photo, tmp_path):
        plain = tmp_path / "plain.heic"
        plain.write_bytes(heic(Image.new("RGB", (64, 32), "red")))
        assert load_image(plain).size == (64, 32)  # negative control
        turned = pillow_heif.HeifImageFile(photo)
        assert turned.info["original_orientation"] == 6 and turned.getexif()[0x0112] == 1

    def test_other_names_and_brands(self, photo):
        """A phone may name HEIC data .jpg; some files name the container first, which AVIF files do too."""
        data = photo.read_bytes()
        assert load_image({"path": "IMG_1.jpg", "bytes": data}).size == (32, 64)
        assert data[8:12] == b"heic" and b"heic" in data[16:28]
        assert load_image({"path": "a.heif", "bytes": data[:8] + b"mif1" + data[12:]}).size == (32, 64)

    def test_greys_of_10_bits_and_transparency(self, tmp_path):
        path = tmp_path / "a.heic"
        path.write_bytes(heic(Image.fromarray(ramp().repeat(8, 0).repeat(8, 1))))
        assert np.abs(np.asarray(load_image(path))[0, 4::8, 0] - np.arange(18) * 15.0).max() <= 3
        path.write_bytes(heic(Image.new("RGBA", (32, 32), (255, 0, 0, 0))))
        assert min(load_image(path).getpixel((16, 16))) > 250

    def test_a_header_that_lies(self, photo, tmp_path):
        """A larger size is refused before anything is decoded. A smaller one doesn't let more pixels in."""
        noise = np.random.default_rng(0).integers(0, 255, (600, 600, 3), dtype=np.uint8)
        data = heic(Image.fromarray(noise))
        place = data.index(b"ispe") + 8
        path = tmp_path / "bomb.heic"
        for side, message in ((30_000, "= 900,000,000 pixels, more than max_image_pixels"), (32, "corrupt")):
            path.write_bytes(data[:place] + struct.pack(">II", side, side) + data[place + 8 :])
            with pytest.raises(BadSampleError, match=f"r1: image '.*bomb.heic' .*{message}"):
                load_image(path, source="r1")
        path.write_bytes(data)
        assert load_image(path, max_image_pixels=360_000).size == (600, 600)  # negative control
        with pytest.raises(BadSampleError, match="600x600 = 360,000 pixels, more than max_image_pixels=359,999"):
            check_image(path, max_image_pixels=359_999)

    def test_a_broken_file(self, photo, tmp_path):
        data = photo.read_bytes()
        for length in (40, len(data) // 2, len(data) - 20):
            (tmp_path / "cut.heic").write_bytes(data[:length])
            with pytest.raises(
                BadSampleError, match=r"r1: image '.*cut.heic' (can't be opened|is truncated).* Replace"
            ):
                load_image(tmp_path / "cut.heic", source="r1")

    def test_without_the_package(self, photo, pictures, monkeypatch):
        monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
        message = (
            r"r1: image '.*IMG_1.HEIC' is an HEIC image, which needs pillow-heif, .* pip install 'jnana\[photos\]'"
        )
        for opener in (load_image, check_image):
            with pytest.raises(ImportError, match=message):
                opener(photo, source="r1")
        assert load_image(pictures / "0.png").size == (40, 30)

    def test_rows(self, photo, processor, monkeypatch):
        """An image folder may name them. `skip` does not leave them out silently where the package is missing."""
        photo.with_name("metadata.csv").write_text("file_name,text\nIMG_1.HEIC,a photograph\n")
        rows = load_rows(photo.parent)
        assert check_rows(rows, processor, progress=False).problems == []
        assert PixelImages(processor).load(rows[0]["images"][0], "r1").size == (32, 64)
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        with pytest.raises(ImportError, match="metadata.csv, record 0 .*: image '.*IMG_1.HEIC' is an HEIC image"):
            check_rows(rows, processor, on_bad_sample="skip", progress=False)

    def test_uploads_never_reach_its_decoder(self, photo):
        """They come without a name."""
        with pytest.raises(BadSampleError, match="embedded image is not an image of a known format"):
            load_image({"path": None, "bytes": photo.read_bytes()})
        with pytest.raises(OSError):  # nor does anything else that PIL opens in this process
            Image.open(photo)


def test_a_palette_with_a_transparent_entry():
    image = Image.new("P", (2, 2), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    assert load_image(encoded(image, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path):
    for size in ((60_000, 60_000), (12_000, 12_000), (2_000_000, 1_000)):
        path = tmp_path / "bomb.png"
        path.write_bytes(png_header(*size))
        for opener in (load_image, check_image):
            with pytest.raises(BadSampleError, match="pets.json, record 3: image '.*bomb.png'.*(too large|pixels)"):
                opener(path, source="pets.json, record 3")
    with pytest.raises(
        BadSampleError, match="40x30 = 1,200 pixels, more than max_image_pixels=1,000.* raise max_image"
    ):
        load_image(Image.new("RGB", (40, 30)), max_image_pixels=1000)
    assert load_image(Image.new("RGB", (40, 30)), max_image_pixels=1200).size == (40, 30)


def test_a_line_of_pixels_is_refused(tmp_path):
    """Few pixels, but an image processor that scales the shorter side to 224 would make 3 GB of them."""
    path = tmp_path / "line.png"
    path.write_bytes(png_header(1, 20_000))
    for opener in (load_image, check_image):
        with pytest.raises(BadSampleError, match="r1: image '.*line.png' has 1x20000 pixels, one side more than 100"):
            opener(path, source="r1")
    assert load_image(Image.new("RGB", (3, 300))).size == (3, 300)


def test_what_is_wrong_is_said(tmp_path, pictures):
    def refused(image, message):
        with pytest.raises(BadSampleError, match=message):
            load_image(image, source="pets.json, record 3")

    refused(tmp_path / "none.png", "^pets.json, record 3: image '.*none.png' does not exist. Check image_folder")
    refused(tmp_path, "can't be opened")
    (tmp_path / "text.png").write_text("not an image")
    refused(tmp_path / "text.png", "is not an image of a known format. Formats read: JPEG")
    (tmp_path / "empty.png").write_bytes(b"")
    refused(tmp_path / "empty.png", "is not an image")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))
    whole = encoded(noise, "JPEG")["bytes"]
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) - 500])
    refused(tmp_path / "half.jpg", "is truncated or corrupt")
    assert check_image(tmp_path / "half.jpg") == (30, 40)  # a header does not tell
    (tmp_path / "vector.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    refused(tmp_path / "vector.eps", "is not an image")
    refused({"path": None, "bytes": None}, "neither a path nor bytes")
    refused("bad\0name.png", "can't be opened")
    for address in ("http://localhost:1/a.png", "https://localhost:1/a.png", "zip://a.png::https://localhost:1/a.zip"):
        refused(address, "is a web address. Images are not downloaded")


def test_an_error_survives_the_way_out_of_a_worker():
    """DataLoader workers rebuild an exception from its type and one text."""
    assert str(type(BadSampleError("x"))("file, record 1: broken")) == "file, record 1: broken"


def test_images_inside_an_archive_are_read(tmp_path, pictures):
    """How a streamed data set refers to its files: `zip://name::archive`, `hf://...`."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(pictures / "0.png", "0.png")
    assert load_image(f"zip://0.png::{tmp_path / 'a.zip'}").getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(BadSampleError, match="r1: image .* can't be read"):
        load_image(f"zip://gone.png::{tmp_path / 'a.zip'}", source="r1")


def test_a_thumbnail_is_small_and_leaves_the_image_alone():
    def opened(image: Image.Image) -> Image.Image:
        made = thumbnail(image, 100)
        small = Image.open(io.BytesIO(base64.b64decode(made["url"].removeprefix("data:image/jpeg;base64,"))))
        assert small.size == (made["width"], made["height"])
        return small

    image = Image.new("RGBA", (2000, 1000), (10, 200, 30, 255))
    small = opened(image)
    assert small.size == (100, 50) and small.getpixel((50, 25))[1] > 150 and image.size == (2000, 1000)
    assert opened(Image.new("L", (20, 10))).size == (20, 10)  # the control: nothing is enlarged
