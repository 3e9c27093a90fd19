"""Records as people write them: what can't be read as a text or an image is a bad sample, with file and record."""

import io
import json
import logging
import re
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from jnana.evaluation.questions import QuestionSet
from jnana.processing import JnanaProcessor
from jnana.processing.data import BadSampleError, JnanaCollator, check_rows, load_image, load_rows
from jnana.processing.data.checks import check_row
from tests.processing.data.test_readers import read_one, said
from tests.tiny import save_tiny_vision, tiny_tokenizer


def turns(*texts) -> list[dict]:
    return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]


def messages(*texts) -> list[dict]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


ODD = [["a dog", "a cat"], {"text": "a dog"}, 5, 2.5, True, float("nan"), [{"type": "text", "text": "hi"}]]


@pytest.mark.parametrize("value", ODD, ids=repr)
@pytest.mark.parametrize("file", ["a.json", "a.jsonl"])
def test_a_value_that_is_no_text_is_no_label(tmp_path, value, file):
    for record in (
        {"conversations": turns("What?", value)},
        {"conversations": turns(value, "A king.")},
        {"conversations": [{"role": "user", "content": "What?"}, {"from": "gpt", "value": value}]},
        {"conversations": turns("What?", "A king."), "system": value if value == value else 5},
    ):
        with pytest.raises(BadSampleError, match=rf"{file}, record 0.*(not a text|not a list)"):
            check_row(read_one(tmp_path, record, file))


@pytest.mark.parametrize("content", [5, True, {"text": "a"}, ["x"], [None], [{"type": "video"}], [{"text": 5}]])
def test_contents_of_messages(tmp_path, content):
    with pytest.raises(
        BadSampleError, match="a.jsonl, record 0: (the content|part 0|the text of part 0) of messages 1"
    ):
        check_row(read_one(tmp_path, {"messages": messages("What?", content)}, "a.jsonl"))


@pytest.mark.parametrize("file", ["a.json", "metadata.jsonl"])
def test_captions_that_are_no_texts(tmp_path, file):
    """A column of several types; a list of texts is several captions."""
    records = [{"file_name": "0.png", "text": text} for text in ("a", ["b", "c"], {"x": 1}, 5, [["d"]])]
    (tmp_path / file).write_text("\n".join(map(json.dumps, records)) if file[-1] == "l" else json.dumps(records))
    rows = load_rows(tmp_path / file)
    assert [said(chat)[1] for row in rows.select([0, 1]) for chat in row["conversations"]] == [
        "assistant:a",
        "assistant:b",
        "assistant:c",
    ]
    for row in rows.select([2, 3, 4]):
        with pytest.raises(BadSampleError):
            check_row(row)


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_column_of_numbers_is_read_as_texts_and_said_once(tmp_path, caplog, kind):
    columns = {"question": ["How many?", "And?", None], "answer": [3, 4, 5]}
    path = tmp_path / f"a.{kind}"
    if kind == "json":
        path.write_text(
            json.dumps([dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)])
        )
    else:
        datasets.Dataset.from_dict(columns).to_parquet(path)
    with caplog.at_level(logging.WARNING):
        rows = load_rows(path)
    assert [said(row["conversations"][0])[1] for row in rows] == [f"assistant:{n}" for n in (3, 4, 5)]
    assert sum("'answer' holds numbers or booleans" in record.message for record in caplog.records) == 1
    path = tmp_path / "mixed.json"  # the control
    path.write_text(json.dumps([{"question": "a", "answer": 3}, {"question": "b", "answer": "four"}]))
    with pytest.raises(BadSampleError, match="mixed.json, record 0: answer is 3, not a text"):
        check_row(load_rows(path)[0])


