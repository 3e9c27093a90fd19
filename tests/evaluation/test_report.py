"""The report and the contact sheet: self-contained, consistent with the records, and safe to open."""

import base64
import html
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from jnana.evaluation import QuestionSet, SplitResult, summarise, write_contact_sheet, write_report
from jnana.evaluation.report import THUMBNAIL_SIDE, drawn_at_random
from jnana.processing.data import load_rows
from tests.evaluation.conftest import write_test_set


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'</article>{{ 7 * 7 }}"


class Page(HTMLParser):
    """Tags with their attributes, and the text of each card."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cards = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "article":
            self.cards.append("")

    def handle_data(self, data):
        if self.cards:
            self.cards[-1] += data

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def split_result(folder, answers, name="test", blind="grey answer"):
    """A test set of six questions, answered with `answers` (the truth where `None`)."""
    questions = QuestionSet(load_rows(str(write_test_set(folder))))
    records, blind_records = [], []
    for number, question in enumerate(questions.questions):
        record = {
            "source": question.source,
            "category": question.category,
            "history": question.history,
            "question": question.text,
            "references": question.references,
            "prediction": question.references[0] if number not in answers else answers[number],
            "complete": True,
            "blind": False,
            "key": f"run-{question.key}",
        }
        records.append(record)
        blind_records.append({**record, "prediction": blind, "blind": True})
    return SplitResult(name, questions, records, blind_records, summarise(records, blind_records))


def written(path, splits, **options):
    return write_report(path, splits, title="the model", settings={"data": "x"}, **options).read_text(encoding="utf-8")


def test_page_shows_every_question_with_picture_and_verdict(tmp_path):
    result = split_result(tmp_path / "data", {1: "no", 4: "THREE."})
    page = Page(written(tmp_path / "report.html", [result]))
    cards = page.of("article")
    assert [card["data-outcome"] for card in cards] == ["right", "wrong", "right", "right", "right", "right"]
    assert [card["data-category"] for card in cards] == [record["category"] for record in result.records]
    for text, record in zip(page.cards, result.records, strict=True):
        for part in (record["question"], record["references"][0], record["prediction"], "grey answer"):
            assert part in text
    pictures = page.of("img")
    assert len(pictures) == 6
    first = Image.open(io.BytesIO(base64.b64decode(pictures[0]["src"].removeprefix("data:image/jpeg;base64,"))))
    assert first.size == (30, 28)
    buttons = {button["data-value"] for button in page.of("button")}
    assert {"wrong", "right", "count", "exists", "describe"} <= buttons


def test_scores_on_the_page_are_those_of_the_summary(tmp_path):
    result = split_result(tmp_path / "data", {1: "no"})
    text = written(tmp_path / "report.html", [result])
    assert re.search(r'class="big">83\.3<', text)  # 5 of 6
    assert f"{100 * result.summary['overall']['exact_match_interval'][0]:.1f}" in text
    assert result.summary["definitions"]["majority"] in html.unescape(text)


def test_no_markup_gets_in(tmp_path):
    result = split_result(tmp_path / "data", {0: HOSTILE}, name=HOSTILE, blind=HOSTILE)
    for record in (result.records[2], result.blind_records[2]):
        record.update(question=HOSTILE, references=[HOSTILE], category=HOSTILE, source=HOSTILE, history=HOSTILE)
    result.summary = summarise(result.records, result.blind_records)
    result.summary["unanswered"] = [{"source": HOSTILE, "question": HOSTILE, "error": HOSTILE}]
    text = write_report(tmp_path / "report.html", [result], title=HOSTILE, settings={HOSTILE: HOSTILE}).read_text()
    page = Page(text)
    assert len(page.of("script")) == 1 and len(page.of("article")) == 6
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.of("img"))
    assert HOSTILE in page.cards[0] and HOSTILE not in text  # shown literally, because it is escaped
    assert "49" not in page.cards[0]  # template code in an answer is not executed


def test_page_needs_nothing_else(tmp_path):
    text = written(tmp_path / "report.html", [split_result(tmp_path / "data", {})])
    page = Page(text)
    assert not page.of("link") and not any("src" in script for script in page.of("script"))
    assert not re.search(r"https?://|url\(|@import", text)
    policy = page.of("meta")[2]["content"]
    assert "default-src 'none'" in policy and "img-src data:" in policy


def test_limit_of_pictures(tmp_path):
    result = split_result(tmp_path / "data", {5: "wrong"})
    page = Page(written(tmp_path / "report.html", [result], max_examples=2))
    text = (tmp_path / "report.html").read_text()
    assert len(page.of("article")) == len(page.of("img")) == 2
    assert "2 of 6 questions" in text and "exact match on 6 questions" in text
    assert "drawn at" in text and "drawn at" not in written(tmp_path / "all.html", [result], max_examples=6)
    assert [drawn_at_random(6, limit) for limit in (0, 6, 7)] == [[], list(range(6)), list(range(6))]
    chosen = drawn_at_random(540, 30)
    assert len(set(chosen)) == 30 and chosen == sorted(chosen) == drawn_at_random(540, 30)
    assert len({index % 9 for index in chosen}) >= 7  # nine types in rotation: every 18th question would have one type
    with pytest.raises(ValueError, match="max_examples is -1"):
        written(tmp_path / "none.html", [result], max_examples=-1)


def test_several_sets_on_one_page(tmp_path):
    splits = [split_result(tmp_path / name, {}, name=name) for name in ("test", "unseen")]
    page = Page(written(tmp_path / "report.html", splits))
    assert [card["data-split"] for card in page.of("article")] == ["test"] * 6 + ["unseen"] * 6


def test_unreadable_pictures_are_told(tmp_path):
    result = split_result(tmp_path / "data", {})
    result.records[1].update(prediction=None, error="record 1: image '1.png' does not exist.")
    result.summary = summarise(result.records, result.blind_records)
    (tmp_path / "data" / "1.png").unlink()
    (tmp_path / "data" / "2.png").unlink()  # removed after the question was answered
    page = Page(written(tmp_path / "report.html", [result]))
    assert "image '1.png' does not exist." in page.cards[1]
    assert len(page.of("img")) == 4 and len(page.of("article")) == 6


def test_large_images_become_thumbnails(tmp_path):
    folder = tmp_path / "data"
    result = split_result(folder, {})
    Image.new("RGB", (2000, 1000)).save(folder / "0.png")
    images = Page(written(tmp_path / "report.html", [result])).of("img")
    assert (images[0]["width"], images[0]["height"]) == (str(THUMBNAIL_SIDE), str(THUMBNAIL_SIDE // 2))
    assert (images[1]["width"], images[1]["height"]) == ("31", "28")


def test_contact_sheet(tmp_path, recwarn):
    result = split_result(tmp_path / "data", {0: "$x^2$ \x1b <b>", 1: "no"})
    path = write_contact_sheet(tmp_path / "examples.png", result.questions, result.records, columns=3)
    with Image.open(path) as sheet:
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(maxcolors=1 << 24)}
        wide = sheet.width
    for number in range(6):
        assert (40 * number % 256, 90, 200) in colours  # each image is drawn
    assert (0xC3, 0x28, 0x1C) in colours and (0x12, 0x75, 0x2F) in colours  # a wrong and a right answer
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]

    write_contact_sheet(tmp_path / "right.png", result.questions, result.records, columns=6, max_examples=2)
    with Image.open(tmp_path / "right.png") as sheet:
        assert sheet.width == 2 * wide
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(maxcolors=1 << 24)}
    shown = [number for number in range(6) if (40 * number % 256, 90, 200) in colours]
    assert shown == drawn_at_random(6, 2)


def test_no_contact_sheet_without_pictures(tmp_path):
    records = [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}]
    (tmp_path / "test.json").write_text(json.dumps(records))
    questions = QuestionSet(load_rows(str(tmp_path / "test.json")))
    record = {"prediction": "ho", "references": ["ho"], "question": "hi"}
    assert write_contact_sheet(tmp_path / "examples.png", questions, [record]) is None
    assert not (tmp_path / "examples.png").exists()
