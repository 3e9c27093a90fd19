"""The page's handlers: the values that they show, and their behaviour after errors."""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from jnana.chat.limits import Limits, Refused
from jnana.processing import JnanaProcessor
from jnana.processing.speech import TranscriptionError
from tests.modeling.pairs import join
from tests.tiny import save_tiny_text, save_tiny_vision


gradio = pytest.importorskip("gradio", reason="the app extra (gradio) is not installed")
from gradio.state_holder import SessionState  # noqa: E402

from jnana.chat.assistant import Assistant  # noqa: E402
from jnana.chat.interface import EXAMPLES, build_interface, find_examples  # noqa: E402
from jnana.chat.page import GENERAL_ERROR, STILL_ANSWERING, Page, for_visitors, in_status_line, with_notice  # noqa: E402


class StandInTranscriber:
    """Has the interface of Transcriber; the transcript is the file's name."""

    ready = True

    def transcribe(self, path):
        name = Path(path).stem
        if name == "broken":
            raise TranscriptionError("broken.wav holds no sound.", "audio")
        if name == "nobody":
            raise TranscriptionError("WhisperX can't be imported by /srv/secret/python.", "environment", "a trace")
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


def send(page: Page, question: str, new_tokens: int, visitor, temperature: float = 0.0):
    """Queue a question and answer it, as the page does; returns the last view."""
    visitor, *_ = page.take(question, visitor)
    return [visitor, *list(page.answer(temperature, new_tokens, visitor))[-1][1:]]


def unchanged(value) -> bool:
    return value == gradio.skip()


def test_a_chat(page, png):
    visitor = page.assistant.new_visitor()
    same, row, button, cleared, refusal = page.add_image(png, visitor)
    assert same is visitor
    assert len(row["value"]) == 1 and button["visible"] and cleared is None and refusal == ""
    same, row, _, transcript, question, status = page.take("what do you see?", visitor)
    assert same is visitor and row["value"] == [] and question == "" and status.startswith("waiting")
    assert [message["role"] for message in transcript] == ["user", "user"]
    *earlier, last = page.answer(0.0, 6, visitor)
    # the question box keeps its text, and images are not sent again with each token
    assert len(earlier) > 2 and all(unchanged(part) for view in earlier for part in (*view[1:3], view[4]))
    assert all(view[0] is visitor for view in (*earlier, last))  # resets the idle time
    transcript, status = last[3], last[5]
    assert [message["role"] for message in transcript] == ["user", "user", "assistant"]
    assert "0 of them cached" in status
    answer = transcript[-1]["content"]
    taken = page.take_again(visitor)
    assert len(taken[3]) == 2 and unchanged(taken[4])
    *_, last = page.answer(0.0, 6, visitor)
    assert last[3][-1]["content"] == answer and unchanged(last[4])
    last = send(page, "how many?", 6, visitor)
    assert len(last[3]) == 5 and " 0 of them" not in last[5]
    said = visitor.chat
    same, row, _, transcript, *_ = page.clear(visitor)
    assert same is visitor and visitor.chat is not said and transcript == [] and row["value"] == []


def test_examples_are_clicked(page):
    visitor, row, _, question, _ = page.choose_example(1, page.assistant.new_visitor())
    assert question == "How many pieces are there?" and len(visitor.chat.waiting) == len(row["value"]) == 1


def test_refusals_leave_the_chat_as_it_was(page, png, assistant):
    visitor = assistant.new_visitor()
    with pytest.raises(Refused, match="Type or say a question"):
        page.take("  ", visitor)
    with pytest.raises(Refused, match="Nothing has been asked"):
        page.take_again(visitor)
    for temperature, length in ((3, 6), ("hot", 6), (0, 0), (0, 9), (float("nan"), 6), (0, float("inf"))):
        page.take("why?", visitor)
        with pytest.raises(Refused):
            list(page.answer(temperature, length, visitor))
    for _ in range(2):
        page.add_image(png, visitor)
    with pytest.raises(Refused, match="at most 2 pictures"):
        assistant.receive(visitor.chat, png)
    page.take("why?", visitor)
    with pytest.raises(Refused, match="at most 2 pictures"):  # images of a queued question count too
        assistant.receive(visitor.chat, png)
    visitor.chat.session.model.generate, kept = lambda **_: 1 / 0, visitor.chat.session.model.generate
    try:
        seen = []
        with pytest.raises(ZeroDivisionError):
            seen += page.answer(0.0, 6, visitor)  # the views before the error
    finally:
        visitor.chat.session.model.generate = kept
    assert (
        seen[-1][3] == [] and seen[-1][4] == "why?" and len(visitor.chat.waiting) == 2
    )  # question and images are restored
    assert len(send(page, "why?", 6, visitor)[3]) == 4


