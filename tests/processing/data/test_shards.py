"""Data in shards: WebDataset tar files and parquet files by a pattern, streamed or not, give the rows one expects."""

import io
import json
import tarfile

import datasets
import pytest

from jnana.processing.data import load_image, load_rows
from jnana.processing.data.rows import iterate_rows


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
                    member = tarfile.TarInfo(f"sample{number}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
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
