"""Readers: every format gives the same rows, lazily, with sources that name file and record."""

import csv
import json
from pathlib import Path

import datasets
import pytest
from PIL import Image

from jnana.processing.data import (
    ROW_FEATURES,
    BadSampleError,
    check_rows,
    flatten_conversations,
    load_image,
    load_rows,
)
from jnana.processing.data.checks import check_row
from jnana.processing.data.rows import iterate_rows


@pytest.fixture
def coco(tmp_path, pictures) -> Path:
    content = {
        "images": [
            {"id": 10, "file_name": "0.png"},
            {"id": 11, "file_name": "1.png"},
            {"id": 12, "file_name": "2.jpg"},
        ],
        "annotations": [
            {"image_id": 11, "id": 1, "caption": "a green field"},
            {"image_id": 10, "id": 2, "caption": "a red field"},
            {"image_id": 11, "id": 3, "caption": "grass"},
        ],
    }
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(content))
    return path


LLAVA = [
    {
        "id": "000000033471",
        "image": "0.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat colour is it?"},
            {"from": "gpt", "value": "Red."},
            {"from": "human", "value": "Is that a tag?"},
            {"from": "gpt", "value": "It can be: <image>."},
        ],
    },
    {
        "id": "text",
        "conversations": [{"from": "human", "value": "What is the <image> tag?"}, {"from": "gpt", "value": "HTML."}],
    },
    {
        "id": "test",
        "image": "1.png",
        "category": "colour",
        "answers": ["green", "Green"],
        "conversations": [{"from": "human", "value": "What colour?\n<image>"}, {"from": "gpt", "value": "green"}],
    },
]


@pytest.fixture
def llava(tmp_path) -> Path:
    path = tmp_path / "instruct.json"
    path.write_text(json.dumps(LLAVA))
    return path


def said(chat: list[dict]) -> list[str]:
    """A chat in short: role, then its parts, images as `[]`."""
    return [m["role"] + ":" + "".join("[]" if p["type"] == "image" else p["text"] for p in m["content"]) for m in chat]


def test_coco_gives_an_image_with_all_its_captions(coco, pictures):
    rows = load_rows(coco, image_folder=pictures)
    assert rows.features == ROW_FEATURES and rows.column_names == list(ROW_FEATURES)
    assert len(rows) == 2  # the image without captions gives no row
    assert rows[0]["images"] == [{"path": str(pictures / "1.png"), "bytes": None}]
    assert [said(chat) for chat in rows[0]["conversations"]] == [
        ["user:[]", "assistant:a green field"],
        ["user:[]", "assistant:grass"],
    ]
    assert rows[0]["answers"] == [[], []] and rows[0]["categories"] == [None, None]
    assert rows[1]["source"] == "captions.json, image 1 (id 10)"


def test_a_prompt_is_put_before_captions(coco, pictures):
    rows = load_rows(coco, image_folder=pictures, prompt="What do you see in this picture?", max_rows=1)
    assert len(rows) == 1
    assert said(rows[0]["conversations"][1]) == ["user:[]What do you see in this picture?", "assistant:grass"]


def test_llava_turns_are_independent_or_one_conversation(llava, pictures):
    rows = load_rows(llava, image_folder=pictures)
    assert [said(chat) for chat in rows[0]["conversations"]] == [
        ["user:[]What colour is it?", "assistant:Red."],
        ["user:[]Is that a tag?", "assistant:It can be: <image>."],
    ]
    assert rows[0]["source"] == "instruct.json, record 0 (id 000000033471)"
    together = load_rows(llava, image_folder=pictures, independent_turns=False)
    assert said(together[0]["conversations"][0]) == [
        "user:[]What colour is it?",
        "assistant:Red.",
        "user:Is that a tag?",
        "assistant:It can be: <image>.",
    ]
    for data in (rows, together):
        assert data[1]["images"] == [] and said(data[1]["conversations"][0])[0] == "user:What is the <image> tag?"
        assert said(data[2]["conversations"][0])[0] == "user:What colour?[]"
        assert data[2]["answers"] == [["green", "Green"]] and data[2]["categories"] == ["colour"]


