"""The page's handlers: the values that they show, and their behaviour after errors."""

import asyncio
import inspect
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
from gradio.helpers import special_args  # noqa: E402

from jnana.chat.assistant import Assistant  # noqa: E402
from jnana.chat.interface import EXAMPLES, build_interface, find_examples  # noqa: E402
from jnana.chat.page import (  # noqa: E402
    BREAK,
    CHAT_LOST,
    GENERAL_ERROR,
    NOTHING_ASKED,
    STILL_ANSWERING,
    Page,
    safe_markdown,
)


ROOT = Path(__file__).parents[2]
MARK = {"_type": "gradio.FileData"}  # by which Gradio knows a file
PAGE_LINES = 731  # of the page before it had a composer


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
def chat(assistant):
    """The empty chat of a new visitor."""
    return assistant.chats.find("")[0]


@pytest.fixture
def png(tmp_path) -> str:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


def typed(text: str, *files: str) -> dict:
    """What the composer holds."""
    return {"text": text, "files": list(files)}


def answered(page: Page, chat, new_tokens: int = 6, system: str = "", temperature: float = 0.0) -> list:
    """The views of the queued question's answer: status line and messages."""
    return list(page.answer(chat, system, temperature, 1.0, new_tokens))


def send(page: Page, chat, text: str, *files: str, **options):
    """Queue a question and answer it, as the page does; returns status line and messages."""
    page.take(chat, typed(text, *files))
    return answered(page, chat, **options)[-1]


def roles(messages: list[dict]) -> list[str]:
    return [message["role"] for message in messages]


def text_of(message: dict) -> str:
    return message["content"]["text"]


def unchanged(value) -> bool:
    return value == gradio.skip()


def test_a_chat(page, chat, png):
    key, messages, composer, status = page.take(chat, typed("what do you see?", png))
    assert composer["value"] == typed("") and composer["stop_btn"] and not composer["submit_btn"]
    assert roles(messages) == ["user", "user", "assistant"] and "waiting" in text_of(messages[-1])
    *earlier, (status, messages) = answered(page, chat)
    assert len(earlier) > 2 and "reading" in earlier[0][0] and "writing" in earlier[1][0]
    assert roles(messages) == ["user", "user", "assistant"] and "0 of them cached" in status
    answer = text_of(messages[-1])
    shown = page.show(chat)
    assert shown[1] == messages and shown[2]["submit_btn"] and not shown[2]["stop_btn"] and "value" not in shown[2]
    page.retry(chat)
    status, messages = answered(page, chat)[-1]
    assert text_of(messages[-1]) == answer and " 0 of them" not in status and len(messages) == 3
    status, messages = send(page, chat, "how many?")
    assert len(messages) == 5 and " 0 of them" not in status
    fresh_key, messages, *_ = page.clear(chat)
    assert messages == [] and chat.closed
    found, lost = page.assistant.chats.find(key)
    assert not lost and found is not chat and found is page.assistant.chats.find(fresh_key)[0]


def test_an_example_is_sent_at_once(page, chat):
    _, messages, *_ = page.choose(chat, gradio.SelectData(None, {"index": 1, "value": None}))
    assert text_of(messages[1]) == "How many pieces are there?" and len(chat.pending.images) == 1
    assert len(answered(page, chat)[-1][1]) == 3
    for wrong in (99, -1, None, "x"):
        with pytest.raises(Refused, match="no such example"):
            page.choose(chat, gradio.SelectData(None, {"index": wrong, "value": None}))


def edited(index, text: str):
    return gradio.EditData(None, {"index": index, "previous_value": "", "value": text})


def test_a_question_is_edited_and_what_followed_it_goes(page, chat, png):
    send(page, chat, "what is this?", png)
    send(page, chat, "and then?")
    _, messages, *_ = page.edit(chat, edited(1, f"how <{BREAK}b>many?"))  # the text under the image
    assert roles(messages) == ["user", "user", "assistant"]
    status, messages = answered(page, chat)[-1]
    assert [question.text for question in chat.answered] == ["how <b>many?"] and len(chat.answered[0].images) == 1
    assert len(messages) == 3 and " 0 of them cached" not in status  # the image is not read again
    for wrong in (3, -1, None, "x"):
        with pytest.raises(Refused, match="no such question"):
            page.edit(chat, edited(wrong, "why?"))
    fresh = page.assistant.chats.find("")[0]
    same = send(page, fresh, "how <b>many?", png)[1]
    assert same[-1] == messages[-1]  # as if it had been asked at once


