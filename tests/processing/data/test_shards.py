"""Data in shards: WebDataset tar files and parquet files by a pattern, streamed or not, give the rows one expects."""

import io
import json
import tarfile

import datasets
import pytest

from jnana.processing.data import check_rows, load_image, load_rows
from jnana.processing.data.rows import iterate_rows, rows_to_dataset


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
