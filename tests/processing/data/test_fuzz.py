"""Mutated files of each format: a record is read right or is a bad sample, or an error names the file."""

import csv
import json
import random
import time

import pyarrow as pa
import pyarrow.parquet
import pytest

from jnana.processing.data import check_rows, load_rows
from jnana.processing.data.rows import rows_to_dataset
from tests.processing.data.shapes import Shape
from tests.processing.data.test_readers import LLAVA
from tests.processing.data.test_shapes import write


MUTATIONS = 250
SECONDS = 5  # per format; a slow machine tries fewer mutations
ODD = [None, True, False, 0, 5, -1, 2.5, 1e300, float("nan"), float("inf"), [], {}, [[]], [None], ["a", "b"], [1, 2]]
ODD += ["", " ", "<image>", "\ud83d", "\0", "x" * 5000, "../../x", "user", "gpt"]
ODD += ["https://example.org/a.png", "data:image/png;base64,AAAA", {"path": None, "bytes": None}]
ODD += [{"text": "a"}, {"type": "image"}, [{"type": "text", "text": ["a"]}]]
MESSAGES = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A king."}]},
        ],
        "images": ["0.png"],
        "category": "piece",
    },
    {"id": 4, "messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
]
COCO = {
    "images": [{"id": 10, "file_name": "0.png"}, {"id": 11, "file_name": "1.png"}],
    "annotations": [{"image_id": n, "id": n, "caption": f"field {n}"} for n in (10, 11)],
}
QUESTIONS = [{"image": "0.png", "question": "What?", "answers": ["red", "Red"], "category": "c"} for _ in range(3)]
FOLDER = [{"file_name": "0.png", "text": "red"}, {"file_name": "1.png", "text": "green", "question": "Which?"}]
CONTENTS = {
    "llava.json": LLAVA,
    "messages.jsonl": MESSAGES,
    "coco.json": COCO,
    "questions.jsonl": QUESTIONS,
    "metadata.jsonl": FOLDER,
    "table.csv": FOLDER,
    "table.parquet": QUESTIONS,
    "messages.parquet": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
    "shard.tar": LLAVA[:2],
}


def places(value, path=()):
    """The paths of all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutate(content, chance: random.Random):
    content = json.loads(json.dumps(content))
    for _ in range(chance.randint(1, 2)):
        *path, key = chance.choice(list(places(content)))
        parent = content
        for step in path:
            parent = parent[step]
        what = chance.random()
        if what < 0.7:
            parent[key] = chance.choice(ODD)
        elif what < 0.85 and isinstance(parent, dict):
            del parent[key]
        else:
            other = chance.choice(list(places(content)))
            value = content
            for step in other:
                value = value[step]
            parent[key] = json.loads(json.dumps(value))
    return content


def write_file(path, content, chance: random.Random):
    """Write the content; one file in ten is cut off. `False` if the format can't hold it."""
    records = [record if isinstance(record, dict) else {"text": record} for record in content]
    if path.suffix == ".tar":
        files = {
            f"{n}.{ending}": text
            for n, c in enumerate(content)
            for ending, text in (("png", None), ("json", json.dumps(c)))
        }
        shape = Shape("", "", path.name, files, [])
        write(shape, path.parent)
    elif path.suffix == ".parquet":
        try:
            pa.parquet.write_table(pa.Table.from_pylist(records), path)
        except (pa.ArrowException, UnicodeError):
            return False
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8", errors="replace") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for record in records for name in record)))
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in content))
    else:
        path.write_text(json.dumps(content))
    if chance.random() < 0.1:
        data = path.read_bytes()
        path.write_bytes(data[: chance.randrange(len(data))])
    return True


def strings(value) -> set[str]:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {value} if isinstance(value, str) else {text for item in items for text in strings(item)}


@pytest.mark.parametrize("name", CONTENTS)
def test_mutated_files(tmp_path, pictures, processor, name, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    chance = random.Random(name)
    end = time.monotonic() + SECONDS
    tried = good = bad = raised = 0
    path = pictures / name
    while tried < MUTATIONS and (time.monotonic() < end or tried < 5):
        content = mutate(CONTENTS[name], chance)
        if not content or not write_file(path, content, chance):
            continue
        tried += 1
        try:
            rows = rows_to_dataset(load_rows(path, image_folder=pictures, streaming=path.suffix == ".tar"))
            report = check_rows(rows, processor, on_bad_sample="skip", progress=False)
        except (ValueError, FileNotFoundError) as error:
            message = str(error)
            assert name in message and len(message) < 30_000, (message, content)
            raised += 1
            continue
        good, bad = good + len(report.kept_indices), bad + len(report.problems)
        assert all(name in problem and len(problem) < 6_500 for problem in report.problems), report.problems
        if path.suffix == ".csv":  # its cells are texts
            continue
        written = [text.encode("utf-8", "replace").decode() for text in strings(content)]
        for row in rows.select(report.kept_indices):
            for chat in row["conversations"]:
                for message in chat:
                    assert message["role"] in ("system", "user", "assistant")
                    for part in message["content"]:
                        text = (part["text"] or "").strip()
                        assert any(text in other for other in written) or json.dumps(plain(text)) == text, (
                            text,
                            content,
                        )
    print(name, tried, good, bad, raised)
    assert good > 0 and bad + raised > tried / 20


def plain(text: str):
    """A number or boolean that a column of them holds."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, (int, float)) else None