def test_undo_puts_the_last_question_back(page, chat, png):
    send(page, chat, "first?")
    send(page, chat, "second?", png)
    _, messages, composer, status = page.undo(chat)
    assert roles(messages) == ["user", "assistant"] and status == ""
    assert composer["value"] == typed("second?", png)
    send(page, chat, "other?")
    page.undo(chat), page.undo(chat)
    with pytest.raises(Refused, match="Nothing has been asked"):
        page.undo(chat)


def test_clear_is_undone_until_another_question(page, chat, png, assistant):
    before = send(page, chat, "what is this?", png)[1]
    fresh = chat
    for _ in range(2):  # a second click loses nothing
        fresh = assistant.chats.find(page.clear(fresh)[0])[0]
        assert page.show(fresh)[1] == []
    assert page.undo(fresh)[1] == before
    assert len(send(page, fresh, "and then?")[1]) == 5
    assert fresh.session.messages[0]["content"][0]["type"] == "image"  # it goes on with its image
    last = assistant.chats.find(page.clear(fresh)[0])[0]
    send(page, last, "why?")
    page.undo(last)
    with pytest.raises(Refused, match="Nothing has been asked"):
        page.undo(last)


def test_refusals_leave_the_chat_as_it_was(page, chat, png, assistant):
    with pytest.raises(Refused, match="Type or say a question"):
        page.take(chat, typed("  "))
    with pytest.raises(Refused, match="Nothing has been asked"):
        page.retry(chat)
    for temperature, top_p, length in (
        *((3, 1, 6), ("hot", 1, 6), (0, 1, 0), (0, 1, 9), (float("nan"), 1, 6), (0, 1, float("inf"))),
        *((0, 0, 6), (0, 1.1, 6), (0, None, 6)),
    ):
        page.take(chat, typed("why?"))
        line, _ = list(page.answer(chat, "", temperature, top_p, length))[-1]
        assert "emperature" in line and chat.pending is None and chat.answered == []
        assert page.show(chat)[2]["value"] == typed("why?")  # the question is back
    with pytest.raises(Refused, match="at most 2 pictures"):
        page.take(chat, typed("why?", png, png, png))
    page.take(chat, typed("why?", png))
    with pytest.raises(Refused, match="at most 2 pictures"):  # images of a queued question count too
        assistant.receive(chat, [png, png])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assistant.model, "generate", lambda **_: 1 / 0)
        line, messages = answered(page, chat)[-1]
    assert messages == [] and line == GENERAL_ERROR
    assert page.show(chat)[2]["value"] == typed("why?", png)  # question and images are restored
    assert len(send(page, chat, "why?", png)[1]) == 3


def test_an_answer_that_fails_the_second_time_leaves_the_first(page, chat, assistant):
    _, before = send(page, chat, "why?")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assistant.model, "generate", lambda **_: 1 / 0)
        page.retry(chat)
        assert answered(page, chat)[-1] == (GENERAL_ERROR, before)
    assert "value" not in page.show(chat)[2]
    page.retry(chat)
    assert answered(page, chat)[-1][1] == before


def test_a_question_that_waits_for_its_turn_can_be_taken_back(page, chat, png):
    page.take(chat, typed("why?", png))
    with pytest.raises(Refused, match="still being answered"):  # a second click
        page.take(chat, typed("why?"))
    _, messages, composer, status = page.stop(chat)
    assert (messages, composer["value"], status) == ([], typed("why?", png), "")
    assert answered(page, chat) == [(gradio.skip(), gradio.skip())]  # nothing is queued any more
    assert chat.session.messages == []
    _, before = send(page, chat, "why?")
    page.retry(chat)
    assert page.stop(chat)[1] == before


def test_the_place_in_the_line_is_shown_and_a_full_line_refuses(page, chat, assistant):
    turn = assistant.turn
    tickets = [turn.join(), turn.join()]
    page.take(chat, typed("why?"))
    stream = page.answer(chat, "", 0.0, 1.0, 4)
    line, messages = next(stream)
    assert line == "waiting for the model: 2 before you ..." and "2 before you" in text_of(messages[-1])
    turn.leave(tickets[0])
    assert next(stream)[0] == "waiting for the model: 1 before you ..."
    turn.leave(tickets[1])
    assert next(stream)[0] == "reading ..."
    assert "new tokens" in list(stream)[-1][0] and len(turn) == 0
    tickets = [turn.join() for _ in range(assistant.limits.queue_length + 1)]
    with pytest.raises(Refused, match="Too many questions"):
        page.take(chat, typed("why?"))
    for ticket in tickets[1:]:
        turn.leave(ticket)
    page.take(chat, typed("why?"))
    stream = page.answer(chat, "", 0.0, 1.0, 4)
    next(stream)
    page.stop(chat)  # a withdrawn question leaves the line
    assert list(stream)[-1][0] == "" and len(turn) == 1
    turn.leave(tickets[0])