def test_an_answer_that_fails_the_second_time_leaves_the_first(page, assistant):
    visitor = assistant.new_visitor()
    before = send(page, "why?", 4, visitor)[3]
    visitor.chat.session.model.generate, kept = lambda **_: 1 / 0, visitor.chat.session.model.generate
    try:
        page.take_again(visitor)
        with pytest.raises(ZeroDivisionError):
            list(page.answer(0.0, 4, visitor))
    finally:
        visitor.chat.session.model.generate = kept
    assert visitor.chat.transcript == before
    page.take_again(visitor)
    *_, last = page.answer(0.0, 4, visitor)
    assert [message["role"] for message in last[3]] == ["user", "assistant"]


def test_a_question_that_waits_for_its_turn_can_be_taken_back(page, assistant, png):
    visitor = assistant.new_visitor()
    page.add_image(png, visitor)
    page.take("why?", visitor)
    with pytest.raises(Refused, match="still being answered"):  # a second click
        page.take("why?", visitor)
    _, row, _, transcript, question, status = page.stop(visitor)
    assert (transcript, question, status, len(row["value"])) == ([], "why?", "", 1)
    (nothing,) = page.answer(0.0, 4, visitor)  # nothing is queued any more
    assert all(unchanged(part) for part in nothing) and visitor.chat.session.messages == []
    send(page, "why?", 4, visitor)
    page.take_again(visitor)
    assert [message["role"] for message in page.stop(visitor)[3]] == ["user", "user", "assistant"]


def test_what_is_written_is_no_markup(page, assistant):
    visitor = assistant.new_visitor()
    shown = page.take('<img src="http://example.com/x"> a < b & c', visitor)[3]
    assert shown[0]["content"] == '&lt;img src="http://example.com/x"&gt; a &lt; b &amp; c'
    assert page.stop(visitor)[4].startswith("<img")  # unescaped in the question box


def test_a_chat_cleared_in_mid_answer_stays_cleared(page, assistant):
    visitor = assistant.new_visitor()
    page.take("why?", visitor)
    stream = page.answer(0.0, 8, visitor)
    next(stream), next(stream)
    old = visitor.chat
    page.clear(visitor)
    (last,) = stream
    assert all(unchanged(part) for part in last)  # nothing of the old chat is shown
    assert page.settle(visitor) == ([], "") and visitor.chat is not old
    assert id(old.session) not in assistant._recent  # its cache is freed too


def test_what_goes_wrong_is_one_line_without_details(caplog):
    def fails(path):
        raise OSError(f"/secret/{path} is broken")

    def streams(path):
        yield 1
        raise Refused("too large")

    with pytest.raises(gradio.Error) as told:
        for_visitors(fails)("x")
    assert told.value.message == GENERAL_ERROR and "/secret/x" in caplog.text
    stream = for_visitors(streams)("x")
    assert next(stream) == 1
    with pytest.raises(gradio.Error, match="Too large"):
        next(stream)


def test_speech_fills_the_question(page, assistant):
    with pytest.raises(Refused, match="off here"):
        page.transcribe("hello.wav")
    assistant.transcriber = StandInTranscriber()
    try:
        assert "transcribing" in page.notice("how many.wav") and page.notice(None) == ""
        heard, status = page.transcribe("how many.wav")
        assert (page.append_transcript(heard, "Tell me:"), status) == (("Tell me: how many", ""), "")
        assert page.append_transcript(page.transcribe(None)[0], "typed ")[0] == "typed "  # the recording was removed
        with pytest.raises(Refused, match="No speech was heard"):
            page.transcribe("silence.wav")
        with pytest.raises(Refused, match="holds no sound"):
            page.transcribe("broken.wav")
        with pytest.raises(Refused, match="type the question") as refusal:
            page.transcribe("nobody.wav")
        assert "/" not in str(refusal.value)  # no paths of the server in messages to visitors
    finally:
        assistant.transcriber = None


