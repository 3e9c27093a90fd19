"""Data in shards: WebDataset tar files and parquet files by a pattern, streamed or not, give the rows one expects."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile

import datasets
import pytest

from jnana.processing.data import check_rows, load_image, load_rows, shards
from jnana.processing.data.rows import iterate_rows, rows_to_dataset
from tests.scripts.hub import LocalHub


RECORDS = [
    {"conversations": [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": f"Answer {number}."}]}
    for number in range(4)
]


def write_shards(folder, pictures, second) -> str:
    """Four samples in two tar files: an image and a second file, which `second(number)` gives as (ending, content)."""
    pictures = sorted(pictures.glob("*.png"))[:2]
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for number in (2 * shard, 2 * shard + 1):
                for ending, content in (("png", pictures[number % 2].read_bytes()), second(number)):
                    add(archive, f"sample{number}.{ending}", content)
    return str(folder / "*.tar")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["txt", "json"])
def test_tar_files(tmp_path, pictures, kind, streaming, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    contents = {"txt": lambda n: f"caption {n}".encode(), "json": lambda n: json.dumps(RECORDS[n]).encode()}
    pattern = write_shards(tmp_path, pictures, lambda number: (kind, contents[kind](number)))
    rows = load_rows(pattern, streaming=streaming)
    assert isinstance(rows, datasets.IterableDataset) is streaming
    if streaming:
        assert rows.num_shards == 2  # what processes and workers share out among them
    rows = list(iterate_rows(rows))
    answers = [row["conversations"][0][-1]["content"][-1]["text"] for row in rows]
    expected = [f"caption {n}" if kind == "txt" else f"Answer {n}." for n in range(4)]
    assert answers == expected
    for number, row in enumerate(rows):
        assert f"sample{number}" in row["source"]
        assert row["conversations"][0][0]["content"][0]["type"] == "image"
        assert load_image(row["images"][0], source=row["source"]).width > 0


def test_parquet_files(tmp_path, pictures):
    for shard in range(2):
        table = {"text": [f"caption {shard}"], "image": [str(sorted(pictures.glob("*.png"))[0])]}
        datasets.Dataset.from_dict(table).to_parquet(tmp_path / f"{shard}.parquet")
    rows = load_rows(str(tmp_path / "*.parquet"), streaming=True)
    assert rows.num_shards == 2
    assert [row["conversations"][0][-1]["content"][0]["text"] for row in rows] == ["caption 0", "caption 1"]
    with pytest.raises(FileNotFoundError, match="names no file"):
        load_rows(str(tmp_path / "*.tar"))


ODD_SAMPLES = {
    "not JSON": b"{",
    "no object": b"[1]",
    "another type": json.dumps({"conversations": 5}).encode(),
    "a turn of another type": json.dumps({"conversations": [{"from": "human", "value": ["a"]}]}).encode(),
}


@pytest.mark.parametrize("streaming", [False, True])
def test_an_odd_sample_is_a_bad_sample(tmp_path, pictures, processor, streaming, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    image = sorted(pictures.glob("*.png"))[0].read_bytes()
    chats = {"good": json.dumps(RECORDS[0]).encode(), **ODD_SAMPLES, "last": json.dumps(RECORDS[1]).encode()}
    alone = {**RECORDS[2], "image": "elsewhere.png"}
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for key, content in chats.items():
            for ending, data in (("png", image), ("json", content)):
                add(archive, f"{key}.{ending}", data)
        add(archive, "without its image.json", json.dumps(alone).encode())
    rows = rows_to_dataset(iterate_rows(load_rows(tmp_path / "a.tar", streaming=streaming)))
    report = check_rows(rows, processor, on_bad_sample="skip", progress=False)
    assert [rows[index]["source"].split("sample ")[1] for index in report.kept_indices] == ["good", "last"]
    assert len(report.problems) == len(ODD_SAMPLES) + 1
    for key, problem in zip([*ODD_SAMPLES, "without its image"], report.problems, strict=True):
        assert problem.startswith(f"{tmp_path}/a.tar, sample {key}: ")
    assert "the archive holds no image of this sample" in report.problems[-1]


def odd_archive(path, pictures) -> None:
    """One good sample, `b`, between two odd ones, with images of two endings."""
    png, jpg = (pictures / "0.png").read_bytes(), (pictures / "2.jpg").read_bytes()
    odd = {"conversations": [{"from": "human", "value": ["a"]}]}
    with tarfile.open(path, "w") as archive:
        for key, ending, image, content in (
            ("a", "png", png, odd),
            ("b", "JPG", jpg, RECORDS[0]),
            ("c", "png", png, 5),
        ):
            add(archive, f"{key}.{ending}", image)
            add(archive, f"{key}.json", json.dumps(content).encode())


@pytest.mark.parametrize("streaming", [False, True])
def test_odd_samples_of_a_directory_of_archives(tmp_path, pictures, processor, streaming, monkeypatch):
    """`datasets` takes the types of all samples from the first ones, and raises for the whole data set."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "photos"
    folder.mkdir()
    odd_archive(folder / "train.tar", pictures)
    rows = rows_to_dataset(iterate_rows(load_rows(folder, format="dataset", streaming=streaming)))
    report = check_rows(rows, processor, on_bad_sample="skip", progress=False)
    assert report.kept_indices == [1] and rows[1]["images"][0]["path"] == "b.JPG"
    for key, problem in zip("ac", report.problems, strict=True):
        assert f"train.tar, sample {key}: " in problem
    with pytest.raises((datasets.exceptions.DatasetGenerationError, ValueError)):  # the control
        datasets.load_dataset(str(folder), split="train")
    with pytest.raises(ValueError, match="no split 'test'; it has train. Set train_split or eval_split"):
        load_rows(folder, format="dataset", split="test")


