"""The chats of visitors: found by signed keys, closed by number and age."""

import os
import time
from types import SimpleNamespace

import pytest

from jnana.chat.chats import ChatImage, Chats, Question
from jnana.chat.limits import Limits


@pytest.fixture
def chats():
    closed: list = []
    made = Chats(Limits(visitors=3, idle_seconds=100), lambda: SimpleNamespace(), closed.append)
    made.closed = closed
    return made


def ask(chat) -> None:
    chat.answered = [Question("why?", [], [], 0, answer="so")]


def test_a_key_finds_its_chat_again(chats):
    first, second = chats.find("")[0], chats.find(None)[0]
    assert first is not second
    ask(first)
    for chat in (first, second):
        assert chats.find(chats.key(chat)) == (chat, False)
    ask(second)


def test_a_forged_key_gives_nothing(chats):
    chat = chats.find("")[0]
    ask(chat)
    key = chats.key(chat)
    name, asked, signature = key.split(".")
    others = Chats(chats.limits, lambda: SimpleNamespace(), lambda chat: None)
    forged = [
        *(f"{name}.{asked}.{signature[:-1]}{'0' if signature[-1] != '0' else '1'}", f"{name}.0.{signature}"),
        *(f"{name}.{asked}.", f"{name}.{asked}", name, "x", "..", "ä.1.ö", "\ud800", 3, {"a": 1}),
        others.key(SimpleNamespace(name=name, shown=[1])),  # signed by another process
    ]
    for one in forged:
        found, lost = chats.find(one)
        assert found is not chat and found.answered == [] and found.name != name and lost, one
    assert chats.find(key) == (chat, False)  # the control


def test_too_many_chats_close_those_without_a_question_first(chats):
    first, second, third = (chats.find("")[0] for _ in range(3))
    ask(first)
    keys = [chats.key(chat) for chat in (first, second, third)]
    chats.find("")
    assert chats.closed == [second] and second.closed
    assert chats.find(keys[0]) == (first, False)
    found, lost = chats.find(keys[1])
    assert found is not second and not lost  # its page shows nothing that is gone
    for _ in range(3):
        ask(chats.find("")[0])
    found, lost = chats.find(keys[0])
    assert lost and found.answered == [] and len(chats) == 3


def test_idle_chats_close(chats, monkeypatch):
    now = time.monotonic()
    chat, other = chats.find("")[0], chats.find("")[0]
    key = chats.key(chat)
    ask(chat)
    asked = chats.key(chat)
    monkeypatch.setattr("jnana.chat.chats.time.monotonic", lambda: now + 90)
    chats.find(key)
    monkeypatch.setattr("jnana.chat.chats.time.monotonic", lambda: now + 180)
    chats.close_idle()
    assert chats.closed == [other] and chats.find(asked) == (chat, False)
    monkeypatch.setattr("jnana.chat.chats.time.monotonic", lambda: now + 300)
    assert chats.find(asked)[1] and chat.closed


def test_a_cleared_chat_is_replaced(chats):
    chat = chats.find("")[0]
    ask(chat)
    key = chats.key(chat)
    fresh = chats.clear(chat)
    assert chat.closed and chats.find(key) == (fresh, False) and fresh.answered == []


def test_the_files_of_a_used_chat_stay_young(chats, tmp_path):
    """Gradio deletes files by their age."""
    file = tmp_path / "a.png"
    file.touch()
    os.utime(file, (0, 0))
    before = file.stat().st_ctime_ns
    chat = chats.find("")[0]
    chat.answered = [Question("why?", [ChatImage(None, str(file))], [str(tmp_path / "gone")], 0, answer="so")]
    chats.find(chats.key(chat))
    assert file.stat().st_mtime > 0 and file.stat().st_ctime_ns >= before
