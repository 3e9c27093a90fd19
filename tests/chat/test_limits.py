"""Limits on requests: every refusal names its limit and contains no path."""

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from jnana.chat.limits import (
    Limits,
    Refused,
    _decode,
    check_decoder,
    check_files,
    check_question,
    read_image,
    read_upload,
)
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


def test_heic_and_avif_uploads_are_decoded_in_the_process_of_uploads_alone(tmp_path):
    """Also larger ones than the limit, as telephones make them: they are scaled down."""
    image = Image.new("RGB", (1200, 800), "red")
    image.paste("blue", (0, 0, 600, 800))
    pillow_heif.from_pillow(image).save(tmp_path / "photo.heic")
    image.save(tmp_path / "photo.avif")
    limits = Limits(image_megapixels=0.5)
    for name in ("photo.heic", "photo.avif"):
        got = read_image(tmp_path / name, limits)
        assert 0.49e6 < got.width * got.height <= 0.5e6 and got.width == pytest.approx(1.5 * got.height, abs=2)
        red, green, blue = got.getpixel((got.width // 4, 10))
        assert blue > 200 and red < 60 and green < 60
        assert read_image(tmp_path / name, LIMITS).size == (1200, 800)
        with pytest.raises(Refused):  # the control: more than twice the limit
            read_image(tmp_path / name, Limits(image_megapixels=0.4))
    assert "HEIF" not in Image.OPEN  # nothing else of this process opens HEIC
    (tmp_path / "cut.heic").write_bytes((tmp_path / "photo.heic").read_bytes()[:300])
    with pytest.raises(Refused, match="complete JPEG, PNG, .* HEIC file"):
        read_image(tmp_path / "cut.heic", LIMITS)


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
    with pytest.raises(Refused, match="more than the 1 MB that are allowed"):
        read_upload(tmp_path / "large.bin", LIMITS)
    assert check_question(" why? ", LIMITS) == "why?"
    assert check_question("a \ud800 \U0001f600", LIMITS) == "a ? \U0001f600"  # a lone surrogate cannot be encoded
    with pytest.raises(Refused, match="4,001 characters; at most 4,000"):
        check_question("a" * 4001, LIMITS)


def test_addresses_are_refused_wherever_a_request_hides_them(tmp_path):
    hostile = {"path": "http://169.254.169.254/latest/meta-data", "meta": {"_type": "gradio.FileData"}}
    for payload in (hostile, [1, {"deep": [hostile]}], {"path": "file:///etc/passwd"}):
        with pytest.raises(Refused, match="not fetched"):
            check_files(payload, tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    harmless = {"path": str(tmp_path / "a.png"), "url": "http://127.0.0.1:7860/file=/uploads/a.png"}
    check_files([harmless, "see http://example.com", None, 3, {"path": None}], tmp_path)


def test_only_uploaded_files_are_taken(tmp_path):
    uploads = tmp_path / "uploads"
    (uploads / "deep").mkdir(parents=True)
    (uploads / "deep" / "a.png").write_bytes(b"")
    (tmp_path / "secret.png").write_bytes(b"")
    (uploads / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(uploads / "pipe")
    foreign = ["/dev/zero", "/etc/passwd", "/no/such/file", "", "uploads", "a\0b", 3, ["x"], str(uploads)]
    foreign += [str(tmp_path / "secret.png"), str(uploads / ".." / "secret.png"), str(uploads / "link.png")]
    foreign += [str(uploads / "pipe"), str(tmp_path / "uploads2"), "\ud800"]
    said = set()
    for path in foreign:
        with pytest.raises(Refused) as refusal:
            check_files([None, {"deep": {"path": path}}], uploads)
        said.add(str(refusal.value))
    assert len(said) == 1  # nothing tells whether a file exists
    check_files([{"path": str(uploads / "deep" / "a.png")}], uploads)  # the control


def test_a_file_that_is_none_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path, tmp_path / "missing.png"):
        with pytest.raises(Refused, match="not uploaded here"):
            read_upload(path, LIMITS)


def test_formats_whose_decoders_crash_are_not_opened(tmp_path):
    Image.new("1", (64, 64)).save(tmp_path / "fax.tiff", compression="group4")
    Image.new("RGB", (64, 64)).save(tmp_path / "plain.tiff")
    for name in ("fax.tiff", "plain.tiff"):
        with pytest.raises(Refused, match="JPEG, PNG, WEBP, GIF, BMP, AVIF, HEIC file"):
            read_image(tmp_path / name, LIMITS)


@pytest.mark.parametrize("accident", ["os.abort()", "os.kill(os.getpid(), 9)", "time.sleep(60)"])
def test_a_decoder_that_crashes_ends_only_its_own_process(tmp_path, monkeypatch, accident):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "good.png")
    crashing = tmp_path / "crashing.py"
    crashing.write_text(
        f"import os, resource, time; resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31)); {accident}"
    )
    check_decoder()
    with monkeypatch.context() as patch:
        patch.setattr("jnana.chat.decode_upload.__file__", str(crashing))
        patch.setattr("jnana.chat.limits.DECODE_SECONDS", 1)
        with pytest.raises(Refused, match="can't be used as a picture"):
            read_image(tmp_path / "good.png", LIMITS)
    assert read_image(tmp_path / "good.png", LIMITS).getpixel((5, 5)) == (255, 0, 0)  # the control


def test_pixels_are_those_of_the_file(tmp_path):
    """Upright, on white where it is transparent, 16-bit greys scaled: what training decodes."""
    turned = Image.new("RGB", (40, 20), "blue")
    turned.paste("red", (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.new("RGBA", (8, 8), (0, 0, 255, 0)).save(tmp_path / "transparent.png")
    Image.new("I;16", (8, 8), 32896).save(tmp_path / "grey.png")
    for mode in ("L", "1", "RGB"):  # one colour is transparent
        black = (0, 0, 0) if mode == "RGB" else 0
        Image.new(mode, (8, 8), black).save(tmp_path / f"transparent_{mode}.png", transparency=black)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    upright = read_image(tmp_path / "turned.png", LIMITS)
    assert upright.size == (20, 40) and upright.getpixel((10, 2)) == (255, 0, 0)
    assert read_image(tmp_path / "transparent.png", LIMITS).getpixel((1, 1)) == (255, 255, 255)
    for mode in ("L", "1", "RGB"):
        assert read_image(tmp_path / f"transparent_{mode}.png", LIMITS).getpixel((1, 1)) == (255, 255, 255), mode
    assert read_image(tmp_path / "grey.png", LIMITS).getpixel((1, 1)) == (128, 128, 128)
    for file in tmp_path.iterdir():
        assert list(read_image(file, LIMITS).getdata()) == list(load_image(file).getdata()), file.name


SET_LIMITS = """
import resource, sys
from PIL import Image
resource.setrlimit(resource.RLIMIT_AS, (3 * 10**9, 3 * 10**9)), resource.setrlimit(resource.RLIMIT_CPU, (15, 15))
sys.argv[1:] = ["1"]
from jnana.chat import decode_upload
decode_upload.MEMORY = 4 * 10**9
decode_upload.limit_resources()
print(resource.getrlimit(resource.RLIMIT_AS), resource.getrlimit(resource.RLIMIT_CPU))
"""


def test_limits_that_are_set_already_are_kept():
    done = subprocess.run([sys.executable, "-c", SET_LIMITS], capture_output=True, text=True)
    assert done.stdout.split("\n")[-2] == "(3000000000, 3000000000) (15, 15)", done.stderr[-2000:]


def test_a_decoder_that_does_not_start_is_no_bad_image(tmp_path, monkeypatch):
    """Its cause is raised at the start of the app, and logged later."""
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    monkeypatch.setattr("jnana.chat.limits.PIL.__file__", str(tmp_path / "nowhere" / "PIL" / "__init__.py"))
    monkeypatch.setattr("jnana.chat.limits.sys.executable", sys._base_executable)  # without Pillow
    for call in (check_decoder, lambda: read_image(tmp_path / "good.png", LIMITS)):
        with pytest.raises(RuntimeError, match="can't run: ModuleNotFoundError: No module named 'PIL'"):
            call()


def test_the_decoder_sees_no_secrets(tmp_path, monkeypatch):
    spy = tmp_path / "spy.py"
    spy.write_text("import os, sys; print(sorted(os.environ), file=sys.stderr); sys.exit(3)")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr("jnana.chat.decode_upload.__file__", str(spy))
    with pytest.raises(ValueError) as told:
        _decode(b"", 1)
    assert "HF_TOKEN" not in str(told.value) and "[" in str(told.value)


def test_large_photographs_are_scaled_down(tmp_path):
    photo = Image.radial_gradient("L").resize((2000, 1500)).convert("RGB")
    photo.save(tmp_path / "photo.jpg")
    found = read_image(tmp_path / "photo.jpg", LIMITS)
    assert found.size == (1000, 750)
    expected = photo.resize(found.size)
    difference = np.abs(np.asarray(found, dtype=int) - np.asarray(expected, dtype=int))
    assert difference.mean() < 3
    photo.save(tmp_path / "panorama.jpg", format="MPO", save_all=True, append_images=[photo.resize((8, 8))])
    assert read_image(tmp_path / "panorama.jpg", LIMITS).size == (1000, 750)
    photo.save(tmp_path / "photo.png")  # the control: PNG can't be scaled while it is decoded
    with pytest.raises(Refused, match="at most 1 megapixels"):
        read_image(tmp_path / "photo.png", LIMITS)


def test_limits_that_allow_nothing_are_refused():
    with pytest.raises(ValueError, match="queue_length is 0"):
        Limits(queue_length=0)