def test_html_and_foreign_images_are_text_and_code_stays(page, chat):
    written = '<img src="http://example.com/x"> ![x](http://example.com/y) a < b & c </b> <!-- --> `<i>` **bold**'
    marked = safe_markdown(written)
    assert marked.replace(BREAK, "") == written
    for opened in (f"<{BREAK}img", f"!{BREAK}[x]", f"<{BREAK}/b>", f"<{BREAK}!--", "a < b", "`<i>`", "**bold**"):
        assert opened in marked, opened
    code = "```html\n<b>x</b>\n```"
    assert safe_markdown(f"{code}<b>") == f"{code}<{BREAK}b>"
    assert safe_markdown(f"text\n{code[:-4]}") == f"text\n{code[:-4]}"  # while it is being written
    image = "![x](http://example.com/y)"
    for no_code in (f"\\`{image}\\`", f"`` ` `` {image} `", f"text ```{image}"):  # to Markdown an image
        assert f"!{BREAK}[x]" in safe_markdown(no_code), no_code
    _, messages, *_ = page.take(chat, typed(written))
    assert text_of(messages[0]) == marked
    assert page.stop(chat)[2]["value"]["text"] == written


def test_a_chat_cleared_in_mid_answer_stays_cleared(page, chat, assistant):
    page.take(chat, typed("why?"))
    stream = page.answer(chat, "", 0.0, 1.0, 8)
    next(stream), next(stream)
    key = page.clear(chat)[0]
    assert all(unchanged(part) for part in list(stream)[-1])  # nothing of the old chat is shown
    fresh = assistant.chats.find(key)[0]
    assert page.show(fresh)[1] == [] and fresh is not chat
    assert id(chat.session) not in assistant._recent  # its cache is freed too


def test_what_goes_wrong_is_one_line_without_details(page, assistant, caplog):
    def fails(chat, path):
        raise OSError(f"/secret/{path} is broken")

    key = assistant.chats.key(assistant.chats.find("")[0])
    for otherwise, last in ((page.view, -1), (page.line, slice(None))):
        assert page.guarded(fails, otherwise)(key, "x")[last] == GENERAL_ERROR
    assert "/secret/x" in caplog.text


def test_speech_fills_the_question(page, chat, assistant):
    sound = typed("Tell me:", "how many.wav")
    assert list(page.listen(chat, sound))[-1] == "Off here"
    assert page.tidy(chat, sound) == typed("Tell me:")
    chat.refused = set()
    assistant.transcriber = StandInTranscriber()
    try:
        with pytest.raises(Refused, match="still being transcribed"):
            page.take(chat, sound)
        chat.notice = ""
        assert list(page.listen(chat, sound)) == ["transcribing the recording ...", ""]
        assert page.tidy(chat, typed("Tell me: now", "how many.wav")) == typed("Tell me: now how many")
        for name, words in (
            ("silence", "No speech was heard"),
            ("broken", "holds no sound"),
            ("nobody", "type the q"),
        ):
            *_, line = page.listen(chat, typed("", f"{name}.wav"))
            assert words in line and "/" not in line  # no paths of the server in messages to visitors
            assert page.tidy(chat, typed("a", f"{name}.wav")) == typed("a")
        assert unchanged(page.tidy(chat, typed("a")))
    finally:
        assistant.transcriber = None


