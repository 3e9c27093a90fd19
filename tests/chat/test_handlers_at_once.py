"""Concurrent handlers of one visitor: no handler loses the result of another."""

import asyncio
import logging
import threading

import pytest
import torch

from jnana.chat.limits import Refused


gradio = pytest.importorskip("gradio", reason="the app extra (gradio) is not installed")

from jnana.chat import assistant as assistant_module  # noqa: E402
from jnana.chat.interface import build_interface  # noqa: E402
from jnana.chat.page import is_out_of_memory  # noqa: E402
from tests.chat.test_interface import assistant, page, png, send, unchanged  # noqa: E402, F401  (fixtures)


@pytest.fixture
def slow(monkeypatch):
    """Images are read after `slow.go` is set; `slow.begun` is set when one waits for it."""

    class Slow:
        begun, go = threading.Event(), threading.Event()

    def read(*arguments):
        Slow.begun.set()
        assert Slow.go.wait(30)
        return at_once(*arguments)

    at_once = assistant_module.read_image
    monkeypatch.setattr(assistant_module, "read_image", read)
    return Slow


def in_background(handler, *arguments):
    """Run a handler in a thread; the returned function waits for its result."""
    shown = []
    thread = threading.Thread(target=lambda: shown.append(handler(*arguments)))
    thread.start()

    def finished():
        thread.join(30)
        return shown[0]

    return finished


def test_each_session_has_one_visitor_from_the_start(assistant):  # noqa: F811
    blocks = build_interface(assistant)
    functions = {function.name: function for function in blocks.fns.values()}
    holder = gradio.routes.App.create_app(blocks).state_holder

    def visitor(handler, session, *inputs):
        return asyncio.run(blocks.preprocess_data(functions[handler], [*inputs, None], holder[session]))[-1]

    first = visitor("add_image", "one", None)
    assert visitor("take", "one", "why?") is first and visitor("clear", "one") is first
    other = visitor("take", "two", "why?")
    assert other is not first and other.chat is not first.chat and other.chat.session is not first.chat.session
    state = next(block for block in blocks.blocks.values() if isinstance(block, gradio.State) and block.value)
    assert state.value is not first and state.delete_callback == assistant.close_chat
    asyncio.run(blocks.postprocess_data(functions["drop_images"], [first, *[gradio.skip()] * 3], holder["one"]))
    holder.delete_state("one")  # as after idle_seconds
    assert visitor("clear", "one") is not first


def test_a_question_does_not_overtake_its_picture(page, assistant, png, slow):  # noqa: F811
    visitor = assistant.new_visitor()
    shown = in_background(page.add_image, png, visitor)
    assert slow.begun.wait(30)
    with pytest.raises(Refused, match="still being uploaded"):
        page.take("what is this?", visitor)
    slow.go.set()
    same, row, *_ = shown()
    assert same is visitor and len(row["value"]) == 1
    last = send(page, "what is this?", 4, visitor)
    assert [message["role"] for message in last[3]] == ["user", "user", "assistant"]
    assert visitor.chat.image_count == 1


def test_a_picture_counts_while_it_is_taken_in_and_answered(page, assistant, png, slow):  # noqa: F811
    visitor = assistant.new_visitor()
    shown = in_background(page.add_image, png, visitor)
    assert slow.begun.wait(30) and visitor.chat.image_count == 1
    slow.go.set()
    shown()
    page.take("why?", visitor)
    stream = page.answer(0.0, 4, visitor)
    for _ in stream:
        assert visitor.chat.image_count == 1
    with pytest.raises(Refused, match="can't be used"):
        assistant.receive(visitor.chat, __file__)
    assert visitor.chat.image_count == 1  # refused images do not count


def test_a_picture_that_comes_after_clear_stays_away(page, assistant, png, slow):  # noqa: F811
    visitor = assistant.new_visitor()
    shown = in_background(page.add_image, png, visitor)
    assert slow.begun.wait(30)
    page.clear(visitor)
    slow.go.set()
    same, row, *_ = shown()
    assert (
        same is visitor and row["value"] == [] == visitor.chat.waiting
    )  # the page shows the images that will be sent


def test_stop_while_it_reads(page, assistant):  # noqa: F811
    visitor = assistant.new_visitor()
    assert " 8 new tokens" in send(page, "why?", 8, visitor)[5]  # the control
    page.take("why?", visitor)
    stream = page.answer(0.0, 8, visitor)
    assert next(stream)[5].startswith("reading")
    page.stop(visitor)
    *_, last = stream
    assert " 1 new tokens" in last[5] and last[5].endswith("stopped")
    assert " 8 new tokens" in send(page, "why?", 8, visitor)[5]  # the next one is not stopped


def test_clear_while_it_reads_leaves_the_model_to_others(page, assistant, monkeypatch):  # noqa: F811
    visitor = assistant.new_visitor()
    page.take("why?", visitor)
    stream = page.answer(0.0, 8, visitor)
    next(stream)
    page.clear(visitor)
    asked = []
    monkeypatch.setattr(assistant.model, "generate", lambda **_: asked.append(1))
    (last,) = stream
    assert asked == [] and all(unchanged(part) for part in last)


def test_an_answer_that_fails_after_clear_brings_nothing_back(page, assistant, monkeypatch, caplog):  # noqa: F811
    visitor = assistant.new_visitor()
    reached, go = threading.Event(), threading.Event()

    def late(**_):
        reached.set()
        assert go.wait(30)
        raise ZeroDivisionError

    monkeypatch.setattr(assistant.model, "generate", late)
    page.take("the old question", visitor)
    stream = page.answer(0.0, 8, visitor)
    next(stream)
    shown = in_background(list, stream)
    assert reached.wait(30)
    page.clear(visitor)
    page.take("the new question", visitor)
    go.set()
    with caplog.at_level(logging.ERROR):
        assert all(unchanged(part) for view in shown() for part in view)
    assert "ZeroDivisionError" in caplog.text
    assert visitor.chat.queued.question == "the new question" and len(visitor.chat.transcript) == 1


def test_two_clicks_ask_once(page, assistant):  # noqa: F811
    visitor = assistant.new_visitor()
    page.take("why?", visitor)
    stream = page.answer(0.0, 8, visitor)
    next(stream)  # the session itself is not busy yet
    assert not visitor.chat.session.busy
    for again in (lambda: page.take("and then?", visitor), lambda: page.take_again(visitor)):
        with pytest.raises(Refused, match="still being answered"):
            again()
    for view in stream:
        if "new tokens" in view[5]:
            page.take("and then?", visitor)  # after the last view the visitor may ask again
    assert visitor.chat.queued.question == "and then?"


def test_memory_of_a_cpu_runs_out(page, assistant, monkeypatch):  # noqa: F811
    first, second = assistant.new_visitor(), assistant.new_visitor()
    send(page, "why?", 4, first)
    assert first.chat.session.cached_tokens > 0
    with monkeypatch.context() as patched, pytest.raises(Refused, match="too little memory"):
        patched.setattr(assistant.model, "generate", lambda **_: torch.empty(1 << 50))
        page.take("why?", second)
        list(page.answer(0.0, 4, second))
    assert first.chat.session.cached_tokens == 0 and second.chat.transcript == []
    assert not is_out_of_memory(RuntimeError("shapes differ"))