def test_nulls_in_a_parquet_file(tmp_path):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"text": ["a", None], "image": ["a.png", "b.png"]}).to_parquet(path)
    with pytest.raises(BadSampleError, match="a.parquet, record 1: an answer or caption without text"):
        check_row(load_rows(path)[1])
    schema = pa.schema({"messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))})
    pa.parquet.write_table(pa.Table.from_pylist([{"messages": None}], schema=schema), path)
    with pytest.raises(BadSampleError, match="a.parquet, record 0: no conversation"):
        check_row(load_rows(path)[0])


OPENING = [{"from": "gpt", "value": "Hello!"}]


@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize("field", ["conversations", "messages"])
def test_an_opening_answer_is_left_out_and_counted(tmp_path, caplog, field, independent):
    record = {field: OPENING + turns("<image>\nWhat?", "A king."), "image": "red.png", "category": ["x", "y"]}
    row = read_one(tmp_path, record, independent_turns=independent)
    assert said(row["conversations"][0]) == ["user:[]What?", "assistant:A king."] and len(row["conversations"]) == 1
    assert row["categories"] == ["y"]
    assert "1 answers in front of the first question" in caplog.text


def test_an_answer_alone_is_a_caption_in_align_only(tmp_path):
    record = {"image": "red.png", "conversations": OPENING}
    row = read_one(tmp_path, record, captions=True)
    assert said(row["conversations"][0]) == ["user:[]", "assistant:Hello!"]
    check_row(row, needs_images=True)
    for without in (read_one(tmp_path, record), read_one(tmp_path, {"conversations": OPENING}, captions=True)):
        with pytest.raises(BadSampleError, match="an answer without a question"):
            check_row(without)


def test_align_takes_no_conversation_without_an_image(tmp_path, processor, pictures):
    records = [{"image": "0.png", "conversations": turns("a", "b")}, {"conversations": turns("2+2?", "4")}]
    (tmp_path / "a.json").write_text(json.dumps(records))
    rows = load_rows(tmp_path / "a.json", image_folder=pictures)
    assert check_rows(rows, processor, progress=False).problems == []  # the control: sft takes both
    report = check_rows(rows, processor, needs_images=True, on_bad_sample="skip", progress=False)
    assert report.kept_indices == [0]
    assert re.search("a.json, record 1: .*without an image, which trains nothing in run_align", report.problems[0])
    with pytest.raises(BadSampleError, match="trains nothing in run_align"):
        JnanaCollator(processor, needs_images=True)([rows[1]])


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (5, "image is 5, not a file name"),
        (0, "image is 0, not a file name"),
        (float("nan"), "image is nan, not a file name"),
        (["a.png", None], "image 1 is None, not a file name"),
        ({"name": "a.png"}, "image is {'name': 'a.png'}, not a file name"),
        ("a\0.png", "which no file can be named"),
        ("\ud83d.png", "which no file can be named"),
        ("data:image/png;base64," + "A" * 8_000_000, "a text of 8,000,022 characters"),
        ("A" * 8_000_000, "a text of 8,000,000 characters"),
    ],
    ids=["number", "zero", "NaN", "null in a list", "object", "NUL", "surrogate", "base64 URL", "base64"],
)
@pytest.mark.parametrize("file", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("chat", [{"conversations": turns("a", "b")}, {"messages": messages("a", "b")}, {"text": "a"}])
def test_image_values_that_name_no_file(tmp_path, image, problem, file, chat):
    with pytest.raises(BadSampleError) as caught:
        check_row(read_one(tmp_path, {"image": image, **chat}, file))
    assert problem in str(caught.value) and f"{file}, record 0" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("chat", [{"conversations": turns("a", "b")}, {"messages": messages("a", "b")}])
def test_an_address_is_named_as_one(tmp_path, chat):
    row = read_one(tmp_path, {"image": "https://example.org/a.jpg", **chat})
    assert row["images"][0]["path"] == "https://example.org/a.jpg"
    with pytest.raises(BadSampleError, match=r"record 0: .* is a web address. Images are not downloaded: save it"):
        load_image(row["images"][0], source=row["source"])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "0.png"},
        {"type": "image", "path": "0.png"},
        {"type": "image_url", "image_url": {"url": "0.png"}},
        {"image": "0.png"},
    ],
)
@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_parts_that_name_their_own_image(tmp_path, part, field):
    content = [part, {"type": "text", "text": "What?"}]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "A king."}]
    row = read_one(tmp_path, {field: chat})
    assert said(row["conversations"][0]) == ["user:[]What?", "assistant:A king."]
    assert row["images"] == [{"path": str(tmp_path / "0.png"), "bytes": None}]
    with pytest.raises(BadSampleError, match="image parts name images of their own .* Keep one of them"):
        check_row(read_one(tmp_path, {field: chat, "images": ["1.png"]}))


