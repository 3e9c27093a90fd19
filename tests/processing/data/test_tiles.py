"""Images that are cut into tiles: the number of image tokens depends on the size, from the check to the batch."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from jnana.processing.data import (
    BadSampleError,
    JnanaCollator,
    PrepareOptions,
    check_rows,
    packed_rows,
    packing,
    plan_rows,
    prepare,
    read_bad_samples,
)
from jnana.processing.data import images as images_module
from jnana.processing.data.prepare import packed_stream
from jnana.processing.data.rows import rows_to_dataset
from tests.modeling.packed import assert_same_batch, difference, loss_and_gradients
from tests.processing.data.test_images import png_header
from tests.tiles import KINDS, SIZES, row, rows_of, save_pictures, tile_pair


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict:
    """Models with their processors. Shared: tests restore what they change."""
    return {kind: tile_pair(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture
def processor(pairs):
    return pairs["llava_next"][1]


@pytest.fixture
def paths(tmp_path) -> list[Path]:
    return save_pictures(tmp_path / "pictures")


@pytest.fixture
def opened(monkeypatch) -> list:
    """The names of all image files that are opened."""
    names = []
    original = images_module._open

    def noting(image, *args):
        names.append(Path(image["path"]).name)
        return original(image, *args)

    monkeypatch.setattr(images_module, "_open", noting)
    return names


# ---------------------------------------------------------------------- counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("image_check", ["none", "header", "decode"])
def test_checked_and_planned_lengths_are_those_of_the_batch(pairs, paths, kind, image_check):
    processor = pairs[kind][1]
    rows = rows_of(paths)
    report = check_rows(rows, processor, image_check=image_check, progress=False)
    padded = JnanaCollator(processor)
    single = [padded([row])["attention_mask"].sum(1).tolist() for row in rows]
    assert report.lengths == single and len({max(lengths) for lengths in single}) > 3
    for share in (True, False):
        plan = plan_rows(report.lengths, report.shared if share else None, 200, seed=1)
        collator = JnanaCollator(processor, packing="shared_image" if share else "rows")
        items = packed_rows(rows_to_dataset(rows), plan)
        assert [collator([item])["input_ids"].shape[1] for item in items] == plan.sizes == items["length"][:]


def write_records(folder: Path, paths: list[Path]) -> Path:
    """A LLaVA-Instruct file with two questions about each image."""
    records = []
    for number, path in enumerate(paths):
        turns = [("human", "<image>\nwhat?"), ("gpt", f"rook {number}"), ("human", "why?"), ("gpt", f"king {number}")]
        turns = [{"from": speaker, "value": text} for speaker, text in turns]
        records.append({"id": str(number), "image": path.name, "conversations": turns})
    (folder / "records.json").write_text(json.dumps(records))
    return folder / "records.json"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packing", ["none", "rows", "shared_image"])
def test_rows_of_every_packing(processor, paths, tmp_path, packing, streaming):
    """Bad images are left out, and so are those whose tokens do not fit into `max_length`: 3 and 4 of 24 tokens."""
    folder = paths[0].parent
    (folder / "text.png").write_text("no image")
    (folder / "large.png").write_bytes(png_header(60_000, 60_000))
    names = [paths[0], folder / "gone.png", paths[1], paths[3], folder / "text.png", *paths[4:], folder / "large.png"]
    options = PrepareOptions(
        image_folder=folder,
        packing=packing,
        streaming=streaming,
        on_bad_sample="skip",
        bad_samples_file=tmp_path / "bad.jsonl",
        image_check="none",
        max_length=44,
        max_row_tokens=100,
        progress=False,
    )
    rows = prepare(write_records(tmp_path, names), processor, options)
    collator = JnanaCollator(processor, **options.for_collator)
    texts: Counter = Counter()
    for item in rows:
        skipped = collator.num_bad_samples
        batch = collator([item])
        if collator.num_bad_samples > skipped:
            continue  # the batch repeats an earlier conversation
        width = batch["input_ids"].shape[1]
        assert width <= (44 if packing == "none" else 100) and (streaming or width == item["length"])
        for line in batch["labels"]:
            texts.update(processor.decode(line[line != -100]).split("<|endoftext|>")[:-1])
    assert texts == {f" {piece} {number}": 1 for number in (0, 2, 6) for piece in ("rook", "king")}
    problems = "\n".join(read_bad_samples(tmp_path / "bad.jsonl"))
    for part in (
        "gone.png' does not exist",
        "not an image of a known format",
        "large.png' .*pixels",
        "images end at 24",
    ):
        assert re.search(part, problems), part


@pytest.mark.parametrize("share", [False, True])
def test_a_stream_reads_headers_only_where_tiles_need_them(processor, paths, opened, monkeypatch, share):
    rows = [row([path], ["yes", "a king"], source=f"record {number}") for number, path in enumerate(paths)]
    stream = rows_to_dataset(rows).to_iterable_dataset()
    decoded = []
    monkeypatch.setattr(images_module, "_decode", lambda *args: decoded.append(args))
    options = {"share": share, "max_row_tokens": 120, "max_length": 120}
    list(packed_stream(stream, processor, **options))
    assert sorted(opened) == sorted(path.name for path in paths) and not decoded
    opened.clear()
    monkeypatch.setattr(type(processor), "image_grid_pinpoints", None)  # the control: images of one size
    list(packed_stream(stream, processor, **options))
    check_rows(rows, processor, image_check="none", progress=False)
    assert not opened


def test_a_stream_resumes_with_the_same_rows(processor, paths):
    rows = [row([paths[number % 6]], ["yes", "a king"], source=f"record {number}") for number in range(40)]
    options = {"share": True, "max_row_tokens": 120, "max_length": 120}
    stream = packed_stream(rows_to_dataset(rows).to_iterable_dataset(), processor, **options)
    sources = [[row["source"] for row in item["groups"]] for item in stream]
    assert [[row["source"] for row in item["groups"]] for item in stream.skip(3)] == sources[3:]
    collator = JnanaCollator(processor, packing="shared_image")
    widths = [collator([item])["input_ids"].shape[1] for item in stream]
    assert max(widths) <= 120 and sum(widths[:-1]) > 0.8 * 120 * len(widths[:-1])


def test_an_image_that_does_not_fit_raises(processor, paths):
    large, small = row([paths[3]], ["a king"]), row([paths[0]], ["a king"])
    ((length,),) = check_rows([large], processor, progress=False).lengths
    with pytest.raises(BadSampleError, match=f"does not fit: {length} tokens, its images end at 24"):
        check_rows([large], processor, max_length=40, progress=False)
    check_rows([small], processor, max_length=40, progress=False)  # the control: a smaller image fits
    with pytest.raises(ValueError, match=f"a conversation of data row 0 has {length} tokens"):
        plan_rows([[length]], None, 40)


def test_a_turned_photograph_is_counted_upright(processor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (90, 20)).save(tmp_path / "turned.jpg", exif=exif)
    rows = [row([tmp_path / "turned.jpg"], ["a king"])]
    (length,) = check_rows(rows, processor, progress=False).lengths[0]
    batch = JnanaCollator(processor)(rows)
    assert batch["input_ids"].shape[1] == length and batch["image_sizes"] == [(90, 20)]
    assert processor.count_image_tokens((90, 20)) != processor.count_image_tokens((20, 90))


# ---------------------------------------------------------------------- batches


def test_views_and_sizes_follow_the_images(processor, paths):
    """Each image once, in the order of its first occurrence, as the processor of the checkpoint prepares it."""
    batch = JnanaCollator(processor, packing="shared_image")([{"groups": rows_of(paths)[:4]}])
    order = [0, 1, 2, 4, 3]
    assert batch["image_indices"] == [0, 1, 2, 2, 3, 4, 3]
    assert batch["image_sizes"] == [SIZES[number] for number in order]
    counts = [processor.count_views(SIZES[number]) for number in order]
    assert len(batch["pixel_values"]) == sum(counts) and len(set(counts)) > 1
    for number, views in zip(order, batch["pixel_values"].split(counts), strict=True):
        expected = processor.image_processor(Image.open(paths[number]), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(views, expected[: len(views)]) and not expected[len(views) :].any()


def test_skipped_rows_and_the_blank_image(processor, paths):
    bad = row([paths[0].parent / "gone.png"], ["a king"], source="bad")
    good = row([paths[1], paths[2]], ["a king", "no"])
    for packing_ in ("none", "rows", "shared_image"):
        collator = JnanaCollator(processor, packing=packing_, on_bad_sample="skip")
        blank = collator([bad])
        assert blank["image_sizes"] == [(32, 32)]
        tokens = (blank["input_ids"] == processor.image_token_id).sum()
        assert tokens == processor.count_image_tokens((32, 32))
        assert len(blank["pixel_values"]) == processor.count_views((32, 32))
        batch, only = collator([bad, good]), JnanaCollator(processor, packing=packing_)([good])
        assert_same_batch(batch, only)
        first = collator([bad])  # again the first conversation of the last good batch
        assert first["image_sizes"] == [SIZES[1], SIZES[2]]


# ---------------------------------------------------------------------- packed rows train what separate rows train


def separate(processor, rows: list[dict]) -> list[dict]:
    """Each conversation as a batch of its own."""
    collator = JnanaCollator(processor)
    alone = [{**row, "conversations": [chat]} for row in rows for chat in row["conversations"]]
    return [collator([row]) for row in alone]


def batch_of(processor, rows: list[dict], packing_: str) -> dict:
    if packing_ == "none":
        return JnanaCollator(processor, packing="none")(rows)
    return JnanaCollator(processor, packing=packing_)([{"groups": rows[:3]}, {"groups": rows[3:]}])


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_unpacked(pairs, paths, kind):
    model, processor = pairs[kind]
    rows = rows_of(paths)
    expected = loss_and_gradients(model, separate(processor, rows))
    assert any("image_newline" in name for name in expected[1]) == (kind != "perceiver")
    for packing_ in ("none", "rows", "shared_image"):
        batch = batch_of(processor, rows, packing_)
        assert len(batch["image_sizes"]) == 6 and len(batch["image_indices"]) > 6
        assert difference(loss_and_gradients(model, [batch]), expected) < 1e-5, packing_
    distinct = [{**row, "conversations": row["conversations"][:1]} for row in rows[:2] + rows[4:]]
    batch = batch_of(processor, distinct, "none")
    assert "image_indices" not in batch and len(batch["image_sizes"]) == 4
    expected = loss_and_gradients(model, separate(processor, distinct))
    assert difference(loss_and_gradients(model, [batch]), expected) < 1e-5


@pytest.mark.parametrize("fault", ["sizes", "views", "indices", "branch point", "newline"])
def test_faults_are_noticed(pairs, paths, fault, monkeypatch):
    """The controls: what breaks the equality above."""
    model, processor = pairs["llava_next"]
    rows = rows_of(paths)
    expected = loss_and_gradients(model, separate(processor, rows))
    if fault == "branch point":
        original = packing.shared_length
        monkeypatch.setattr(packing, "shared_length", lambda *args: original(*args) + (original(*args) > 0))
    batch = batch_of(processor, rows, "shared_image")
    sizes = batch["image_sizes"]
    if fault == "sizes":  # of two images with the same number of views, each of which occurs once
        first, second = sizes.index(SIZES[0]), sizes.index(SIZES[5])
        sizes[first], sizes[second] = sizes[second], sizes[first]
    elif fault == "views":  # a tile and the whole image
        batch["pixel_values"][[0, 1]] = batch["pixel_values"][[1, 0]]
    elif fault == "indices":
        shown = batch["image_indices"]  # two different images with the same number of tokens change places
        first, second = sizes.index(SIZES[3]), sizes.index(SIZES[4])
        batch["image_indices"] = [{first: second, second: first}.get(index, index) for index in shown]
    elif fault == "newline":
        monkeypatch.setattr(model.model.multi_modal_projector.image_newline, "data", torch.zeros(64))
    assert difference(loss_and_gradients(model, [batch]), expected) > 1e-3


def test_an_image_of_many_tokens(tmp_path):
    """More than 150 tokens an image, five captions, rows longer than an image."""
    model, processor = tile_pair(tmp_path, "mlp", grids=((1, 2), (2, 1), (3, 3)))
    paths = save_pictures(tmp_path / "pictures", [(140, 144), (144, 120), (40, 90)])
    captions = ["a rook", "a white king and a black rook", "two", "a rook", "three pieces"]
    rows = [row([path], captions, None, source=path.name) for path in paths]
    report = check_rows(rows, processor, progress=False)
    assert [processor.count_image_tokens(size) for size in ((140, 144), (144, 120), (40, 90))] == [172, 148, 52]
    assert report.shared[0] > 172
    plan = plan_rows(report.lengths, report.shared, 500)
    items = list(packed_rows(rows_to_dataset(rows), plan))
    assert len(items) < 3 and max(plan.sizes) > 2 * 172
    packed = [JnanaCollator(processor, packing="shared_image")([item]) for item in items]
    assert [batch["input_ids"].shape[1] for batch in packed] == plan.sizes
    tokens = sum(int((batch["input_ids"] == processor.image_token_id).sum()) for batch in packed)
    assert tokens == 172 + 148 + 52  # each image once for its five captions
    expected = loss_and_gradients(model, separate(processor, rows))
    assert difference(loss_and_gradients(model, packed), expected) < 1e-5
    for batch in packed:
        batch["branch_ids"][batch["branch_ids"] == 2] = 1  # the control: two captions see each other
        del batch["packed_layout"]
    assert difference(loss_and_gradients(model, packed), expected) > 1e-3