def read_one(tmp_path, record: dict, file: str = "a.json", **options) -> dict:
    path = tmp_path / file
    path.write_text(json.dumps([record]) if file.endswith(".json") else json.dumps(record) + "\n")
    return load_rows(path, **options)[0]


MARKED = {
    "images": ["a.png", "b.png"],
    "messages": [
        {"role": "user", "content": "<image>First?"},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "And <image>\nsecond?"},
        {"role": "assistant", "content": "Not <image>."},
    ],
}


def test_marks_in_messages_are_the_positions_of_the_images(tmp_path):
    """The form of LLaMA-Factory and ms-swift."""
    row = read_one(tmp_path, MARKED)
    (chat,) = row["conversations"]
    assert said(chat) == ["user:[]First?", "assistant:Red.", "user:And[]second?", "assistant:Not <image>."]
    assert [image["path"] for image in row["images"]] == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    check_row(row)
    unmarked = json.loads(json.dumps(MARKED).replace("<image>", ""))
    (chat,) = read_one(tmp_path, unmarked)["conversations"]  # TRL's form: the images come first
    assert said(chat)[0] == "user:[][]First?"


@pytest.mark.parametrize("key", ["image", "images"])
@pytest.mark.parametrize("format", ["auto", "llava_instruct", "dataset"])
@pytest.mark.parametrize("file", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("mark", ["<image>", "<image>\n", ""])
def test_one_reader_for_conversations(tmp_path, key, format, file, mark):
    turns = [{"from": "human", "value": f"{mark}What is this?"}, {"from": "gpt", "value": "A king."}]
    row = read_one(tmp_path, {"id": 1, key: ["red.png"], "conversations": turns}, file, format=format)
    assert said(row["conversations"][0]) == ["user:[]What is this?", "assistant:A king."]
    assert [image["path"] for image in row["images"]] == [str(tmp_path / "red.png")]


@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize(("images", "marks"), [(1, 2), (2, 1), (3, 2)])
def test_as_many_marks_as_images(tmp_path, images, marks, independent):
    names = [f"{number}.png" for number in range(images)]
    turns = [
        ("human", "<image>\nWhat?"),
        ("gpt", "A king."),
        ("human", "<image> " * (marks - 1) + "And?"),
        ("gpt", "b"),
    ]
    record = {"image": names, "conversations": [{"from": who, "value": text} for who, text in turns]}
    row = read_one(tmp_path, record, independent_turns=independent)
    with pytest.raises(BadSampleError, match=f"{images} images but {marks} image parts or <image> marks"):
        check_row(row)
    messages = [{"role": "user" if who == "human" else "assistant", "content": text} for who, text in turns]
    with pytest.raises(BadSampleError, match=f"{images} images but {marks} image parts or <image> marks"):
        check_row(read_one(tmp_path, {"images": names, "messages": messages}))


def test_a_mark_without_an_image(tmp_path):
    for text, good in (("What does <image> mean?", True), ("<image>\nWhat is it?", False)):
        chat = [{"role": "user", "content": text}, {"role": "assistant", "content": "A tag."}]
        row = read_one(tmp_path, {"messages": chat})
        if good:
            check_row(row)
            assert said(row["conversations"][0])[0] == f"user:{text}"
        else:
            with pytest.raises(BadSampleError, match="asks about an image but has none"):
                check_row(row)


def test_a_records_own_system_text_and_other_keys(tmp_path):
    turns = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A king."}]
    row = read_one(tmp_path, {"image": "red.png", "system": "Be brief.", "conversations": turns})
    assert said(row["conversations"][0]) == ["system:Be brief.", "user:[]What?", "assistant:A king."]


def test_a_path_that_exists_is_that_file(tmp_path):
    """Brackets would otherwise be a pattern, which another file can match."""
    for name, text in (("a[1].parquet", "right"), ("a1.parquet", "wrong")):
        datasets.Dataset.from_dict({"text": [text]}).to_parquet(tmp_path / name)
    for streaming in (False, True):
        rows = load_rows(tmp_path / "a[1].parquet", streaming=streaming)
        assert said(next(iter(rows))["conversations"][0])[-1] == "assistant:right"
    found = load_rows(str(tmp_path / "a[0-9].parquet"))  # the control: a pattern
    assert said(found[0]["conversations"][0])[-1] == "assistant:wrong"


def test_llava_categories_and_answers_of_every_turn(tmp_path):
    turns = [{"from": w, "value": f"{w}{i}"} for i in range(2) for w in ("human", "gpt")]
    by_record = {"conversations": turns, "category": ["count", "colour"], "answers": [["1", "one"], ["red"]]}
    by_turn = {"conversations": [dict(turn) for turn in turns], "category": "other"}
    by_turn["conversations"][3] |= {"category": "colour", "answers": ["red"]}
    path = tmp_path / "a.json"
    path.write_text(json.dumps([by_record, by_turn]))
    rows = load_rows(path)
    assert rows[0]["categories"] == ["count", "colour"] and rows[0]["answers"] == [["1", "one"], ["red"]]
    assert rows[1]["categories"] == ["other", "colour"] and rows[1]["answers"] == [[], ["red"]]
    assert load_rows(path, independent_turns=False)[0]["answers"] == [["red"]]


def test_several_images_and_system_messages(tmp_path):
    record = {
        "image": ["a.png", "b.png"],
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "First <image> then <image>: same?"},
            {"from": "gpt", "value": "No."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    }
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + "\n")
    row = load_rows(path)[0]
    assert [image["path"] for image in row["images"]] == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert [said(chat) for chat in row["conversations"]] == [
        ["system:Be brief.", "user:First[]then[]: same?", "assistant:No."],
        ["system:Be brief.", "user:[][]Sure?", "assistant:Yes."],
    ]


