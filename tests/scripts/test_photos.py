"""From a phone's folder to a data set on disk and on the Hub, through `run_photos.py` as its user starts it."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pillow_heif
import pyarrow.parquet
import pytest
from PIL import Image

from jnana import run_photos
from jnana.processing.data import load_image, load_rows
from jnana.processing.data.records import read_records
from jnana.training.options.recipes import read_recipe
from tests.scripts.hub import LocalHub
from tests.scripts.launching import ROOT


RECIPE = ROOT / "recipes" / "llava_chess"
CAMERA, PLACE = b"Secret Camera", b"Secret Place"


def phone(folder: Path, numbers: range) -> Path:
    """Sideways HEIC photographs with a camera and a position in their EXIF data, each of another brightness."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        image = Image.new("RGB", (64, 32), (number * 10, 20, 60))
        image.paste("white", (0, 0, 16, 16))  # turned, it is at the top right
        exif = Image.Exif()
        exif[0x0112], exif[0x010F] = 6, CAMERA.decode()
        exif.get_ifd(0x8825)[1], exif.get_ifd(0x8825)[29] = "N", PLACE.decode()
        data = io.BytesIO()
        pillow_heif.from_pillow(image).save(data, quality=95, exif=exif.tobytes())
        assert CAMERA in data.getvalue() and PLACE in data.getvalue()
        (folder / f"IMG_{number:04}.HEIC").write_bytes(data.getvalue())
    return folder


@pytest.fixture
def hub():
    hub = LocalHub()
    yield hub
    hub.close()


def shell(commands: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run shell commands in `folder`, in which the clone's scripts seem to be."""
    for script in ROOT.glob("run_*.py"):
        if not (folder / script.name).exists():
            (folder / script.name).symlink_to(script)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = ["bash", "-euc", commands]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def to_hub(hub: LocalHub, folder: Path) -> dict[str, str]:
    """The environment of a logged-in user of that Hub."""
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "hub"), "HF_TOKEN": "hf_x"}
    return environment | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}


