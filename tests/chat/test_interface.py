"""The page's handlers: what a visitor sees, and that nothing a visitor does ends the app."""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from chat.assistant import Assistant
from chat.limits import Limits, Refused
from processing import JnanaProcessor, TranscriptionError
from tests.modeling.pairs import join
from tests.tiny import save_tiny_text, save_tiny_vision


gradio = pytest.importorskip("gradio", reason="the app extra (gradio) is not installed")

from chat.interface import APOLOGY, EXAMPLES, Page, build_interface, find_examples, for_visitors  # noqa: E402


class StandInTranscriber:
    """Speaks the Transcriber's interface; what it hears is the file's name."""

    def transcribe(self, path):
        name = Path(path).stem
        if name == "broken":
            raise TranscriptionError("broken.wav holds no sound.", "audio")
        return SimpleNamespace(text="" if name == "silence" else name)


@pytest.fixture(scope="module")
def assistant(tmp_path_factory) -> Assistant:
    folder = tmp_path_factory.mktemp("pair")
    vision, text = save_tiny_vision(folder / "v"), save_tiny_text(folder / "t")
    processor = JnanaProcessor.from_vision_text_pretrained(vision, text)
    model = join(folder, image_token_id=processor.image_token_id)
    limits = Limits(images=2, new_tokens=8, kept_chats=1)
    return Assistant(model, processor, "tiny", limits, speech_note="off here")


@pytest.fixture
def page(assistant) -> Page:
    return Page(assistant, find_examples(EXAMPLES))


@pytest.fixture
def png(tmp_path) -> str:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


def test_a_chat(page, png):
    visitor, row, button, cleared = page.add_picture(png, None)
    assert len(row["value"]) == 1 and button["visible"] and cleared is None
    *_, last = page.send("what do you see?", 0.0, 6, visitor)
    same, row, _, transcript, question, status = last
    assert same is visitor and row["value"] == [] and question == ""
    assert [message["role"] for message in transcript] == ["user", "user", "assistant"]
    assert "0 of them known from before" in status
    answer = transcript[-1]["content"]
    *_, last = page.retry(0.0, 6, "half typed", visitor)
    assert last[3][-1]["content"] == answer and last[4] == "half typed"
    *_, last = page.send("how many?", 0.0, 6, visitor)
    assert len(last[3]) == 5 and " 0 of them" not in last[5]
    fresh, row, _, transcript, *_ = page.clear(visitor)
    assert fresh is not visitor and transcript == [] and row["value"] == []


def test_examples_are_clicked(page):
    visitor, row, _, question = page.choose_example(1, None)
    assert question == "How many pieces are there?" and len(visitor.waiting) == len(row["value"]) == 1


def test_refusals_leave_the_chat_as_it_was(page, png, assistant):
    visitor = assistant.welcome()
    with pytest.raises(Refused, match="Type or say a question"):
        list(page.send("  ", 0.0, 6, visitor))
    with pytest.raises(Refused, match="Nothing has been asked"):
        list(page.retry(0.0, 6, "", visitor))
    for temperature, length in ((3, 6), ("hot", 6), (0, 0), (0, 9), (float("nan"), 6)):
        with pytest.raises(Refused):
            list(page.send("why?", temperature, length, visitor))
    for _ in range(2):
        page.add_picture(png, visitor)
    with pytest.raises(Refused, match="at most 2 pictures"):
        assistant.receive(visitor, png)
    visitor.session.model.generate, kept = lambda **_: 1 / 0, visitor.session.model.generate
    try:
        seen = []
        with pytest.raises(ZeroDivisionError):
            seen += page.send("why?", 0.0, 6, visitor)  # what came before the error is kept
    finally:
        visitor.session.model.generate = kept
    assert seen[-1][3] == [] and seen[-1][4] == "why?" and len(visitor.waiting) == 2  # question and pictures are back
    *_, last = page.send("why?", 0.0, 6, visitor)
    assert len(last[3]) == 4


def test_what_goes_wrong_is_one_line_without_details(caplog):
    def fails(path):
        raise OSError(f"/secret/{path} is broken")

    def streams(path):
        yield 1
        raise Refused("too large")

    with pytest.raises(gradio.Error) as told:
        for_visitors(fails)("x")
    assert told.value.message == APOLOGY and "/secret/x" in caplog.text
    stream = for_visitors(streams)("x")
    assert next(stream) == 1
    with pytest.raises(gradio.Error, match="Too large"):
        next(stream)


def test_speech_fills_the_question(page, assistant):
    with pytest.raises(Refused, match="off here"):
        page.transcribe("hello.wav", "")
    assistant.transcriber = StandInTranscriber()
    try:
        assert page.transcribe("how many.wav", "Tell me:") == "Tell me: how many"
        with pytest.raises(Refused, match="No speech was heard"):
            page.transcribe("silence.wav", "")
        with pytest.raises(Refused, match="holds no sound"):
            page.transcribe("broken.wav", "")
    finally:
        assistant.transcriber = None


def test_only_the_latest_chats_keep_their_cache(page, assistant):
    first, second = assistant.welcome(), assistant.welcome()
    for visitor in (first, second):
        list(page.send("why?", 0.0, 4, visitor))
    assert first.session.cached_tokens == 0 < second.session.cached_tokens
    *_, last = page.send("and then?", 0.0, 4, first)  # read anew
    assert len(last[3]) == 4 and second.session.cached_tokens == 0


def test_no_input_makes_the_server_fetch_an_address(assistant, monkeypatch):
    blocks = build_interface(assistant)
    function = next(f for f in blocks.fns.values() if f.name == "send")
    hostile = {"path": "http://127.0.0.1:1/x.png", "meta": {"_type": "gradio.FileData"}}
    fetched = []

    async def fetch(url, *_, **__):
        fetched.append(url)
        raise OSError("fetched")

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", fetch)
    inputs = [hostile, 0.0, 6, None]
    with pytest.raises(gradio.Error, match="not fetched"):
        asyncio.run(blocks.preprocess_data(function, inputs, None))
    assert fetched == []
    with pytest.raises(OSError, match="fetched"):  # the control: without the guard Gradio fetches for a text box
        asyncio.run(gradio.Blocks.preprocess_data(blocks, function, inputs, None))
    assert fetched == ["http://127.0.0.1:1/x.png"]


def test_a_visitor_who_leaves_stops_the_answer(page, assistant):
    visitor = assistant.welcome()
    stream = page.send("why?", 0.0, 8, visitor)
    next(stream), next(stream)
    stream.close()
    deadline = time.monotonic() + 10
    while visitor.session._busy.locked() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not visitor.session._busy.locked()
    assert len(visitor.session.messages) == 2
