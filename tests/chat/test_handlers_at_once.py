"""Concurrent handlers of one visitor: no handler loses the result of another."""

import logging
import threading

import pytest
import torch

from jnana.chat.limits import Refused


gradio = pytest.importorskip("gradio", reason="the app extra (gradio) is not installed")

from jnana.chat import assistant as assistant_module  # noqa: E402
from jnana.chat.page import GENERAL_ERROR, is_out_of_memory  # noqa: E402
from tests.chat.test_interface import (  # noqa: E402
    StandInTranscriber,
    answered,
    assistant,  # noqa: F401  (fixtures)
    chat,  # noqa: F401
    page,  # noqa: F401
    png,  # noqa: F401
    send,
    typed,
    unchanged,
)


SECONDS = 240  # limit of each wait, on a busy machine


@pytest.fixture
def slow(monkeypatch):
    """Images are read after `slow.go` is set; `slow.begun` is set when one waits for it."""

    class Slow:
        begun, go = threading.Event(), threading.Event()

    def read(*arguments):
        Slow.begun.set()
        assert Slow.go.wait(SECONDS)
        return at_once(*arguments)

    at_once = assistant_module.read_image
    monkeypatch.setattr(assistant_module, "read_image", read)
    return Slow


def in_background(handler, *arguments):
    """Run a handler in a thread; the returned function waits for its result."""
    shown = []
    thread = threading.Thread(target=lambda: shown.append(handler(*arguments)), daemon=True)
    thread.start()

    def finished():
        thread.join(SECONDS)
        assert not thread.is_alive()
        return shown[0]

    return finished


def test_a_question_waits_for_its_picture(page, chat, png, slow):  # noqa: F811
    shown = in_background(page.receive, chat, typed("", png))
    assert slow.begun.wait(SECONDS)
    taken = in_background(page.take, chat, typed("what is this?", png))
    slow.go.set()
    assert len(taken()[1]) == 3
    assert shown() == "" or shown().startswith("waiting for the model")  # whichever of the two was done first
    assert len(answered(page, chat)[-1][1]) == 3 and len(chat.answered[0].images) == 1


def test_a_picture_that_comes_after_clear_stays_away(page, chat, png, slow):  # noqa: F811
    shown = in_background(page.receive, chat, typed("", png))
    assert slow.begun.wait(SECONDS)
    fresh = page.assistant.chats.find(page.clear(chat)[0])[0]
    slow.go.set()
    assert shown() == "" and fresh.received == {} and fresh.shown == []


def test_a_recording_heard_after_clear_is_in_the_new_chats_composer(page, chat, assistant, monkeypatch):  # noqa: F811
    """It stayed in the composer, and no question could be sent with it."""
    sound = typed("Tell me:", "how many.wav")
    monkeypatch.setattr(assistant, "transcriber", StandInTranscriber())
    stream = page.listen(chat, sound)
    next(stream)
    fresh = assistant.chats.find(page.clear(chat)[0])[0]
    assert unchanged(page.tidy(fresh, sound))  # not yet
    list(stream)
    assert page.tidy(fresh, sound) == typed("Tell me: how many")


def test_stop_while_it_reads(page, chat):  # noqa: F811
    assert " 8 new tokens" in send(page, chat, "why?", new_tokens=8)[0]  # the control
    page.take(chat, typed("why?"))
    stream = page.answer(chat, "", 0.0, 1.0, 8)
    assert next(stream)[0].startswith("reading")
    page.stop(chat)
    *_, last = stream
    assert " 1 new tokens" in last[0] and last[0].endswith("stopped")
    assert " 8 new tokens" in send(page, chat, "why?", new_tokens=8)[0]  # the next one is not stopped


def test_clear_while_it_reads_leaves_the_model_to_others(page, chat, assistant, monkeypatch):  # noqa: F811
    page.take(chat, typed("why?"))
    stream = page.answer(chat, "", 0.0, 1.0, 8)
    next(stream)
    page.clear(chat)
    asked = []
    monkeypatch.setattr(assistant.model, "generate", lambda **_: asked.append(1))
    (last,) = stream
    assert asked == [] and all(unchanged(part) for part in last) and len(assistant.turn) == 0


def test_an_answer_that_fails_after_clear_brings_nothing_back(page, chat, assistant, monkeypatch, caplog):  # noqa: F811
    reached, go = threading.Event(), threading.Event()

    def late(**_):
        reached.set()
        assert go.wait(SECONDS)
        raise ZeroDivisionError

    monkeypatch.setattr(assistant.model, "generate", late)
    page.take(chat, typed("the old question"))
    stream = page.answer(chat, "", 0.0, 1.0, 8)
    next(stream)
    shown = in_background(list, stream)
    assert reached.wait(SECONDS)
    fresh = assistant.chats.find(page.clear(chat)[0])[0]
    page.take(fresh, typed("the new question"))
    go.set()
    with caplog.at_level(logging.ERROR):
        assert all(unchanged(part) for view in shown() for part in view)
    assert "ZeroDivisionError" in caplog.text
    assert fresh.pending.text == "the new question" and len(fresh.shown) == 1 and GENERAL_ERROR not in fresh.notice


def test_two_clicks_ask_once(page, chat):  # noqa: F811
    page.take(chat, typed("why?"))
    stream = page.answer(chat, "", 0.0, 1.0, 8)
    next(stream)  # the session itself is not busy yet
    assert not chat.session.busy
    for again in (lambda: page.take(chat, typed("and then?")), lambda: page.retry(chat), lambda: page.undo(chat)):
        with pytest.raises(Refused, match="still being answered|Nothing has been asked"):
            again()
    for view in stream:
        if "new tokens" in view[0]:
            page.take(chat, typed("and then?"))  # after the last view the visitor may ask again
    assert chat.pending.text == "and then?"


def test_two_tabs_do_not_share_a_chat(page, assistant):  # noqa: F811
    take = page.guarded(page.take, page.view)
    keys = [take("", typed(text))[0] for text in ("first?", "second?")]
    chats = [assistant.chats.find(key)[0] for key in keys]
    assert [chat.pending.text for chat in chats] == ["first?", "second?"]  # noqa: F811
    assert chats[0].session is not chats[1].session


def test_memory_of_a_cpu_runs_out(page, assistant, monkeypatch):  # noqa: F811
    first, second = (assistant.chats.find("")[0] for _ in range(2))
    send(page, first, "why?")
    assert first.session.cached_tokens > 0
    with monkeypatch.context() as patched:
        patched.setattr(assistant.model, "generate", lambda **_: torch.empty(1 << 50))
        page.take(second, typed("why?"))
        assert "too little memory" in answered(page, second)[-1][0]
    assert first.session.cached_tokens == 0 and second.shown == []
    assert not is_out_of_memory(RuntimeError("shapes differ"))