def test_only_the_latest_chats_keep_their_cache(page, assistant):
    first, second = assistant.new_visitor(), assistant.new_visitor()
    for visitor in (first, second):
        send(page, "why?", 4, visitor)
    assert first.chat.session.cached_tokens == 0 < second.chat.session.cached_tokens
    last = send(page, "and then?", 4, first)  # processed again
    assert len(last[3]) == 4 and second.chat.session.cached_tokens == 0


def test_when_memory_runs_out_the_kept_chats_make_room(page, assistant):
    first, second = assistant.new_visitor(), assistant.new_visitor()
    send(page, "why?", 4, first)
    assert first.chat.session.cached_tokens > 0

    def full(**_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    second.chat.session.model.generate, kept = full, second.chat.session.model.generate
    try:
        page.take("why?", second)
        with pytest.raises(Refused, match="send it again"):
            list(page.answer(0.0, 4, second))
    finally:
        second.chat.session.model.generate = kept
    assert first.chat.session.cached_tokens == 0 and second.chat.transcript == []
    assert len(send(page, "why?", 4, second)[3]) == 2


def test_no_input_makes_the_server_fetch_an_address(assistant, monkeypatch):
    blocks = build_interface(assistant)
    function = next(f for f in blocks.fns.values() if f.name == "take")
    hostile = {"path": "http://127.0.0.1:1/x.png", "meta": {"_type": "gradio.FileData"}}
    fetched = []

    async def fetch(url, *_, **__):
        fetched.append(url)
        raise OSError("fetched")

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", fetch)
    inputs = [hostile, None]
    with pytest.raises(gradio.Error, match="not fetched"):
        asyncio.run(blocks.preprocess_data(function, inputs, None))
    assert fetched == []
    with pytest.raises(OSError, match="fetched"):  # the control: without the guard Gradio fetches for a text box
        asyncio.run(gradio.Blocks.preprocess_data(blocks, function, inputs, None))
    assert fetched == ["http://127.0.0.1:1/x.png"]


def test_no_handler_takes_a_file_that_was_not_uploaded(assistant, tmp_path, monkeypatch):
    """Every input of every handler, with and without the mark that Gradio goes by."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    blocks = build_interface(assistant)
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    checked = 0
    for function in blocks.fns.values():
        for position in range(len(function.inputs)):
            for path in (str(tmp_path / "secret.png"), "/dev/zero", "/no/such/file", "http://127.0.0.1:1/x.png"):
                for payload in ({"path": path}, {"path": path, "meta": {"_type": "gradio.FileData"}}):
                    inputs = [None] * len(function.inputs)
                    inputs[position] = payload
                    with pytest.raises(gradio.Error, match="not uploaded here|not fetched"):
                        asyncio.run(blocks.preprocess_data(function, inputs, None))
                    checked += 1
    assert checked > 100
    function = next(f for f in blocks.fns.values() if f.name == "add_image")
    hostile = [{"path": str(tmp_path / "secret.png")}, None]
    taken = asyncio.run(gradio.Blocks.preprocess_data(blocks, function, hostile, None))  # the control: Gradio takes it
    assert Path(taken[0]).name == "secret.png"


def test_the_second_image_of_a_tab_is_checked_as_the_first(assistant, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    blocks = build_interface(assistant)
    state = SessionState(blocks)
    function = next(f for f in blocks.fns.values() if f.name == "add_image")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    inputs = [{"path": str(tmp_path / "a.png")}, None]

    def received(data_of) -> object:
        return asyncio.run(data_of(blocks, function, inputs, state))[0]

    first = received(type(blocks).preprocess_data)
    assert Path(first).name == "a.png"
    image = function.inputs[0]
    state[image._id] = type(image)()  # as Gradio does after an update
    assert received(type(blocks).preprocess_data) == first  # a path, not a decoded image
    state[image._id] = type(image)()
    assert not isinstance(received(gradio.Blocks.preprocess_data), str)  # the control: Gradio's own opens the file


def test_refusals_outside_the_queue_are_words_in_the_status_line(page, assistant):
    visitor = assistant.new_visitor()
    take = with_notice(page.take)
    with pytest.raises(gradio.Error):  # so that no answer is started
        take("  ", visitor)
    assert page.show_notice(visitor)[-1] == "Type or say a question, or give a picture."
    *_, status = take("why?", visitor)
    stream = page.answer(0.0, 6, visitor)
    assert next(stream)[-1] == "reading ..."
    with pytest.raises(gradio.Error):
        take("and?", visitor)
    shown = page.show_notice(visitor)
    assert shown[-1] == STILL_ANSWERING and len(shown[3]) == len(visitor.chat.transcript) == 2
    assert STILL_ANSWERING in next(stream)[-1]  # while the answer is written
    assert STILL_ANSWERING not in list(stream)[-1][-1] and visitor.chat.transcript[0]["content"] == "why?"

    def fails(visitor):
        raise OSError("/secret is broken")

    assert in_status_line(fails, 1)(visitor) == GENERAL_ERROR


def test_every_handler_outside_the_queue_can_speak(assistant):
    """Its last output is the status line, or the line beside the images."""
    blocks = build_interface(assistant)
    unqueued = [f for f in blocks.fns.values() if not f.queue and f.outputs and f.name not in (None, "<lambda>")]
    assert len(unqueued) >= 8
    assert all(getattr(function.outputs[-1], "elem_id", None) in ("status", "refused") for function in unqueued)
    events = {f._id: f for f in blocks.fns.values()}
    for name in ("take", "take_again"):  # a refusal starts no answer, which would take a place in the queue
        taken = next(f._id for f in events.values() if f.name == name)
        after = {f.name: f.trigger_only_on_success for f in events.values() if f.trigger_after == taken}
        assert after["answer"] and "show_notice" in after


def test_images_and_examples_need_no_place_in_the_queue(assistant):
    """A queue full of questions refused them too."""
    for function in build_interface(assistant).fns.values():
        if function.name in ("add_image", "choose_example", "drop_images"):
            assert not function.queue, function.name
        elif function.name in ("answer", "transcribe"):  # the control
            assert function.queue


def test_a_chat_that_was_deleted_says_so_once(page, assistant, png):
    """Gradio puts a new visitor in the place of one that it has deleted."""
    tab, another = SimpleNamespace(session_hash="tab"), SimpleNamespace(session_hash="another")
    visitor = assistant.new_visitor()
    assert page.add_image(png, visitor, tab)[-1] == ""
    page.take("why?", visitor, tab)
    list(page.answer(0.0, 4, visitor))
    following = assistant.new_visitor()
    with pytest.raises(Refused, match="Its pictures are gone"):
        page.take("and which is at the top?", following, tab)
    assert following.chat.queued is None
    page.take("and which is at the top?", following, tab)  # sent again
    page.take("why?", visitor, another)  # the control: another tab
    page.clear(following)
    page.take("why?", assistant.new_visitor(), tab)  # nothing was left on the page
    last = assistant.new_visitor()
    assert "Its pictures are gone" in page.add_image(png, last, tab)[-1] and last.chat.waiting == []


def test_a_refused_question_leaves_the_queued_one(page, assistant):
    visitor = assistant.new_visitor()
    page.take("first question", visitor)
    with pytest.raises(gradio.Error):
        with_notice(page.take)("", visitor)
    assert visitor.chat.queued.question == "first question"
    assert page.show_notice(visitor)[3][-1]["content"] == "first question"


def test_a_refused_example_leaves_the_waiting_images(page, assistant, png, tmp_path):
    visitor = assistant.new_visitor()
    page.add_image(png, visitor)
    broken = tmp_path / "broken.png"
    broken.write_text("not an image")
    page.examples.append((str(broken), "what is it?"))
    with pytest.raises(Refused):
        page.choose_example(len(page.examples) - 1, visitor)
    assert len(visitor.chat.waiting) == 1
    page.choose_example(0, visitor)  # the control: an example replaces them
    assert len(visitor.chat.waiting) == 1


def test_a_visitor_who_leaves_stops_the_answer(page, assistant):
    visitor = assistant.new_visitor()
    page.take("why?", visitor)
    stream = page.answer(0.0, 8, visitor)
    next(stream), next(stream)
    stream.close()
    deadline = time.monotonic() + 10
    while visitor.chat.session.busy and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not visitor.chat.session.busy
    assert len(visitor.chat.session.messages) == 2
