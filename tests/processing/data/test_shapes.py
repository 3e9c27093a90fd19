"""The record of each shape is read as its writers mean it, and docs/data.md shows the same records."""

import csv
import io
import json
import tarfile

import datasets
import pytest

from jnana.processing.data import load_rows
from jnana.processing.data.checks import check_row
from tests.processing.data.shapes import DOCS, SHAPES, Shape, table, with_table
from tests.processing.data.test_readers import said


def write(shape: Shape, folder):
    path = folder / shape.file
    if shape.file.endswith(".csv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(shape.record))
            writer.writeheader()
            writer.writerow(shape.record)
    elif shape.file.endswith(".tar"):
        with tarfile.open(path, "w") as archive:
            for name, content in shape.record.items():
                data = (folder / "0.png").read_bytes() if content is None else content.encode()
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    else:
        content = [shape.record] if shape.file == "a.json" else shape.record
        path.write_text(json.dumps(content) + "\n")
    return path


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_record_of_each_shape(tmp_path, pictures, shape, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (row,) = load_rows(write(shape, pictures))
    assert said(row["conversations"][0]) == shape.said
    assert len(row["images"]) == 1
    check_row(row)


def test_the_table_in_the_docs_is_that_of_the_fixtures():
    page = DOCS.read_text(encoding="utf-8")
    assert with_table(page) == page, "run python -m tests.processing.data.shapes"
    assert with_table(page.replace("A king.", "A queen.")) == page  # the control: a changed page is noticed
    assert table().count("\n") == len(SHAPES) + 2