@pytest.mark.parametrize("inside", [".", "train"])
def test_image_folder_with_metadata(tmp_path, pictures, inside):
    folder = pictures if inside == "." else pictures.rename(tmp_path / "train").parent
    at = folder / inside
    with open(at / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "question"])
        writer.writerow(["0.png", 'a "red", plain field', ""])
        writer.writerow(["1.png", "green", "Which colour?"])
    rows = load_rows(folder, prompt="What do you see?")
    assert said(rows[0]["conversations"][0]) == ["user:[]What do you see?", 'assistant:a "red", plain field']
    assert said(rows[1]["conversations"][0]) == ["user:[]Which colour?", "assistant:green"]
    assert load_image(rows[1]["images"][0]).getpixel((0, 0)) == (0, 128, 0)
    assert rows[1]["source"] == "metadata.csv, record 1 (1.png)"


def data_set(pictures, **columns):
    features = {"image": datasets.Image()}
    data = {"image": [str(pictures / "0.png"), str(pictures / "1.png")], **columns}
    return datasets.Dataset.from_dict(data).cast_column("image", features["image"])


def embedded(pictures: Path, **columns) -> datasets.Dataset:
    """The same as the Hub has it: the pictures' bytes inside."""
    images = [{"path": name, "bytes": (pictures / name).read_bytes()} for name in ("0.png", "1.png")]
    return datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())


def test_data_sets_of_an_image_and_a_text(pictures):
    data = embedded(pictures, caption=["red", "green"])
    rows = load_rows(data, prompt="Colour?")
    assert rows.features == ROW_FEATURES
    assert rows[1]["images"][0]["bytes"] == (pictures / "1.png").read_bytes()
    assert said(rows[1]["conversations"][0]) == ["user:[]Colour?", "assistant:green"]
    assert rows[1]["source"] == "dataset, record 1"
    selected = load_rows(data.select([1]))
    assert load_image(selected[0]["images"][0]).getpixel((0, 0)) == (0, 128, 0)


