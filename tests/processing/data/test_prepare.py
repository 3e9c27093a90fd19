"""`prepare`: the same conversations in every packing, checked once; image tokens are counted per image."""

import json
import pickle
import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest
from datasets import IterableDataset
from PIL import Image

from jnana.processing.data import (
    BadSampleError,
    JnanaCollator,
    PrepareOptions,
    check_rows,
    packed_rows,
    plan_rows,
    prepare,
    read_bad_samples,
)
from jnana.processing.data.packing import expand_images, measure_conversation
from jnana.processing.data.rows import IMAGE_PART, make_row, message, rows_to_dataset, text_part


@pytest.fixture
def coco(tmp_path, pictures):
    names = ["0.png", "1.png", "2.jpg", "gone.png"]
    captions = [(number, f"rook {number} " + "king " * turn) for number in range(4) for turn in range(3)]
    content = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
        "annotations": [{"image_id": number, "caption": caption} for number, caption in captions],
    }
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(content))
    return path


def supervised(processor, rows, options: PrepareOptions) -> Counter:
    """The supervised texts of all rows, as one batch."""
    texts: Counter = Counter()
    for labels in JnanaCollator(processor, **options.for_collator)(list(rows))["labels"]:
        texts.update(processor.decode(labels[labels != -100]).split("<|endoftext|>")[:-1])
    return texts


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packing", ["none", "rows", "shared_image"])
def test_every_packing_holds_the_good_conversations(coco, pictures, tmp_path, processor, packing, streaming):
    options = PrepareOptions(
        image_folder=pictures,
        packing=packing,
        streaming=streaming,
        on_bad_sample="skip",
        bad_samples_file=tmp_path / "bad.jsonl",
        max_length=60,
        max_row_tokens=80,
        seed=0,
        progress=False,
    )
    rows = prepare(coco, processor, options)
    assert isinstance(rows, IterableDataset) == streaming
    assert supervised(processor, rows, options) == {
        f" rook {number} {'king ' * turn}".rstrip(): 1 for number in range(3) for turn in range(3)
    }
    assert len(read_bad_samples(tmp_path / "bad.jsonl")) in ((1, 3) if streaming else (1,))  # rows or conversations
    with pytest.raises(BadSampleError, match="gone.png' does not exist"):  # the control
        strict = PrepareOptions(image_folder=pictures, packing=packing, streaming=streaming, max_length=60)
        supervised(processor, prepare(coco, processor, strict), strict)


@pytest.mark.parametrize("kept", [False, True])
def test_other_processes_use_the_result_of_the_first(coco, pictures, tmp_path, processor, kept, monkeypatch):
    """With several processes, one of them prepares and the others receive what it found."""
    results = []

    def first(function):
        results.append(pickle.dumps(function()))
        return pickle.loads(results[0])

    options = PrepareOptions(
        image_folder=pictures,
        on_bad_sample="skip",
        bad_samples_file=tmp_path / "bad.jsonl",
        data_cache=tmp_path / "cache" if kept else None,
        progress=False,
    )
    rows = list(prepare(coco, processor, options, first))
    sent = pickle.loads(results[0])
    (of_source,) = sent.prepared
    assert isinstance(sent.index, Path) and isinstance(of_source.file if kept else of_source.columns, Path)
    assert of_source.report.lengths == [] and len(results[0]) < 2000  # files of this machine, no tokens
    monkeypatch.setattr(type(processor), "encode_chats", None)
    assert list(prepare(coco, processor, options, lambda function: pickle.loads(results[0]))) == rows
    assert [row["source"].split(",")[1] for row in rows] == [f" image {i} (id {i})" for i in (0, 1, 2) for _ in "abc"]
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 1  # written by the first process only


def test_without_a_place_for_files_the_rows_are_sent(coco, pictures, processor, monkeypatch, caplog):
    def refuse():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["jnana.processing.data.prepare"], "temporary_directory", refuse)
    options = PrepareOptions(image_folder=pictures, on_bad_sample="skip", packing="rows", progress=False)
    rows = prepare(coco, processor, options, lambda function: pickle.loads(pickle.dumps(function())))
    assert "No space left on device), so each process holds its own copy" in caplog.text
    assert list(rows) == list(prepare(coco, processor, options))


IMAGE = 7