def test_images_are_checked_while_the_visitor_types(page, chat, png, tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no image")
    assert page.receive(chat, typed("", png)) == ""
    assert "can't be used as a picture" in page.receive(chat, typed("", png, str(tmp_path / "text.png")))
    assert page.tidy(chat, typed("typed", png, str(tmp_path / "text.png"))) == typed("typed", png)
    assert unchanged(page.tidy(chat, typed("typed", png)))
    monkeypatch.setattr("jnana.chat.assistant.read_image", lambda *_: pytest.fail("it was decoded again"))
    page.take(chat, typed("what is it?", png))
    assert len(chat.pending.images) == 1


def test_only_the_latest_chats_keep_their_cache(page, assistant):
    first, second = (assistant.chats.find("")[0] for _ in range(2))
    for one in (first, second):
        send(page, one, "why?")
    assert first.session.cached_tokens == 0 < second.session.cached_tokens
    _, messages = send(page, first, "and then?")  # processed again
    assert len(messages) == 4 and second.session.cached_tokens == 0


def test_when_memory_runs_out_the_kept_chats_make_room(page, assistant):
    first, second = (assistant.chats.find("")[0] for _ in range(2))
    send(page, first, "why?")
    assert first.session.cached_tokens > 0

    def full(**_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assistant.model, "generate", full)
        page.take(second, typed("why?"))
        line, messages = answered(page, second)[-1]
    assert messages == [] and "send it again" in line and first.session.cached_tokens == 0
    assert len(send(page, second, "why?")[1]) == 2


def test_the_system_prompt_and_top_p_reach_the_model(page, chat, assistant, monkeypatch):
    seen = []
    answer = chat.session.answer
    monkeypatch.setattr(
        chat.session, "answer", lambda m, i, **options: seen.append((m, options)) or answer(m, i, **options)
    )
    page.take(chat, typed("why?"))
    list(page.answer(chat, "  Be brief. ", 0.5, 0.9, 4))
    messages, options = seen[0]
    assert messages[0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert options == {"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 4}
    monkeypatch.setattr(assistant._preparer, "encode", lambda messages, images: [1])  # a template that leaves it out
    page.take(chat, typed("why?"))
    assert "takes no system prompt" in list(page.answer(chat, "Be brief.", 0.0, 1.0, 4))[-1][0]
    assert len(send(page, chat, "why?")[1]) == 4  # the control: without one


def test_no_input_makes_the_server_fetch_an_address(assistant, monkeypatch):
    blocks = build_interface(assistant)
    function = next(f for f in blocks.fns.values() if f.name == "take")
    hostile = {"path": "http://127.0.0.1:1/x.png", "meta": {"_type": "gradio.FileData"}}
    fetched = []

    async def fetch(url, *_, **__):
        fetched.append(url)
        raise OSError("fetched")

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", fetch)
    inputs = ["", {"text": "", "files": [hostile]}]
    with pytest.raises(gradio.Error, match="not fetched"):
        asyncio.run(blocks.preprocess_data(function, inputs, None))
    assert fetched == []
    with pytest.raises(OSError, match="fetched"):  # the control: without the guard Gradio fetches it
        asyncio.run(gradio.Blocks.preprocess_data(blocks, function, inputs, None))
    assert fetched == ["http://127.0.0.1:1/x.png"]


def test_no_handler_takes_a_file_that_was_not_uploaded(assistant, tmp_path, monkeypatch):
    """Every input of every handler, with and without the mark that Gradio goes by, alone and in the composer."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    blocks = build_interface(assistant)
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    checked = 0
    for function in blocks.fns.values():
        for position in range(len(function.inputs)):
            for path in (str(tmp_path / "secret.png"), "/dev/zero", "/no/such/file", "http://127.0.0.1:1/x.png"):
                for file in ({"path": path}, {"path": path, "meta": MARK}):
                    for payload in (file, {"text": "", "files": [file]}):
                        inputs = [None] * len(function.inputs)
                        inputs[position] = payload
                        with pytest.raises(gradio.Error, match="not uploaded here|not fetched"):
                            asyncio.run(blocks.preprocess_data(function, inputs, None))
                        checked += 1
    assert checked > 100
    function = next(f for f in blocks.fns.values() if f.name == "take")
    hostile = ["", {"text": "", "files": [{"path": str(tmp_path / "secret.png"), "meta": MARK}]}]
    monkeypatch.setattr("gradio.processing_utils._check_allowed", lambda *_: None)
    taken = asyncio.run(gradio.Blocks.preprocess_data(blocks, function, hostile, None))  # the control: Gradio takes it
    assert Path(taken[1]["files"][0]).name == "secret.png"


def test_no_component_opens_an_upload(assistant, tmp_path, monkeypatch):
    """Files reach the handlers as paths, also after Gradio has put a new component in the place of an updated one."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    blocks = build_interface(assistant)
    (tmp_path / "a.png").write_text("no image")
    files = {"text": "", "files": [{"path": str(tmp_path / "a.png"), "meta": MARK}]}
    for function in blocks.fns.values():
        for component in function.inputs:
            for one in (component, type(component)(**component.constructor_args)):
                if isinstance(one, gradio.MultimodalTextbox):
                    assert one.preprocess(one.data_model(**files)) == {"text": "", "files": [str(tmp_path / "a.png")]}
                else:
                    assert isinstance(one, (gradio.Textbox, gradio.Slider, gradio.Chatbot)), one
        if any(isinstance(component, gradio.Chatbot) for component in function.inputs):
            assert function.fn is None  # it stays in the browser


def test_a_refusal_is_words_and_the_running_answer_goes_on(page, assistant):
    key = page.guarded(page.take, page.view)("", typed("  "))[0]
    chat, _ = assistant.chats.find(key)
    assert page.show(chat)[-1] == NOTHING_ASKED
    take = page.guarded(page.take, page.view)
    assert NOTHING_ASKED not in take(key, typed("why?"))[-1]
    stream = page.answer(chat, "", 0.0, 1.0, 6)
    assert next(stream)[0] == "reading ..."
    shown = take(key, typed("and?"))
    assert STILL_ANSWERING in shown[-1] and len(shown[1]) == 2
    assert "value" not in shown[2] and shown[2]["stop_btn"]  # what was typed stays
    assert list(page.answer(chat, "", 0.0, 1.0, 6)) == [(gradio.skip(), gradio.skip())]  # starts no second answer
    assert STILL_ANSWERING in next(stream)[0]  # while the answer is written
    assert STILL_ANSWERING not in list(stream)[-1][0] and [question.text for question in chat.answered] == ["why?"]


def test_gradio_calls_each_handler_with_what_it_takes(assistant):
    """Every handler has the key as its first input, and as many others as it names."""
    for function in build_interface(assistant).fns.values():
        if function.fn is not None:
            values = list(range(len(function.inputs)))
            data = {"index": 0, "value": "", "previous_value": ""}
            filled = special_args(function.fn, values, event_data=SimpleNamespace(target=None, _data=data))[0]
            assert len(inspect.signature(function.fn).parameters) == len(filled), function.name
            assert function.inputs[0].visible == "hidden", function.name


def test_images_and_examples_need_no_place_in_the_queue(assistant):
    """A queue full of questions refused them too."""
    functions = [function for function in build_interface(assistant).fns.values() if function.fn is not None]
    queued = {function.name for function in functions if function.queue}
    assert queued == {"answer", "listen"}
    assert {"receive", "tidy", "take", "choose", "stop", "show"} <= {function.name for function in functions}


def test_a_visitor_who_leaves_stops_the_answer(page, chat):
    page.take(chat, typed("why?"))
    stream = page.answer(chat, "", 0.0, 1.0, 8)
    next(stream), next(stream)
    stream.close()
    deadline = time.monotonic() + 240  # on a busy machine
    while chat.session.busy and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not chat.session.busy and chat.pending is None
    assert len(chat.answered) == 1 and len(page.assistant.turn) == 0  # the part that was written stays


def test_a_visitor_who_leaves_the_line_finds_the_question_in_the_composer(page, chat, assistant):
    ticket = assistant.turn.join()
    page.take(chat, typed("why?"))
    stream = page.answer(chat, "", 0.0, 1.0, 8)
    next(stream)
    stream.close()
    assert len(assistant.turn) == 1
    assistant.turn.leave(ticket)
    assert page.show(chat)[2]["value"] == typed("why?") and chat.pending is None


def test_a_lost_chat_is_told_and_its_question_not_answered(page, assistant):
    take, show, receive = page.guarded(page.take, page.view), page.guarded(page.show, page.view), None
    key = take("", typed("why?"))[0]
    chat, _ = assistant.chats.find(key)
    answered(page, chat)
    key = show(key)[0]
    assistant.chats._chats.clear()
    receive = page.guarded(page.receive, page.line)
    assert receive(key, typed("and?")) == CHAT_LOST
    fresh, messages, composer, line = take(key, typed("and?"))
    assert messages == [] and line == CHAT_LOST and "value" not in composer  # the page is emptied, the question stays
    assert take(fresh, typed("and?"))[1] != []  # sent again
    empty = show("")[0]
    assistant.chats._chats.clear()
    assert show(empty)[-1] == ""  # the control: nothing was lost


def test_the_page_stays_smaller_than_it_was():
    files = ("app.py", "chat/page.py", "chat/interface.py", "chat/page.js", "chat/page.css")
    lines = sum(len((ROOT / name).read_text().splitlines()) for name in files)
    assert lines < PAGE_LINES, f"{', '.join(files)} have {lines} lines"