def test_data_sets_of_questions_with_several_accepted_answers(pictures):
    data = data_set(
        pictures,
        question=["Colour?", "Colour?"],
        answers=[["red", "crimson", "red"], ["green", "green", "lime"]],
        category=["c", "c"],
    )
    rows = load_rows(data)
    assert said(rows[0]["conversations"][0]) == ["user:[]Colour?", "assistant:red"]
    assert rows[0]["answers"] == [["red", "crimson", "red"]] and rows[0]["categories"] == ["c"]


def test_data_sets_of_messages_and_images(pictures):
    messages = [
        [{"role": "user", "content": "What colour?"}, {"role": "assistant", "content": "red"}],
        [{"role": "user", "content": "And two?"}, {"role": "assistant", "content": "red and green"}],
        [{"role": "user", "content": "None?"}, {"role": "assistant", "content": "none"}],
    ]
    paths = [[str(pictures / "0.png")], [str(pictures / "0.png"), str(pictures / "1.png")], []]
    data = datasets.Dataset.from_dict({"messages": messages, "images": paths})
    for given in (data, data.cast_column("images", datasets.List(datasets.Image()))):
        rows = load_rows(given)
        assert [len(row["images"]) for row in rows] == [1, 2, 0]
        assert said(rows[1]["conversations"][0]) == ["user:[][]And two?", "assistant:red and green"]
        assert said(rows[2]["conversations"][0]) == ["user:None?", "assistant:none"]
    parts = [[{"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "image", "text": None}]}]]
    rows = load_rows(datasets.Dataset.from_dict({"messages": parts, "image": paths[0]}))
    assert said(rows[0]["conversations"][0]) == ["user:A[]"]


@pytest.mark.parametrize("streaming", [False, True])
def test_records_of_a_file_are_taken_as_they_stand(pictures, streaming):
    """What Arrow's and pandas' readers make of such files: the second image lost, 7, `True`, and no answer."""

    def rows_of(name, text, **options):
        (pictures / name).write_bytes(text.encode("utf-8-sig"))
        return list(load_rows(pictures / name, streaming=streaming, **options))

    mixed = [
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]},
                {"role": "assistant", "content": "So."},
            ],
            "image": "0.png",
        },
    ]
    rows = rows_of("MIXED.JSONL", "\r\n".join(map(json.dumps, mixed)))
    assert [len(row["images"]) for row in rows] == [0, 1]
    assert [said(row["conversations"][0])[0] for row in rows] == ["user:Why?", "user:[]Why?"]
    assert load_image(rows[1]["images"][0]).getpixel((0, 0)) == (255, 0, 0)  # beside the file that names it

    answers = ["007", "true", "None", "two\r\nlines, \u2028or three"]
    lines = "".join(f'0.png,How many?,"{answer}"\r\n' for answer in answers)
    rows = rows_of("data.CSV", "file_name,question,answer\r\n" + lines)
    assert [said(row["conversations"][0])[1] for row in rows] == [f"assistant:{answer}" for answer in answers]
    assert rows[0]["images"][0]["path"] == str(pictures / "0.png")
    rows = rows_of("data.csv", "image,text\n,no picture\nhf://datasets/a/b.png,one\n", max_rows=2)
    assert [row["images"] for row in rows] == [[], [{"path": "hf://datasets/a/b.png", "bytes": None}]]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("metadata.csv", b"file_name,text\n0.png,a king, and a rook\n", r"metadata.csv, line 2: more cells than"),
        ("metadata.csv", b'file_name,text\n0.png,"a king\n', r"metadata.csv, line 2: not valid CSV: unexpected end"),
        ("metadata.csv", b"file_name,text\n0.png,caf\xe9\n", "metadata.csv is not UTF-8"),
        ("metadata.csv", b"", "holds no records"),
        ("metadata.jsonl", b"[1, 2]\n", r"metadata.jsonl, record 0: an object with named fields is needed"),
        ("data.csv", b"file_name,text\n0.png,caf\xe9\n", "data.csv is not UTF-8"),
        ("data.csv", b"", "holds no records"),
        ("data.jsonl", b"\n", "holds no records"),
        ("data.json", b"[]", "holds no records"),
        ("data.json", b'{"images": [1], "annotations": []}', "images 0: an object with named fields is needed, not 1"),
        ("data.xlsx", b"", r"files read are .csv, .json, .jsonl, .parquet, .tar"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_rows(tmp_path / name)


def test_options_and_folders_that_are_not_there(tmp_path):
    (tmp_path / "data.csv").write_text("file_name,text\n0.png,a\n")
    with pytest.raises(ValueError, match="txt_column: not an option of a local file"):
        load_rows(tmp_path / "data.csv", txt_column="text")
    for missing in ("./nowhere", "~/nowhere", "some/where/else", "data.parquet"):
        with pytest.raises(FileNotFoundError, match=missing):
            load_rows(missing)


def test_metadata_may_name_images_of_another_folder(tmp_path, pictures):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png"}\n{"file_name": "1.png", "text": "green"}\n')
    rows = load_rows(tmp_path, image_folder=pictures)
    assert said(rows[1]["conversations"][0]) == ["user:[]", "assistant:green"]  # the first record lacks its text
    assert load_image(rows[1]["images"][0]).getpixel((0, 0)) == (0, 128, 0)


@pytest.mark.parametrize("kind", ["disk", "parquet", "jsonl", "csv"])
@pytest.mark.parametrize("streaming", [False, True])
def test_local_data_sets_and_streams_give_the_same_rows(pictures, tmp_path, kind, streaming):
    paths = datasets.Dataset.from_dict({"image": ["0.png", "1.png"], "text": ["red", "green"]})
    target = tmp_path / f"data.{kind}"
    if kind == "disk":
        paths.save_to_disk(target)
    elif kind == "parquet":
        paths.to_parquet(target)
    elif kind == "csv":
        paths.to_csv(target)
    else:
        paths.to_json(target)
    before = set(tmp_path.rglob("*"))
    rows = load_rows(str(target), streaming=streaming, image_folder=pictures)
    assert isinstance(rows, datasets.IterableDataset) == streaming
    found = list(flatten_conversations(rows))
    assert [row["images"][0]["path"] for row in found] == [str(pictures / "0.png"), str(pictures / "1.png")]
    assert said(found[1]["conversations"][0]) == ["user:[]", "assistant:green"]
    assert found[0]["source"].endswith("record 0")
    assert set(tmp_path.rglob("*")) == before  # nothing left behind


def test_streamed_pictures_are_not_decoded(pictures):
    data = embedded(pictures, text=["red", "green"])
    rows = list(load_rows(data.to_iterable_dataset()))
    assert rows[0]["images"][0]["bytes"] == (pictures / "0.png").read_bytes()


def test_coco_and_llava_stream_too(coco, llava, pictures):
    for path in (coco, llava):
        streamed = list(flatten_conversations(load_rows(path, image_folder=pictures, streaming=True)))
        assert streamed == list(flatten_conversations(load_rows(path, image_folder=pictures)))


def test_flattening_is_lazy_and_keeps_added_columns(coco, pictures):
    rows = load_rows(coco, image_folder=pictures)
    flat = flatten_conversations(rows)
    assert isinstance(flat, datasets.Dataset) and len(flat) == 3
    assert [len(row["conversations"]) for row in flat] == [1, 1, 1]
    assert flat[1]["source"] == "captions.json, image 0 (id 11), conversation 1"
    assert said(flat[1]["conversations"][0])[1] == "assistant:grass"
    flat = flat.add_column("length", [7, 5, 6])
    assert list(flat["length"]) == [7, 5, 6]
    shuffled = flat.shuffle(seed=0).select([0, 1])
    assert {row["length"] for row in shuffled} <= {7, 5, 6}
    assert all(name in shuffled[0] for name in ROW_FEATURES)
    assert [row["source"] for row in iterate_rows(flat)] == [row["source"] for row in flat]
    assert flatten_conversations(flat)[1] == flat[1]
    chosen = flatten_conversations(rows.select([1, 0]))  # as after a check that left rows out
    assert [row["source"].split("(id ")[1][:2] for row in chosen] == ["10", "11", "11"]


def test_json_that_does_not_parse_names_line_and_column(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text('[\n {"image": "a.png",\n  "conversations" []}\n]')
    with pytest.raises(ValueError, match=r"broken\.json, line 3, column 19: not valid JSON: Expecting ':'"):
        load_rows(path, format="llava_instruct")
    lines = tmp_path / "broken.jsonl"
    lines.write_text('{"image": "a.png", "text": "x"}\n{"image": \n')
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 2"):
        load_rows(lines)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="is not UTF-8"):
        load_rows(path)


def test_wrong_sources_are_named(tmp_path, pictures, coco):
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        load_rows(tmp_path / "nowhere.json")
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        load_rows(tmp_path / "nowhere.json", format="coco_captions")
    with pytest.raises(ValueError, match="format='cocoa' must be 'auto' or one of coco_captions"):
        load_rows(coco, format="cocoa")
    with pytest.raises(ValueError, match="neither COCO captions"):
        (tmp_path / "other.json").write_text('{"a": 1}')
        load_rows(tmp_path / "other.json")
    with pytest.raises(ValueError, match="needs a list of records, not dict"):
        load_rows(coco, format="llava_instruct")
    with pytest.raises(ValueError, match="holds no records"):
        (tmp_path / "empty.json").write_text("[]")
        load_rows(tmp_path / "empty.json", format="llava_instruct")
    with pytest.raises(FileNotFoundError, match="no metadata.csv or metadata.jsonl"):
        load_rows(pictures, format="imagefolder")
    with pytest.raises(ValueError, match="needed are 'file_name'"):
        (pictures / "metadata.csv").write_text("name,text\na.png,b\n")
        load_rows(pictures)
    with pytest.raises(ValueError, match=r"columns \['a'\] hold neither 'messages'.*text_column"):
        load_rows(datasets.Dataset.from_dict({"a": [1]}))
    with pytest.raises(ValueError, match="no column 'words'; it has"):
        load_rows(datasets.Dataset.from_dict({"text": ["a"]}), text_column="words")
    with pytest.raises(ValueError, match="text_column: options of format='dataset'"):
        load_rows(coco, text_column="words")


def test_paths_in_records_are_just_paths(tmp_path, processor, pictures):
    """An absolute path or one that climbs out of the folder is read as it stands; a missing one is named with its
    record."""
    records = [
        {"image": str(pictures / "0.png"), "conversations": LLAVA[0]["conversations"][:2]},
        {"image": "../pictures/1.png", "conversations": LLAVA[0]["conversations"][:2]},
        {"image": "../../gone.png", "conversations": LLAVA[0]["conversations"][:2]},
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records))
    (tmp_path / "images").mkdir()
    rows = load_rows(path, image_folder=tmp_path / "images")
    assert load_image(rows[0]["images"][0]).getpixel((0, 0)) == (255, 0, 0)
    assert load_image(rows[1]["images"][0]).getpixel((0, 0)) == (0, 128, 0)
    with pytest.raises(
        BadSampleError, match=r"1 of 3 rows.*\n  a.json, record 2: image '.*\.\./\.\./gone.png' does not"
    ):
        check_rows(rows, processor, progress=False)


def test_half_characters_in_json_do_no_harm(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"conversations": [{"from": "human", "value": "\\ud83d?"}, {"from": "gpt", "value": "ok"}]}]')
    assert said(load_rows(path)[0]["conversations"][0]) == ["user:??", "assistant:ok"]


def test_images_of_the_row_may_be_pil_made(tmp_path):
    data = datasets.Dataset.from_dict({"image": [Image.new("RGB", (4, 4), "red"), None], "text": ["a", "b"]})
    rows = load_rows(data)
    assert load_image(rows[0]["images"][0]).size == (4, 4)
    assert rows[1]["images"] == []