# Run with an empty cache and the address of a Hub, which the libraries read when they are imported.
READ = """
import json
from jnana.processing.data import load_image, load_rows, shards
from jnana.processing.data.checks import check_row
from jnana.processing.data.rows import iterate_rows

said = []
for streaming in (False, True):
    for row in iterate_rows(load_rows("me/photos", format="dataset", streaming=streaming)):
        try:
            check_row(row)
            said.append([streaming, row["source"], load_image(row["images"][0], source="a").width])
        except ValueError as error:
            said.append([streaming, str(error), 0])
    try:
        list(load_rows("me/photos", format="dataset", split="test", streaming=streaming))
    except ValueError as error:
        said.append([streaming, str(error), 0])
print("said", json.dumps(said))
"""


def read_from(hub: str, cache, offline: bool) -> list:
    environment = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": f"{offline:d}", "HF_HOME": str(cache)}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", READ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("said ")[1])


def test_odd_and_cut_off_archives_of_the_hub(tmp_path, pictures):
    """Archives of a Hub repository, downloaded first and while they are read; and once more without a network."""
    odd_archive(tmp_path / "train.tar", pictures)
    hub = LocalHub()
    try:
        hub.created.append({})
        hub.files["train.tar"] = (tmp_path / "train.tar").read_bytes()
        hub.files["test.tar"] = hub.files["train.tar"][: hub.files["train.tar"].index(b"c.json") + 100]
        online = read_from(hub.url, tmp_path / "hub", offline=False)
    finally:
        hub.close()
    assert hub.unknown == []
    for offline in (False, True):
        said = read_from(hub.url, tmp_path / "hub", offline=True) if offline else online
        place = "/.*/" if offline else "hf://datasets/me/photos@\\w+/"
        for streaming in (False, True):
            odd, good, no_object, cut = [entry[1:] for entry in said if entry[0] is streaming]
            assert re.match(rf"{place}train.tar, sample b", good[0]) and good[1] > 0
            assert "train.tar, sample a" in odd[0] and "not a text" in odd[0]
            assert "train.tar, sample c" in no_object[0] and "holds 5, not an object" in no_object[0]
            assert "test.tar is not a whole webdataset file" in cut[0]


def test_the_archives_of_all_splits_are_downloaded(monkeypatch):
    """Without a network `datasets` opens a data set only with all files that its README declares."""
    wanted = []
    monkeypatch.setattr(shards, "_snapshot", lambda *_, allow_patterns: wanted.extend(allow_patterns) or "/snapshot")
    monkeypatch.setattr(shards, "check_whole", lambda *_: None)
    monkeypatch.setattr(shards, "_load_tar_files", lambda files, *_: files)
    addresses = [f"hf://datasets/me/photos@main/{name}" for name in ("train/0.tar", "test/[0].tar")]
    assert shards._load_archives(addresses[:1], addresses, "me/photos", False, {}) == ["/snapshot/train/0.tar"]
    assert wanted == ["train/0.tar", "test/[[]0].tar"]


@pytest.mark.parametrize("streaming", [False, True])
def test_compressed_archives_are_left_to_datasets(tmp_path, pictures, streaming, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "photos"
    folder.mkdir()
    with tarfile.open(folder / "train.tar.gz", "w:gz") as archive:
        add(archive, "0.png", sorted(pictures.glob("*.png"))[0].read_bytes())
        add(archive, "0.txt", b"red")
    (row,) = iterate_rows(load_rows(folder, format="dataset", streaming=streaming))
    assert row["conversations"][0][-1]["content"][0]["text"] == "red"
    assert len(list(load_rows(folder, format="dataset", split="all"))) == 1


def test_an_archive_that_changed_is_read_again(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for answer in ("red", "a longer answer"):
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            add(archive, "0.png", sorted(pictures.glob("*.png"))[0].read_bytes())
            add(archive, "0.txt", answer.encode() * 5000)
        (row,) = load_rows(tmp_path / "a.tar")
        assert row["conversations"][0][-1]["content"][0]["text"] == answer * 5000


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