def fill_in(file: Path, caption: str) -> list[str]:
    """Write a caption with its number into each line that has none; returns all captions."""
    lines = file.read_text(encoding="utf-8").splitlines()
    lines = [line + f"{caption} {number}" if line.endswith(",") else line for number, line in enumerate(lines)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [record["text"] for record in read_records(file)]


READ = """
import sys
from jnana import load_rows
for split in ("train", "test"):
    for row in load_rows("me/chess-photos", format="dataset", split=split, prompt="What?"):
        print(split, row["conversations"][0][1]["content"][0]["text"])
"""


def test_the_commands_of_the_recipe(tmp_path, hub):
    """As its README has them: copies, captions by hand, more photographs, and a data set that others read."""
    blocks = re.findall(r"```bash\n(.*?)```", (RECIPE / "README.md").read_text(), re.DOTALL)
    make, push = (block for block in blocks if "run_photos.py" in block)
    phone(tmp_path / "chess_pictures", range(4))
    phone(tmp_path / "chess_pictures" / "test", range(10, 12))
    done = shell(make, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Photographs: 100%" in done.stderr and "6 photographs, 6 new, 0 left out" in done.stdout
    assert "test/metadata.csv: 2 lines, 2 without a caption" in done.stdout

    recipe = read_recipe(RECIPE / "sft.yaml")
    train, test = tmp_path / recipe["train_data"], tmp_path / recipe["eval_data"]
    refused = shell(push, tmp_path, **to_hub(hub, tmp_path))
    assert refused.returncode == 1 and hub.created == []
    assert (
        refused.stderr.count(": no caption") == 6 and "test/metadata.csv, line 2 (IMG_0010_heic.jpg)" in refused.stderr
    )

    captions = fill_in(train / "metadata.csv", "a white knight"), fill_in(test / "metadata.csv", "two rooks")
    phone(tmp_path / "chess_pictures", range(4, 5))
    assert "7 photographs, 1 new" in shell(make, tmp_path).stdout
    assert [record["text"] for record in read_records(train / "metadata.csv")] == [*captions[0], ""]
    captions = fill_in(train / "metadata.csv", "a white knight"), captions[1]

    for folder, known, format in ((train, captions[0], "train_format"), (test, captions[1], "eval_format")):
        rows = load_rows(folder, format=recipe[format], prompt=recipe["prompt"])
        assert len(rows) == len(known)
        for row, caption in zip(rows, known, strict=True):
            question, answer = row["conversations"][0]
            assert question["content"][1]["text"] == "What do you see in this picture?"
            assert answer["content"][0]["text"] == caption
            image = load_image(row["images"][0])
            assert image.size == (32, 64) and min(image.getpixel((28, 3))) > 240 > max(image.getpixel((3, 3)))
            data = Path(row["images"][0]["path"]).read_bytes()
            assert CAMERA not in data and PLACE not in data

    pushed = shell(push, tmp_path, **to_hub(hub, tmp_path))
    assert pushed.returncode == 0 and hub.unknown == [], pushed.stderr + str(hub.unknown)
    assert hub.created[0]["type"] == "dataset" and hub.created[0]["visibility"] == "private" and len(hub.commits) == 1
    assert set(hub.files) == {f"data/{split}-00000-of-00001.parquet" for split in ("train", "test")} | {"README.md"}
    for name, data in hub.files.items():
        assert CAMERA not in data and PLACE not in data and str(tmp_path).encode() not in data
        if name.endswith(".parquet"):
            assert pyarrow.parquet.read_table(io.BytesIO(data)).column_names == ["image", "text"]
    read = shell(f"python -c '{READ}'", tmp_path, **to_hub(hub, tmp_path / "another"), PYTHONPATH=str(ROOT))
    assert read.returncode == 0 and hub.unknown == [], read.stderr + str(hub.unknown)
    expected = [f"train {caption}" for caption in captions[0]] + [f"test {caption}" for caption in captions[1]]
    assert read.stdout.splitlines() == expected


def test_a_mixed_folder(tmp_path, capsys):
    """Unreadable files are listed and the others copied; the question column is that of `prompt`."""
    photos = phone(tmp_path / "photos", range(3))
    Image.new("CMYK", (20, 10), (0, 255, 255, 0)).save(photos / "scan.jpg")
    (photos / "broken.heic").write_bytes((photos / "IMG_0000.HEIC").read_bytes()[:300])
    (photos / "IMG_0000.AAE").write_text("edits")
    arguments = ["--photos", str(photos), "--output_dir", str(photos / "out"), "--test_share", "0.25", "--seed", "3"]
    run_photos.main([*arguments, "--prompt", "What is it?", "--image_format", "png"])
    logged = capsys.readouterr().out
    assert "5 photographs, 4 new, 1 left out" in logged and "left out: broken.heic: image" in logged
    assert "other files: 1 .aae" in logged
    train, test = (read_records(photos / "out" / split / "metadata.csv") for split in ("train", "test"))
    assert len(train) == 3 and len(test) == 1
    assert {record["question"] for record in train + test} == {"What is it?"}
    names = {record["file_name"] for record in train + test}
    assert names == {"scan.png", "IMG_0000_heic.png", "IMG_0001_heic.png", "IMG_0002_heic.png"}
    (photos / "IMG_0001.HEIC").unlink()
    run_photos.main(arguments)
    logged = capsys.readouterr().out
    assert "4 photographs, 0 new" in logged and "IMG_0001_heic.png: its photograph is gone" in logged
    assert len(read_records(photos / "out/train/metadata.csv")) == 3


def test_without_pillow_heif(tmp_path, monkeypatch):
    """One error, before anything is written."""
    photos = phone(tmp_path / "photos", range(3))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImportError, match=r"IMG_0000.HEIC' is an HEIC image, .* pip install 'jnana\[photos\]'"):
        run_photos.main(["--photos", str(photos), "--output_dir", str(tmp_path / "out")])
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"photos": None}, "give photos and output_dir, or output_dir and push_to_hub"),
        ({"output_dir": None}, "give photos and output_dir, or output_dir and push_to_hub"),
        ({"photos": "nowhere"}, "photos 'nowhere' is not a directory"),
        ({"output_dir": "photos"}, "are one directory"),
        ({"test_files": "nowhere.txt"}, "test_files 'nowhere.txt' is not a file"),
        ({"test_share": "1"}, "test_share is 1.0; give a share of at least 0 and below 1"),
        ({"max_size": "0"}, "max_size is 0; give a number of pixels above 0"),
        ({"push_to_hub": "a/b/c"}, "Repo id must be in the form"),
        ({"test_shares": "1"}, "unknown key 'test_shares' in the command line; the nearest known key is 'test_share'"),
    ],
)
def test_refused_at_once(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    phone(tmp_path / "photos", range(1))
    options = {"photos": "photos", "output_dir": "out", **changes}
    with pytest.raises(ValueError, match=message):
        run_photos.main([f"--{name}={value}" for name, value in options.items() if value is not None])
    assert not (tmp_path / "out" / "train").exists()


@pytest.mark.parametrize(
    ("photos", "output_dir"),
    [("a", "a"), ("a/train", "a"), ("a/Test/deep", "a"), ("a", "a/train"), ("a", "a/test/deep")],
)
def test_copies_never_get_the_paths_of_photographs(tmp_path, photos, output_dir):
    (tmp_path / photos).mkdir(parents=True)
    picture = tmp_path / photos / "IMG_1.jpg"
    Image.effect_noise((200, 200), 90).save(picture)
    before = picture.read_bytes()
    with pytest.raises(ValueError, match="are one directory, or one is the train or test directory of the other"):
        run_photos.main([f"--photos={tmp_path / photos}", f"--output_dir={tmp_path / output_dir}", "--max_size=20"])
    assert picture.read_bytes() == before
    run_photos.main([f"--photos={tmp_path / photos}", f"--output_dir={tmp_path / 'out'}"])  # the control
    assert picture.read_bytes() == before and list((tmp_path / "out").rglob("*.jpg"))
