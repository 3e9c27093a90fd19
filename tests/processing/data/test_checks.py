"""The check before training finds, names and counts every kind of bad row, and measures the good ones."""

import copy
import json
import re

import numpy as np
import pytest
from PIL import Image

from jnana.processing import JnanaProcessor
from jnana.processing.data import (
    BadSampleError,
    JnanaCollator,
    check_rows,
    flatten_conversations,
    load_rows,
    read_bad_samples,
)
from jnana.processing.data.rows import IMAGE_PART, make_row, message, rows_to_dataset, text_part
from tests.processing.data.test_images import png_header


QUESTION = {"from": "human", "value": "<image>\nHow many?"}
ANSWER = {"from": "gpt", "value": "two"}


def record(image="0.png", turns=(QUESTION, ANSWER), **fields) -> dict:
    return {**({"image": image} if image else {}), "conversations": list(turns), **fields}


@pytest.fixture
def read(tmp_path, pictures):
    """Writes LLaVA records and reads them as rows."""

    def read_records(*records, **options):
        path = tmp_path / "pets.json"
        path.write_text(json.dumps(records))
        return load_rows(path, image_folder=pictures, **options)

    return read_records


BAD = {
    "missing image": (record(image="gone.png"), "image '.*gone.png' does not exist"),
    "not an image": (record(image="text.png"), "is not an image"),
    "absurdly large image": (record(image="bomb.png"), "too large|pixels"),
    "no image": (record(image=None), "asks about an image but has none"),
    "no conversations": ({"image": "0.png"}, "no conversation"),
    "no answer": (record(turns=[QUESTION]), "no answer"),
    "empty answer": (record(turns=[QUESTION, {"from": "gpt", "value": " \n"}]), "without text"),
    "null answer": (record(turns=[QUESTION, {"from": "gpt", "value": None}]), "without text"),
    "unknown role": (record(turns=[QUESTION, {"from": "narrator", "value": "so"}, ANSWER]), "unknown role 'narrator'"),
    "not an object": (["a", "list"], r"the record is \['a', 'list'\], not an object"),
    "too long": (
        record(turns=[{"from": "human", "value": "<image>\n" + "rook " * 60}, ANSWER]),
        "does not fit: .* max_length=60",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_each_kind_of_bad_row_is_found_and_named(read, pictures, processor, case):
    (pictures / "text.png").write_text("no picture")
    (pictures / "bomb.png").write_bytes(png_header(60_000, 60_000))
    bad, message = BAD[case]
    rows = read(record(), bad, record(image=None, turns=[{"from": "human", "value": "why?"}, ANSWER]))
    with pytest.raises(BadSampleError, match="1 of 3 rows can't be used.*\n  (.*/)?pets.json, record 1") as caught:
        check_rows(rows, processor, max_length=60, progress=False)
    assert re.search(message, str(caught.value))
    report = check_rows(rows, processor, max_length=60, on_bad_sample="skip", progress=False)
    assert report.kept_indices == [0, 2] and report.num_rows == 3 and len(report.problems) == 1


def test_a_truncated_image_needs_decoding(read, pictures, processor):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))
    noise.save(pictures / "half.jpg")
    (pictures / "half.jpg").write_bytes((pictures / "half.jpg").read_bytes()[:-500])
    rows = read(record("half.jpg"))
    assert check_rows(rows, processor, progress=False).problems == []
    assert check_rows(rows, processor, image_check="none", progress=False).problems == []
    with pytest.raises(BadSampleError, match="truncated or corrupt"):
        check_rows(rows, processor, image_check="decode", progress=False)


def test_lengths_are_those_of_training(read, processor):
    turns = [QUESTION, ANSWER, {"from": "human", "value": "sure <|endoftext|>?"}, {"from": "gpt", "value": "yes, two"}]
    rows = read(record(turns=turns), record(image=None, turns=[{"from": "human", "value": "why?"}, ANSWER]))
    report = check_rows(rows, processor, progress=False)
    assert [len(lengths) for lengths in report.lengths] == [2, 1]
    for row, lengths in zip(rows, report.lengths, strict=True):
        for chat, length in zip(row["conversations"], lengths, strict=True):
            for part in chat[0]["content"]:
                if part["type"] == "image":
                    part["image"] = Image.new("RGB", (9, 9))
            inputs = processor.apply_chat_template([chat], tokenize=True, return_dict=True)
            assert len(inputs["input_ids"][0]) == length
    flat = check_rows(flatten_conversations(rows), processor, progress=False)
    assert [length for row in report.lengths for length in row] == [row[0] for row in flat.lengths]


