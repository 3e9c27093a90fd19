"""Limits on requests: every refusal names its limit and contains no path."""

import struct
import zlib
from pathlib import Path

import pillow_heif
import pytest
from PIL import Image

from jnana.chat.limits import Limits, Refused, check_question, read_image, read_upload, refuse_addresses
from jnana.processing.data import load_image


LIMITS = Limits(upload_megabytes=1, image_megapixels=1)


def bomb(path: Path, width: int, height: int) -> Path:
    """A PNG of a few hundred bytes whose header states `width` x `height` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def test_a_picture_within_the_limits_is_read(tmp_path):
    Image.new("RGB", (1000, 1000), "red").save(tmp_path / "good.png")
    assert read_image(tmp_path / "good.png", LIMITS).size == (1000, 1000)
    with pytest.raises(Refused, match="at most 0.5 megapixels"):
        read_image(tmp_path / "good.png", Limits(image_megapixels=0.5))


def test_an_heic_upload_is_refused(tmp_path):
    """Training reads such files; an upload never reaches their decoder, whatever its name."""
    for name in ("photo.heic", "photo.jpg"):
        pillow_heif.from_pillow(Image.new("RGB", (64, 64), "red")).save(tmp_path / name)
        assert load_image(tmp_path / name).size == (64, 64)  # negative control
        with pytest.raises(Refused, match="can't be used as a picture. It must be a complete JPEG, PNG"):
            read_image(tmp_path / name, LIMITS)


def test_hostile_pictures_are_refused_without_naming_paths(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>')
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.new("RGB", (900, 900), "red").save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    bomb(tmp_path / "bomb.png", 30_000, 30_000)
    bomb(tmp_path / "large.png", 1001, 1000)
    bomb(tmp_path / "line.png", 5000, 1)
    for file in sorted(tmp_path.iterdir()):
        with pytest.raises(Refused) as refusal:
            read_image(file, LIMITS)
        assert "can't be used as a picture" in str(refusal.value)
        assert str(tmp_path) not in str(refusal.value) and file.name not in str(refusal.value)
        assert refusal.value.__cause__ is None


def test_files_and_questions_have_a_size(tmp_path):
    (tmp_path / "large.bin").write_bytes(bytes(2_000_000))
    with pytest.raises(Refused, match="has 2 MB; at most 1 MB"):
        read_upload(tmp_path / "large.bin", LIMITS)
    assert check_question(" why? ", LIMITS) == "why?"
    assert check_question("a \ud800 \U0001f600", LIMITS) == "a ? \U0001f600"  # a lone surrogate cannot be encoded
    with pytest.raises(Refused, match="4,001 characters; at most 4,000"):
        check_question("a" * 4001, LIMITS)


def test_addresses_are_refused_wherever_a_request_hides_them():
    hostile = {"path": "http://169.254.169.254/latest/meta-data", "meta": {"_type": "gradio.FileData"}}
    for payload in (hostile, [1, {"deep": [hostile]}], {"path": "file:///etc/passwd"}):
        with pytest.raises(Refused, match="not fetched"):
            refuse_addresses(payload)
    harmless = {"path": "/uploads/a.png", "url": "http://127.0.0.1:7860/file=/uploads/a.png"}
    refuse_addresses([harmless, "see http://example.com", None, 3])


def test_limits_that_allow_nothing_are_refused():
    with pytest.raises(ValueError, match="queue_length is 0"):
        Limits(queue_length=0)