def test_measuring_and_expanding_agree():
    ids, mask = [1, IMAGE, 2, IMAGE, IMAGE, 3, 4, IMAGE, 5], [0, 0, 0, 0, 0, 0, 1, 0, 1]
    counts = [3, 1, 2, 4]
    expanded, expanded_mask = expand_images(ids, mask, IMAGE, counts)
    assert expanded == [1] + [IMAGE] * 3 + [2] + [IMAGE] * 3 + [3, 4] + [IMAGE] * 4 + [5]
    assert [token for token, on in zip(expanded, expanded_mask, strict=True) if on] == [4, 5]
    size = measure_conversation(ids, mask, IMAGE, counts)
    assert (size.length, size.first_label, size.images_end) == (15, expanded.index(4), 14)
    assert measure_conversation([1, 2], [0, 0], IMAGE, []).first_label is None
    for wrong in ([3, 1, 2], [1] * 5, []):
        with pytest.raises(ValueError, match=f"about {len(wrong)} images has 4 image tokens"):
            measure_conversation(ids, mask, IMAGE, wrong)


@pytest.mark.parametrize("image_check", ["header", "decode"])
def test_planned_sizes_hold_for_images_of_different_token_counts(processor, tmp_path, monkeypatch, image_check):
    """If the processor gives wide images more tokens, the check, the plan and the batch all count them so."""
    for name, size in {"small": (24, 24), "wide": (80, 24)}.items():
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")

    def row(*names: str) -> dict:
        images = [{"path": str(tmp_path / f"{name}.png"), "bytes": None} for name in names]
        users = [message("user", *[IMAGE_PART] * len(names), text_part(text)) for text in ("what?", "whose?")]
        return make_row(images, [[user, message("assistant", text_part("a rook"))] for user in users], str(names))

    rows = [row("small"), row("wide"), row("wide", "small"), row("small", "wide", "wide"), row()]

    def sizes() -> tuple[list[int], list[int]]:
        """Tokens of each packed row: planned, and in the batch."""
        report = check_rows(rows, processor, image_check=image_check, progress=False)
        plan = plan_rows(report.lengths, report.shared, 256)
        collator = JnanaCollator(processor, packing="shared_image")
        single = [JnanaCollator(processor)([item])["attention_mask"].sum(1).tolist() for item in rows]
        assert single == report.lengths
        return plan.sizes, [
            collator([item])["input_ids"].shape[1] for item in packed_rows(rows_to_dataset(rows), plan)
        ]

    equal, batch_sizes = sizes()
    assert equal == batch_sizes
    monkeypatch.setattr(type(processor), "count_image_tokens", lambda self, size=None: 9 if size[1] > size[0] else 4)
    planned, batch_sizes = sizes()
    assert planned == batch_sizes and sum(planned) == sum(equal) + 4 * 5  # four wide images, each once


@pytest.mark.parametrize("max_length", [None, 18])
@pytest.mark.parametrize("packing", ["none", "rows", "shared_image"])
def test_the_column_length_counts_the_tokens_of_a_row(coco, pictures, processor, packing, max_length):
    """The Trainer's `train_sampling_strategy` reads it; without it, it would take the rows' `pixel_values`."""
    options = PrepareOptions(
        image_folder=pictures, packing=packing, max_length=max_length, max_row_tokens=40, on_bad_sample="skip"
    )
    rows = prepare(coco, processor, options)
    collator = JnanaCollator(processor, **options.for_collator)
    counted = [collator([row])["input_ids"].shape[1] for row in rows]
    assert rows["length"][:] == counted and (max_length is not None or len(set(counted)) > 1)
    assert rows.select([2, 0])["length"][:] == [counted[2], counted[0]]


def test_a_data_set_without_rows(processor):
    empty = datasets.Dataset.from_dict({"image": [], "text": []})
    with pytest.raises(ValueError, match="data set has no rows"):
        prepare(empty, processor, PrepareOptions())


def test_a_stream_of_which_no_row_can_be_used(coco, pictures, processor):
    """Skipping every row, a run would train on the blank image alone and end well."""
    options = {"image_folder": pictures, "packing": "shared_image", "streaming": True, "on_bad_sample": "skip"}
    rows = prepare(coco, processor, PrepareOptions(**options, max_length=3, max_row_tokens=60))
    with pytest.raises(BadSampleError, match=r"none of the first 4 rows of the stream can be used: .* does not fit"):
        list(rows)
    good = prepare(coco, processor, PrepareOptions(**options, max_length=60, max_row_tokens=60))
    assert len(list(good)) > 1  # the control: one bad row among good ones


def test_the_log_names_the_limit_of_the_model(coco, pictures, processor, caplog):
    caplog.set_level("INFO", "jnana.processing.data.prepare")
    options = PrepareOptions(image_folder=pictures, max_length=16, on_bad_sample="skip")
    prepare(coco, processor, options)
    assert "are cut to max_length 16" in caplog.text and "max_position" not in caplog.text
    options.max_length_source = "the max_position_embeddings of the language model"
    prepare(coco, processor, options)
    assert "are cut to max_length 16 (the max_position_embeddings of the language model)" in caplog.text
