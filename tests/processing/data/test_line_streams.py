"""JSON Lines as streams: the rows of the file read as a whole, one record in memory at a time."""

import json
import pickle
import tracemalloc
from itertools import islice

import pytest

from jnana.processing.data import BadSampleError, line_streams, load_rows
from jnana.processing.data.checks import check_row
from jnana.processing.data.line_streams import MARKED, PARTS, scan


def llava(number: int) -> dict:
    turns = [{"from": "human", "value": f"what is {number}?"}, {"from": "gpt", "value": "a king"}]
    return {"id": str(number), "conversations": turns}


def captions(number: int) -> dict:
    return {"image": f"{number}.png", "text": f"caption {number}", "year": number}


def write(path, records, blank: int = 7):
    """With a byte order mark, and blank lines."""
    lines = [
        json.dumps(record) + "\n" + ("\n \n" if number % blank == 0 else "") for number, record in enumerate(records)
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "".join(lines).encode())
    return path


@pytest.mark.parametrize("number", [1, 63, 64, 65, 2 * MARKED + 5])
@pytest.mark.parametrize("record", [llava, captions], ids=["conversations", "captions"])
def test_the_rows_of_the_whole_file(tmp_path, record, number):
    path = write(tmp_path / "a.jsonl", map(record, range(number)))
    stream = load_rows(path, streaming=True)
    assert list(stream) == list(load_rows(path))
    assert stream.num_shards == min(number, PARTS)
    parts = [row["source"] for index in range(stream.num_shards) for row in stream.shard(stream.num_shards, index)]
    assert parts == list(load_rows(path)["source"])  # as they are dealt out to processes and workers


def test_the_first_rows_and_a_pickle(tmp_path):
    path = write(tmp_path / "a.jsonl", map(llava, range(200)))
    stream = load_rows(path, streaming=True, max_rows=150)
    assert list(stream) == list(load_rows(path, max_rows=150))
    assert list(pickle.loads(pickle.dumps(stream))) == list(stream)  # as it is sent to a worker
    options = {"format": "dataset", "text_column": "text"}
    path = write(tmp_path / "b.jsonl", map(captions, range(20)))
    assert list(load_rows(path, streaming=True, **options)) == list(load_rows(path, **options))
    with pytest.raises(ValueError, match="speed: not an option of a local file"):
        load_rows(path, streaming=True, format="dataset", speed=3)


def test_a_broken_line_is_a_bad_sample(tmp_path):
    """A run does not end with it; which line it is, is said."""
    path = write(tmp_path / "a.jsonl", map(llava, range(150)))
    lines = path.read_bytes().split(b"\n")
    number = next(index for index, line in enumerate(lines) if b'"120"' in line)
    lines[number] = lines[number][:-5]
    path.write_bytes(b"\n".join(lines))
    rows = list(load_rows(path, streaming=True))
    assert len(rows) == 150
    with pytest.raises(BadSampleError, match=rf"a.jsonl, record 120: .*a.jsonl, line {number + 1}, column"):
        check_row(rows[120])
    for index in (119, 121):
        check_row(rows[index])
    with pytest.raises(ValueError, match=f"line {number + 1}"):  # the control: read as a whole
        load_rows(path)


def test_memory_is_flat(tmp_path):
    """A quarter of a file of 4 MB is more than a stream holds, and far less than its rows take."""
    path = tmp_path / "a.jsonl"
    with open(path, "w") as file:
        for number in range(2000):
            record = llava(number)
            record["conversations"][1]["value"] = "king " * 400
            file.write(json.dumps(record) + "\n")
    size = path.stat().st_size

    def peak(streaming: bool) -> int:
        tracemalloc.start()
        rows = load_rows(path, streaming=streaming)
        assert sum(1 for _ in islice(iter(rows), 2000)) == 2000
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(True) < size / 4
    assert peak(False) > size / 2  # the control


def test_parts_cover_the_file(tmp_path):
    path = write(tmp_path / "a.jsonl", map(llava, range(3 * MARKED)))
    parts, found = scan(path, columns=["id", "image"])
    assert [record["id"] for record in found] == ["0"]
    assert [part.first for part in parts[1:]] == [part.first + part.count for part in parts[:-1]]
    assert sum(part.count for part in parts) == 3 * MARKED and all(part.skipped < MARKED for part in parts)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert scan(tmp_path / "empty.jsonl") == ([], [])


def test_only_the_rows_that_are_needed_are_scanned(tmp_path, monkeypatch):
    """The first rows of a huge file do not take reading all of it: a fence behind them is not reached."""
    path = write(tmp_path / "a.jsonl", map(llava, range(3 * MARKED)))
    wanted = list(load_rows(path, streaming=True, max_rows=40))
    size = path.stat().st_size

    class Fenced:
        """Lines of a file that may not be read further than its first fifth."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __iter__(self):
            read = 0
            for line in self.file:
                read += len(line)
                assert read < size / 5, "the scan goes on behind the last row"
                yield line

    monkeypatch.setattr(line_streams, "open", lambda *given: Fenced(open(*given)), raising=False)
    parts, _ = scan(path, max_rows=40)
    assert sum(part.count for part in parts) == 40 == len(wanted)
    with pytest.raises(AssertionError, match="behind the last row"):  # the control
        scan(path)


# ---------------------------------------------------------------------- columns of later records


def with_image(number: int) -> dict:
    record = llava(number)
    record["conversations"][0]["value"] = f"<image>\nwhat is {number}?"
    return {**record, "image": f"{number}.png"}


def named(number: int) -> dict:
    return {"caption": f"caption {number}", "file_name": f"{number}.png"}


LATER = {
    "images": (llava, with_image),
    "messages": (
        captions,
        lambda number: {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ),
    "questions": (captions, lambda number: {**captions(number), "question": f"what is {number}?", "category": "b"}),
    "texts": (named, lambda number: {**named(number), "text": number}),
}


@pytest.mark.parametrize("kinds", LATER.values(), ids=LATER)
def test_columns_that_later_records_have(tmp_path, kinds):
    """Text-only records first, records with an image after them: the rows are those of the whole file."""
    first, then = kinds
    path = write(tmp_path / "a.jsonl", [*map(first, range(110)), *map(then, range(110, 150))])
    whole = list(load_rows(path))
    assert list(load_rows(path, streaming=True)) == whole
    assert list(load_rows(path, streaming=True, max_rows=120)) == list(load_rows(path, max_rows=120))
    if first is llava:
        assert sum(len(row["images"]) for row in load_rows(path, streaming=True)) == 40


def test_a_column_that_is_asked_for_and_comes_later(tmp_path):
    records = [
        captions(number) if number < 110 else {**captions(number), "photo": f"{number}.jpg"} for number in range(120)
    ]
    path = write(tmp_path / "a.jsonl", records)
    rows = list(load_rows(path, streaming=True, format="dataset", image_column="photo"))
    assert rows == list(load_rows(path, format="dataset", image_column="photo"))
    assert sum(len(row["images"]) for row in rows) == 10
    with pytest.raises(ValueError, match="no column 'foto'"):
        load_rows(path, streaming=True, format="dataset", image_column="foto")
