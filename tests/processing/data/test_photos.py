"""The parts of `run_photos.py`: which photographs are found, their splits and copies, and that no caption is lost."""

import io
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from jnana.processing.data import load_rows
from jnana.processing.data.captions import CaptionFile, captioned_images, read_captions
from jnana.processing.data.photos import assign_splits, check_photos, find_photos, write_copies
from jnana.processing.data.records import read_records


ORIENTATION, MAKE, GPS = 0x0112, 0x010F, 0x8825
SECRET = b"Secret Camera"


def exif(orientation: int = 1) -> Image.Exif:
    """With a camera's name and a position."""
    data = Image.Exif()
    data[ORIENTATION], data[MAKE] = orientation, SECRET.decode()
    data.get_ifd(GPS)[1] = "N"
    data.get_ifd(GPS)[2] = (48.0, 51.0, 24.0)
    return data


def sideways(width: int = 64, height: int = 32) -> Image.Image:
    """As a phone stores an upright photograph: with orientation 6 the white corner belongs at the top right."""
    image = Image.new("RGB", (width, height), "black")
    image.paste("white", (0, 0, width // 4, height // 2))
    return image


def is_upright(image: Image.Image) -> bool:
    """Whether `sideways` was turned as its orientation 6 says."""
    pixels = image.convert("RGB")
    return image.size == (32, 64) and min(pixels.getpixel((28, 3))) > 240 > 15 > max(pixels.getpixel((3, 3)))


def make_photos(folder: Path, names: list[str]) -> Path:
    """Different photographs, in the format that their ending names."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = (number * 20 % 256, 255 - number * 20 % 256, 40)
        Image.new("RGB", (24, 16), colour).save(path)
    return folder


def prepare(photos: Path, output: Path, test_share: float | None = None, seed: int = 42, test_files=None, **options):
    """The steps of the script; returns the photographs and the reasons for those left out."""
    captions = read_captions(output, options.pop("prompt", None))
    found, _ = find_photos(photos, output, test_files)
    good, problems = check_photos(found, captions)
    assign_splits(good, captions, test_share, seed)
    new, broken = write_copies(good, captions, **options)
    for split, names in new.items():
        if names:
            captions[split].append(names)
    return good, problems + broken


def names(output: Path, split: str) -> list[str]:
    path = output / split / "metadata.csv"
    return [record["file_name"] for record in read_records(path)] if path.is_file() else []


def write_captions(path: Path, **captions: str) -> None:
    """Fill in captions by file name without ending, as a spreadsheet would: with other line breaks."""
    records = read_records(path)
    lines = ["file_name,text"] + [
        f'{record["file_name"]},"{captions.get(Path(record["file_name"]).stem, record["text"])}"' for record in records
    ]
    path.write_bytes("\r\n".join(lines).encode())  # no break behind the last line


class TestCopies:
    def test_upright_rgb_pixels_and_nothing_else(self, tmp_path):
        photos = tmp_path / "photos"
        photos.mkdir()
        options = {"exif": exif(6), "icc_profile": b"a profile of " + SECRET}
        sideways().save(photos / "a.jpg", quality=95, comment=SECRET, **options)
        sideways().save(photos / "b.png", **options)
        sideways().save(photos / "c.webp", lossless=True, **options)
        sideways().save(photos / "d.tif", exif=exif(6))
        sideways().save(photos / "e.avif", quality=95, **options)
        for (
            path
        ) in photos.iterdir():  # negative control: the photographs themselves fail what is asked of their copies
            assert SECRET in path.read_bytes()
            with Image.open(path) as image:
                assert not is_upright(image) or path.suffix == ".tif"  # PIL itself turns this format
        for image_format, folder in (("jpeg", tmp_path / "as jpeg"), ("png", tmp_path / "as png")):
            _, problems = prepare(photos, folder, test_share=0, image_format=image_format)
            assert problems == [] and len(names(folder, "train")) == 5
            for name in names(folder, "train"):
                copy = folder / "train" / name
                assert SECRET not in copy.read_bytes() and b"Exif" not in copy.read_bytes()
                with Image.open(copy) as image:
                    image.load()
                    assert (image.format, image.mode) == (image_format.upper(), "RGB")
                    assert (
                        len(image.getexif()) == 0 and "icc_profile" not in image.info and "comment" not in image.info
                    )
                    assert is_upright(image)

    def test_size(self, tmp_path):
        photos = tmp_path / "photos"
        photos.mkdir()
        sideways(400, 200).save(photos / "big.jpg", exif=exif(6))
        sideways(40, 20).save(photos / "small.jpg")
        prepare(photos, tmp_path / "out", test_share=0, max_size=100)
        sizes = {name: Image.open(tmp_path / "out/train" / name).size for name in names(tmp_path / "out", "train")}
        assert sizes == {"big.jpg": (50, 100), "small.jpg": (40, 20)}
        prepare(photos, tmp_path / "out", test_share=0, max_size=80)  # those that are there are not written again
        assert Image.open(tmp_path / "out/train/big.jpg").size == (50, 100)
        prepare(photos, tmp_path / "out", test_share=0, max_size=80, overwrite=True)
        assert Image.open(tmp_path / "out/train/big.jpg").size == (40, 80)
        assert names(tmp_path / "out", "train") == ["big.jpg", "small.jpg"]

    def test_a_lost_copy_is_written_again(self, tmp_path):
        photos = make_photos(tmp_path / "photos", ["a.jpg", "b.jpg"])
        prepare(photos, tmp_path / "out", test_share=0)
        (tmp_path / "out/train/a.jpg").unlink()
        prepare(photos, tmp_path / "out", test_share=0, image_format="png")  # its line names a.jpg
        assert Image.open(tmp_path / "out/train/a.jpg").format == "JPEG" and len(names(tmp_path / "out", "train")) == 2


class TestFinding:
    def test_subfolders_other_files_and_hidden_ones(self, tmp_path):
        photos = make_photos(tmp_path, ["b.JPG", "white/a.png", ".trash/c.jpg", "._b.jpg", "out/train/copy.jpg"])
        for name in ("clip.MOV", "white/notes.txt", "raw.dng"):
            (photos / name).write_text("x")
        found, others = find_photos(photos, photos / "out")
        assert [photo.name for photo in found] == ["b.JPG", "white/a.png"]
        assert [photo.stem for photo in found] == ["b", "white/a_png"]
        assert dict(others) == {".mov": 1, ".txt": 1, ".dng": 1}
        assert len(find_photos(photos, photos / "elsewhere")[0]) == 3  # the control: the copies would be found

    def test_nothing_there(self, tmp_path):
        with pytest.raises(ValueError, match="photos .* holds no photograph; endings read: .jpg .* .heic"):
            find_photos(tmp_path, tmp_path / "out")

    def test_names_that_would_meet(self, tmp_path):
        photos = make_photos(tmp_path / "photos", ["a.png", "a.jpg", "train/b.jpg", "test/b.jpg"])
        assert len(find_photos(photos, tmp_path)[0]) == 4
        make_photos(photos, ["b.jpg"])  # where it goes is not known yet
        with pytest.raises(
            ValueError, match="copies of b.jpg and test/b.jpg; of b.jpg and train/b.jpg would have one"
        ):
            find_photos(photos, tmp_path)

    def test_bad_files_are_listed_and_the_others_used(self, tmp_path):
        photos = make_photos(tmp_path / "photos", ["a.jpg", "b.jpg"])
        (photos / "text.jpg").write_text("no image")
        whole = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 255, (60, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(whole, "JPEG")
        (photos / "half.jpg").write_bytes(whole.getvalue()[:-900])
        shutil.copy(photos / "b.jpg", photos / "b (1).jpg")
        used, problems = prepare(photos, tmp_path / "out", test_share=0)
        assert names(tmp_path / "out", "train") == ["a.jpg", "b.jpg"]
        assert [problem.split(":")[0] for problem in problems] == ["text.jpg", "b (1).jpg", "half.jpg"]
        assert "not an image of a known format" in problems[0] and problems[1].endswith("the same file as b.jpg.")
        assert "truncated" in problems[2] and not (tmp_path / "out/train/half.jpg").exists()

    def test_too_many_pixels(self, tmp_path):
        photos = make_photos(tmp_path / "photos", ["a.jpg"])
        found, _ = find_photos(photos, tmp_path / "out")
        captions = read_captions(tmp_path / "out")
        good, problems = check_photos(found, captions, max_image_pixels=100)
        assert good == [] and "more than max_image_pixels=100" in problems[0]


class TestSplits:
    MANY = [f"{number:02}.jpg" for number in range(20)]

    def test_a_share(self, tmp_path):
        photos = make_photos(tmp_path / "photos", self.MANY)
        drawn = {}
        for seed in (1, 1, 2):
            output = tmp_path / f"out {seed} {seed in drawn}"
            prepare(photos, output, 0.25, seed)
            assert len(names(output, "test")) == 5 and len(names(output, "train")) == 15
            if seed in drawn:
                assert drawn[seed] == names(output, "test")
            drawn[seed] = names(output, "test")
        assert drawn[1] != drawn[2]
        prepare(photos, tmp_path / "tenth")
        assert len(names(tmp_path / "tenth", "test")) == 2
        prepare(photos, tmp_path / "none", 0)
        assert names(tmp_path / "none", "test") == [] and not (tmp_path / "none/test").exists()

    def test_more_photographs_later(self, tmp_path):
        """Nothing moves; of the new ones as many are drawn as the share of all lacks."""
        photos = make_photos(tmp_path / "photos", self.MANY[:8])
        prepare(photos, tmp_path / "out", 0.25)
        before = {split: names(tmp_path / "out", split) for split in ("train", "test")}
        make_photos(photos, self.MANY)
        prepare(photos, tmp_path / "out", 0.25, seed=7)
        for split, count in (("train", 15), ("test", 5)):
            assert names(tmp_path / "out", split)[: len(before[split])] == before[split]
            assert len(names(tmp_path / "out", split)) == count

    def test_by_folder(self, tmp_path):
        photos = make_photos(tmp_path / "photos", ["train/a.jpg", "test/a.jpg", "test/red/b.jpg", "c.jpg"])
        used, _ = prepare(photos, tmp_path / "out")
        assert {photo.name: photo.split for photo in used} == {
            "train/a.jpg": "train",
            "test/a.jpg": "test",
            "test/red/b.jpg": "test",
            "c.jpg": "train",  # chosen by hand: nothing is drawn
        }
        assert names(tmp_path / "out", "test") == ["a.jpg", "red/b.jpg"]
        assert set(names(tmp_path / "out", "train")) == {"a.jpg", "c.jpg"}
        prepare(photos, tmp_path / "out")
        assert names(tmp_path / "out", "test") == ["a.jpg", "red/b.jpg"]  # a second run adds nothing

    def test_by_list(self, tmp_path):
        photos = make_photos(tmp_path / "photos", ["a.jpg", "sub/b.jpg", "c.jpg"])
        (tmp_path / "test.txt").write_text("\nsub\\b.jpg\n")
        prepare(photos, tmp_path / "out", test_files=tmp_path / "test.txt")
        assert names(tmp_path / "out", "test") == ["sub/b.jpg"]
        (tmp_path / "test.txt").write_text("a.jpg\nd.jpg\n")
        with pytest.raises(ValueError, match="test.txt, line 2: 'd.jpg' is not among the 3 photographs"):
            find_photos(photos, tmp_path / "out", tmp_path / "test.txt")

    def test_a_captioned_photograph_is_not_moved_to_the_other_split(self, tmp_path):
        photos = make_photos(tmp_path / "photos", ["a.jpg", "b.jpg"])
        prepare(photos, tmp_path / "out", 0)
        (tmp_path / "test.txt").write_text("b.jpg")
        message = "b.jpg is chosen for test and has a line in .*train.metadata.csv. Move its copy and its line too"
        with pytest.raises(ValueError, match=message):
            prepare(photos, tmp_path / "out", test_files=tmp_path / "test.txt")
        assert len(names(tmp_path / "out", "train")) == 2

    def test_two_files_of_one_picture_go_together(self, tmp_path):
        pairs = [f"{number}.{ending}" for number in range(6) for ending in ("jpg", "png")]
        photos = make_photos(tmp_path / "photos", pairs)
        for seed in range(5):
            output = tmp_path / str(seed)
            prepare(photos, output, 0.3, seed)
            tested = {name.split("_")[0].split(".")[0] for name in names(output, "test")}
            trained = {name.split("_")[0].split(".")[0] for name in names(output, "train")}
            assert len(tested) == 2 and not tested & trained

    def test_pairs_follow_the_one_that_was_chosen_by_hand(self, tmp_path):
        photos = make_photos(tmp_path / "photos", ["test/1.png", "1.jpg", "2.png", "2.jpg", "3.jpg"])
        used, _ = prepare(photos, tmp_path / "out")
        assert {photo.name for photo in used if photo.split == "test"} == {"test/1.png", "1.jpg"}
        photos = make_photos(tmp_path / "more", ["1.png", "1.jpg", "2.png"])
        (tmp_path / "test.txt").write_text("1.png")
        used, _ = prepare(photos, tmp_path / "listed", test_files=tmp_path / "test.txt")
        assert {photo.name for photo in used if photo.split == "test"} == {"1.png", "1.jpg"}

    def test_another_photograph_of_the_same_name(self, tmp_path, caplog):
        """A second phone, or a counter that starts over."""
        first, second = (make_photos(tmp_path / name, ["a.jpg", "b.jpg"]) for name in ("first", "second"))
        prepare(first, tmp_path / "out", 0)
        copy = tmp_path / "out" / "train" / "a.jpg"
        before = copy.read_bytes()
        assert prepare(first, tmp_path / "out", 0)[1] == []  # the control: the same photographs again
        Image.new("RGB", (24, 16), "white").save(second / "a.jpg")
        (problem,) = prepare(second, tmp_path / "out", 0)[1]
        assert "a.jpg is the copy of another photograph of this name. Rename the new one" in problem
        assert copy.read_bytes() == before
        prepare(second, tmp_path / "out", 0, overwrite=True)
        assert copy.read_bytes() != before and "the photograph has changed; check its caption" in caplog.text


class TestCaptions:
    def test_no_caption_is_lost(self, tmp_path):
        photos = make_photos(tmp_path / "photos", ["a.jpg", "b.jpg", "c.jpg"])
        prepare(photos, tmp_path / "out", 0)
        file = tmp_path / "out/train/metadata.csv"
        write_captions(file, a='a white knight, ""left""', c="zwei Türme")
        filled = file.read_bytes()
        prepare(photos, tmp_path / "out", 0)
        assert file.read_bytes() == filled
        make_photos(photos, ["a.jpg", "b.jpg", "c.jpg", "d, e.jpg"])
        (photos / "b.jpg").unlink()
        prepare(photos, tmp_path / "out", 0)
        assert file.read_bytes() == filled + b'\r\n"d, e.jpg",\r\n'
        assert [(record["file_name"], record["text"]) for record in read_records(file)] == [
            ("a.jpg", 'a white knight, "left"'),
            ("b.jpg", ""),  # its photograph is gone: line and copy stay
            ("c.jpg", "zwei Türme"),
            ("d, e.jpg", ""),
        ]
        assert (tmp_path / "out/train/b.jpg").is_file()
        assert CaptionFile.read(file).empty == [f"{file}, line 3 (b.jpg)", f"{file}, line 5 (d, e.jpg)"]

    def test_of_two_copies_the_captioned_one_stays(self, tmp_path):
        photos = make_photos(tmp_path / "photos", ["knight.jpg", "other.jpg"])
        prepare(photos, tmp_path / "out", 0)
        write_captions(tmp_path / "out/train/metadata.csv", knight="a knight")
        shutil.copy(photos / "knight.jpg", photos / "a.jpg")  # its name comes first
        _, problems = prepare(photos, tmp_path / "out", 0.5)
        assert problems == ["a.jpg: the same file as knight.jpg."]
        assert names(tmp_path / "out", "train") == ["knight.jpg", "other.jpg"]
        assert not (tmp_path / "out/test").exists()

    def test_columns_of_ones_own_are_kept(self, tmp_path):
        photos = make_photos(tmp_path / "photos", ["a.jpg", "b.jpg"])
        (tmp_path / "out/train").mkdir(parents=True)
        file = tmp_path / "out/train/metadata.csv"
        file.write_text("category,caption,file_name\npawn,a pawn,a.jpg\n")
        prepare(photos, tmp_path / "out", 0)
        assert file.read_text() == "category,caption,file_name\npawn,a pawn,a.jpg\n,,b.jpg\n"
        with pytest.raises(ValueError, match="prompt is 'What.*, but .*metadata.csv has no column 'question'"):
            read_captions(tmp_path / "out", "What is it?")

    @pytest.mark.parametrize(
        "content, message",
        [
            (b"file_name;text\na.jpg;a pawn\n", r"columns \['file_name;text'\]; needed are .* with commas, in UTF-8"),
            ("file_name,text\na.jpg,zwei Türme\n".encode("cp1252"), "is not UTF-8 text"),
            (b"file_name,text\na.jpg,one, two\n", "line 2: more cells than the header has columns"),
        ],
        ids=["semicolons", "another encoding", "commas"],
    )
    def test_a_file_that_does_not_parse_is_left_alone(self, tmp_path, content, message):
        photos = make_photos(tmp_path / "photos", ["a.jpg", "b.jpg"])
        (tmp_path / "out/train").mkdir(parents=True)
        file = tmp_path / "out/train/metadata.csv"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            prepare(photos, tmp_path / "out", 0)
        assert file.read_bytes() == content and len(list((tmp_path / "out").rglob("*.jpg"))) == 0

    def test_captions_in_json_lines_are_not_hidden(self, tmp_path):
        make_photos(tmp_path / "photos", ["a.jpg"])
        (tmp_path / "out/test").mkdir(parents=True)
        (tmp_path / "out/test/metadata.jsonl").write_text("{}")
        with pytest.raises(ValueError, match="metadata.jsonl: captions in JSON Lines can't be added to"):
            read_captions(tmp_path / "out")

    def test_our_reader_and_that_of_datasets_read_it(self, tmp_path):
        photos = make_photos(tmp_path / "photos", ["a.jpg", "sub/b.jpg", "test/ü.jpg"])
        prepare(photos, tmp_path / "out")
        for split in ("train", "test"):
            file = tmp_path / "out" / split / "metadata.csv"
            file.write_text(file.read_text(encoding="utf-8").replace("jpg,", "jpg,a pawn"), encoding="utf-8")
        for split, count in (("train", 2), ("test", 1)):
            rows = load_rows(tmp_path / "out" / split, prompt="What is it?")
            assert len(rows) == count and rows[0]["conversations"][0][1]["content"][0]["text"] == "a pawn"
            assert load_rows(tmp_path / "out", split=split, prompt="What is it?")[:] == rows[:]
        stock = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
        assert {split: len(stock[split]) for split in stock} == {"train": 2, "test": 1}
        assert stock["test"][0]["text"] == "a pawn" and stock["test"][0]["image"].size == (24, 16)


class TestUpload:
    @pytest.fixture
    def captioned(self, tmp_path) -> Path:
        photos = make_photos(tmp_path / "photos", ["a.jpg", "b.jpg", "test/c.jpg"])
        prepare(photos, tmp_path / "out")
        write_captions(tmp_path / "out/train/metadata.csv", a="a pawn", b="a king")
        write_captions(tmp_path / "out/test/metadata.csv", c="a pawn and a king")
        return tmp_path / "out"

    def test_columns(self, captioned):
        data = captioned_images(captioned)
        assert {split: data[split]["text"][:] for split in data} == {
            "train": ["a pawn", "a king"],
            "test": ["a pawn and a king"],
        }
        assert data["train"].features["image"] == datasets.Image() and data["test"][0]["image"].size == (24, 16)
        file = captioned / "test/metadata.csv"
        file.write_text("file_name,text,question\nc.jpg,two,How many?\n")
        data = captioned_images(captioned)
        assert data["test"]["question"][:] == ["How many?"] and data["train"]["question"][:] == ["", ""]

    def test_problems_are_named_by_line(self, captioned):
        train = captioned / "train/metadata.csv"
        write_captions(train, a=" ")
        Image.new("RGB", (9, 9)).save(captioned / "train/hand.jpg", exif=exif())
        train.write_bytes(train.read_bytes() + b"\r\nhand.jpg,by hand\r\ngone.jpg,gone\r\n")
        (captioned / "test/c.jpg").write_text("broken")
        with pytest.raises(ValueError) as caught:
            captioned_images(captioned)
        lines = str(caught.value).splitlines()
        assert lines[0] == "not uploaded:" and len(lines) == 5
        assert lines[1] == f"  {train}, line 2 (a.jpg): no caption"
        assert lines[2].startswith(f"  {train}, line 4: hand.jpg holds more than pixels: exif. Let run_photos.py")
        assert lines[3].startswith(f"  {train}, line 5: image '{captioned / 'train/gone.jpg'}' does not exist")
        assert f"{captioned / 'test/metadata.csv'}, line 2: image" in lines[4] and "not an image" in lines[4]

    def test_nothing_to_upload(self, tmp_path):
        with pytest.raises(ValueError, match="holds no captioned images; give photos first"):
            captioned_images(tmp_path)