def test_long_answers_are_counted_and_kept(read, processor):
    rows = read(record(turns=[QUESTION, {"from": "gpt", "value": "rook " * 60}]), record())
    report = check_rows(rows, processor, max_length=60, progress=False)
    assert report.kept_indices == [0, 1] and report.num_truncated == 1


def test_an_image_behind_max_length_raises(read, processor):
    """A later turn's image may not be cut."""
    late = [{"from": "human", "value": "hi"}, ANSWER, {"from": "human", "value": "then <image>?"}, ANSWER]
    rows = read(record(turns=late), independent_turns=False)
    length = check_rows(rows, processor, progress=False).lengths[0][0]
    with pytest.raises(BadSampleError, match="its images end at"):
        check_rows(rows, processor, max_length=20, progress=False)
    assert check_rows(rows, processor, max_length=length, progress=False).num_truncated == 0


def test_a_template_without_generation_blocks_supervises_nothing(read, processor):
    broken = JnanaProcessor(
        processor.image_processor,
        processor.tokenizer,
        patch_size=12,
        chat_template=processor.chat_template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", ""),
    )
    with pytest.raises(BadSampleError, match="no supervised token"):
        check_rows(read(record()), broken, progress=False)


def test_problems_are_listed_and_written(read, processor, tmp_path):
    rows = read(*[record(f"gone{i}.png") for i in range(15)], record())
    listing = tmp_path / "out" / "bad_samples.jsonl"
    with pytest.raises(BadSampleError) as caught:
        check_rows(rows, processor, progress=False, bad_samples_file=listing)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("15 of 16 rows can't be used") and len(lines) == 12
    assert lines[-1] == "  ... and 5 more"
    assert len(read_bad_samples(listing)) == 15 and "record 14" in read_bad_samples(listing)[14]
    check_rows(rows, processor, progress=False, bad_samples_file=listing, on_bad_sample="skip")
    assert len(read_bad_samples(listing)) == 15  # found again, listed once


def test_nothing_left_is_an_error_even_when_skipping(read, processor):
    with pytest.raises(BadSampleError, match="1 of 1 rows"):
        check_rows(read(record("gone.png")), processor, on_bad_sample="skip", progress=False)


def test_options_are_checked(read, processor):
    with pytest.raises(ValueError, match="image_check='all' must be one of none, header, decode"):
        check_rows(read(record()), processor, image_check="all")
    with pytest.raises(ValueError, match="on_bad_sample='ignore' must be one of raise, skip"):
        check_rows(read(record()), processor, on_bad_sample="ignore")


def test_streams_and_lists_are_checked_too(read, processor):
    rows = read(record(), record("gone.png"))
    for given in (rows.to_iterable_dataset(), list(rows)):
        assert check_rows(given, processor, on_bad_sample="skip", progress=False).kept_indices == [0]


@pytest.mark.parametrize("content", ["{{ m.content | map(attribute='text') | join }}", "{{ m.content }}"])
def test_a_template_that_forgets_images_is_found(processor, tmp_path, content):
    """It would train rows without their images, or on Python's notation of the parts."""
    Image.new("RGB", (24, 24)).save(tmp_path / "a.png")
    rows = rows_to_dataset(
        [
            make_row(
                [{"path": str(tmp_path / "a.png"), "bytes": None}],
                [[message("user", IMAGE_PART, text_part("What?")), message("assistant", text_part("A king."))]],
                "a.json, record 0",
            )
        ]
    )
    assert check_rows(rows, processor, progress=False).kept_indices == [0]  # the control
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}" + content + "{% else %}{% generation %}"
        "{{ m.content[0].text }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    forgetful = copy.copy(processor)
    forgetful.chat_template = template
    expected = "a.json, record 0: a conversation about 1 images has 0 image tokens; .* such as chat_template: jnana"
    with pytest.raises(ValueError, match=expected):
        check_rows(rows, forgetful, progress=False)
    with pytest.raises(ValueError, match=expected):
        JnanaCollator(forgetful)(list(rows))