def test_images_of_records_under_different_names(tmp_path):
    records = [
        {"image": "a.png", "conversations": turns("a", "b")},
        {"images": ["b.png"], "conversations": turns("a", "b")},
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    assert [row["images"][0]["path"][-5:] for row in load_rows(tmp_path / "a.json")] == ["a.png", "b.png"]


@pytest.mark.parametrize("streaming", [False, True])
def test_raw_bytes_in_a_parquet_file(tmp_path, pictures, streaming):
    data = [(pictures / name).read_bytes() for name in ("0.png", "1.png")]
    table = pa.table({"image": pa.array([data[0], None, data[1]], pa.binary()), "text": ["red", "none", "green"]})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    rows = list(load_rows(tmp_path / "a.parquet", streaming=streaming))
    assert [len(row["images"]) for row in rows] == [1, 0, 1]
    assert load_image(rows[2]["images"][0]).getpixel((0, 0)) == (0, 128, 0)


def coco(tmp_path, images, annotations):
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return load_rows(tmp_path / "c.json")


def test_ids_of_coco(tmp_path):
    images = [{"id": 1, "file_name": "a.png"}, {"id": "2", "file_name": "b.png"}]
    captions = [{"image_id": "1", "caption": "a"}, {"image_id": 2, "caption": "b"}, {"image_id": 1.0, "caption": "c"}]
    rows = coco(tmp_path, images, captions)
    found = [(row["images"][0]["path"][-5:], [said(chat)[1][-1] for chat in row["conversations"]]) for row in rows]
    assert found == [("a.png", ["a", "c"]), ("b.png", ["b"])]
    for other in (1, "1"):
        with pytest.raises(ValueError, match="c.json, images 1: id 1 is that of 'a.png' and of 'b.png'"):
            coco(tmp_path, [images[0], {"id": other, "file_name": "b.png"}], captions)
    for odd, problem in (
        ({"image_id": 9, "caption": "a"}, "image_id 9"),
        ({"image_id": 1, "caption": [1]}, "a caption"),
    ):
        with pytest.raises(BadSampleError, match=rf"c.json, image 0 .*: {problem} is"):
            check_row(coco(tmp_path, images, [odd])[0])


@pytest.mark.parametrize("field", ["conversations", "messages"])
def test_metadata_of_an_image_folder_with_conversations(pictures, field):
    chat = turns("<image>\nWhat?", "A king.") if field == "conversations" else messages("What?", "A king.")
    (pictures / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", field: chat}) + "\n")
    row = load_rows(pictures)[0]
    assert said(row["conversations"][0]) == ["user:[]What?", "assistant:A king."]
    assert row["images"][0]["path"] == str(pictures / "0.png")
    assert row["source"] == "metadata.jsonl, record 0 (0.png)"


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("others", [1, 7])
def test_several_endings_in_one_archive(tmp_path, pictures, streaming, others, monkeypatch):
    """`datasets` raises if the first samples differ, and loses the images of later ones."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    png, jpg = (pictures / "0.png").read_bytes(), (pictures / "2.jpg").read_bytes()
    samples = [("png", png)] * others + [("JPG", jpg)]
    files = [
        (f"{n}.{end}", data)
        for n, (ending, data) in enumerate(samples)
        for end, data in ((ending, data), ("txt", b"x"))
    ]
    write_tar(tmp_path / "a.tar", files)
    rows = list(load_rows(tmp_path / "a.tar", streaming=streaming))
    assert [len(row["images"]) for row in rows] == [1] * (others + 1)
    assert rows[-1]["images"][0]["bytes"] == jpg and rows[0]["images"][0]["bytes"] == png


def test_shards_whose_end_was_cut_off(tmp_path, pictures):
    write_tar(tmp_path / "a.tar", [("0.png", (pictures / "0.png").read_bytes()), ("0.txt", b"x" * 5000)])
    datasets.Dataset.from_dict({"text": ["a"] * 100}).to_parquet(tmp_path / "a.parquet")
    for name, end in (("a.tar", 1500), ("a.tar", 800), ("a.parquet", -20)):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:end])
        for streaming in (False, True):
            with pytest.raises(ValueError, match=rf"{name} is not a whole \w+ file .* Copy or write it again"):
                load_rows(tmp_path / name, streaming=streaming)


def test_a_saved_data_set_without_the_split(tmp_path):
    datasets.DatasetDict({"validation": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match="no split 'train'; it has validation. Set train_split or eval_split"):
        load_rows(tmp_path / "d")
    assert len(load_rows(tmp_path / "d", split="validation")) == 1
    assert len(load_rows(tmp_path / "d" / "validation")) == 1  # the other remedy


def test_the_text_column_can_be_named(tmp_path):
    record = {"image": "a.png", "sentence": "a red thing"}
    with pytest.raises(ValueError, match="--text_column NAME"):
        read_one(tmp_path, record)
    assert said(read_one(tmp_path, record, text_column="sentence")["conversations"][0])[1] == "assistant:a red thing"


@pytest.mark.parametrize("answers", [["red", " "], [""]])
def test_an_empty_reference_answer_is_not_scored(tmp_path, answers):
    good = {"conversations": turns("What?", "red"), "answers": ["red"]}
    assert len(QuestionSet([read_one(tmp_path, good)])) == 1  # the control
    with pytest.raises(
        ValueError, match="1 rows of the evaluation data can't be scored:\n.*record 0: an empty accepted"
    ):
        QuestionSet([read_one(tmp_path, {**good, "answers": answers})])
    with pytest.raises(ValueError, match="record 0: an answer or caption without text"):
        QuestionSet([read_one(tmp_path, {"conversations": turns("What?", "")})])
    with pytest.raises(ValueError, match="record 0: .*not a text"):
        QuestionSet([read_one(tmp_path, {"conversations": turns("What?", ["a"])})])


def test_a_tokenizer_without_an_end_token(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "text")
    save_tiny_vision(tmp_path / "clip")
    with pytest.raises(ValueError, match="text' has no `eos_token`.*from_pretrained"):
        JnanaProcessor.from_vision_text_pretrained(tmp_path / "clip", tmp_path / "text")


def test_streams_count_opening_answers(tmp_path, pictures, caplog, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    chat = [{"role": "assistant", "content": "Hello."}, *messages("Why?", "So.")]
    pa.parquet.write_table(pa.Table.from_pylist([{"messages": chat}] * 25), tmp_path / "a.parquet")
    rows = list(load_rows(tmp_path / "a.parquet", streaming=True))
    assert len(rows) == 25 and all(len(row["conversations"][0]) == 2 for row in rows)
    said = [record.message for record in caplog.records if "in front of the first question" in record.message]
    assert [text.split("so far ")[1].split()[0] for text in said] == ["1", "10"]


def test_images_named_in_tags(tmp_path):
    """The first Qwen-VL's records."""
    said = "Picture 1: <img>0.png</img>\nPicture 2: <img>1.png</img>\nWhich?"
    chat = [{"from": "user", "value": said}, {"from": "assistant", "value": "The first."}]
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": chat}, {"image": "0.png", "conversations": chat}]))
    good, bad = load_rows(tmp_path / "a.json")
    assert [Path(image["path"]).name for image in good["images"]] == ["0.png", "1.png"]
    parts = good["conversations"][0][0]["content"]
    assert [part["text"] or "[]" for part in parts] == ["Picture 1:", "[]", "Picture 2:", "[]", "Which?"]
    with pytest.raises(BadSampleError, match="a.json, record 1: .* names an image of its own .* Keep one of them"):
        check_row(bad)
