"""The chats of all visitors, found by the signed keys that their browsers keep.

The browser tab keeps the key, so a reloaded page shows its chat again, with its images. A key that this server did not
sign opens nothing. The key of a chat that is gone is told apart from that of a new one, and so no question is answered
without the conversation that it belongs to.

The handlers of a page run concurrently: an image may be decoded while a question is sent and the chat is cleared.
Everything that belongs to one chat is in a `Chat`, and a handler checks at its end whether its chat has been closed.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .limits import Limits
from .session import ChatSession, PreparedImage, Turn


LOOK = 60.0  # seconds between two looks for idle chats
ENDS = {
    "length": " · truncated at the longest answer set",
    "context": " · the context is full: clear the chat",
    "stopped": " · stopped",
}


@dataclass
class ChatImage:
    """
    An image of a chat.

    Args:
        prepared (`PreparedImage`): The image as the model takes it.
        thumbnail (`str`): File of a small copy, for the page.
    """

    prepared: PreparedImage
    thumbnail: str


@dataclass(eq=False)
class Question:
    """
    A question, with its answer once it has one.

    Args:
        text (`str`): Its text.
        images (`list[ChatImage]`): Its images.
        files (`list[str]`): The files that were uploaded with it, for the composer if the question is given back.
        after (`int`): Number of answered questions before it; those that follow in the chat are dropped by its answer.
        returns (`bool`): Whether the composer gets it back if it is not answered.
        answer (`str` or `None`): What the model has written so far.
        claimed (`bool`): Whether a handler waits for the model with it, or writes its answer.
        writing (`bool`): Whether its answer is being written.
    """

    text: str
    images: list[ChatImage]
    files: list[str]
    after: int
    returns: bool = True
    answer: str | None = None
    claimed: bool = False
    writing: bool = False


@dataclass(eq=False)
class Chat:
    """
    All questions, answers and images between two clicks on Clear.

    Args:
        session (`ChatSession`): The chat session with the model.
        name (`str`): Its name in [`Chats`].
        answered (`list[Question]`): The questions that have answers.
        pending (`Question` or `None`): The question that waits for the model or is being answered.
        withdrawn (`Question` or `None`): A question that the page has not put back into its composer yet.
        cleared (`list[Question]`): The questions that Clear has taken away, until another one is asked.
        received (`dict[str, ChatImage]`): The images in the composer, by their files.
        heard (`dict[str, str]`): Transcripts of the recordings in the composer, by their files.
        refused (`set[str]`): Files that the composer must drop.
        status (`str`): What happens, or the counts of the last answer.
        notice (`str`): Why the last click did nothing; empty if it did something.
        closed (`bool`): Whether the chat was cleared, or deleted.
        used (`float`): When a handler last used it, by `time.monotonic`.
        lock (`threading.RLock`): Held while `answered`, `pending` and `withdrawn` are read and changed.
        reading (`threading.Lock`): Held while images are decoded, so that a question waits for its own.
    """

    session: ChatSession
    name: str = ""
    answered: list[Question] = field(default_factory=list)
    pending: Question | None = None
    withdrawn: Question | None = None
    cleared: list[Question] = field(default_factory=list)
    received: dict[str, ChatImage] = field(default_factory=dict)
    heard: dict[str, str] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    status: str = ""
    notice: str = ""
    closed: bool = False
    used: float = 0.0
    lock: Any = field(default_factory=threading.RLock)
    reading: Any = field(default_factory=threading.Lock)

    @property
    def shown(self) -> list[Question]:
        """The questions that the page shows (`list[Question]`), the pending one last."""
        pending = self.pending
        return self.answered if pending is None else [*self.answered[: pending.after], pending]

    def conversation(self, question: Question, system: str = "") -> tuple[list[dict], list[PreparedImage]]:
        """The messages up to a question, as chat templates take them, and their images in reading order."""
        messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
        asked = [*self.answered[: question.after], question]
        for one in asked:
            parts: list[dict] = [{"type": "image"} for _ in one.images]
            parts += [{"type": "text", "text": one.text}] if one.text else []
            messages.append({"role": "user", "content": parts})
            if one is not question:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": one.answer}]})
        return messages, [image.prepared for one in asked for image in one.images]

    def claim(self) -> Question | None:
        """The pending question, for the handler that will answer it; `None` if there is none, or another has it."""
        with self.lock:
            if self.pending is None or self.pending.claimed:
                return None
            self.pending.claimed = True
            return self.pending

    def record(self, question: Question) -> None:
        """Keep the answer that the session has written, if it has; what followed the question before is dropped."""
        with self.lock:
            if self.session.last_turn is not None and not self.closed:
                question.answer = self.session.messages[-1]["content"][0]["text"]
                self.answered = [*self.answered[: question.after], question]
                self.pending, self.notice, self.status = None, "", summary(self.session.last_turn)

    def take_back(self) -> Question | None:
        """The withdrawn question, once."""
        with self.lock:
            back, self.withdrawn = self.withdrawn, None
            return back

    def withdraw(self, question: Question) -> None:
        """Take a pending question out of the chat, for the composer if it came from there."""
        with self.lock:
            if self.pending is question:
                question.answer, question.claimed, question.writing = None, False, False
                self.pending, self.status = None, ""
                self.withdrawn = question if question.returns else None

    def touch(self) -> None:
        """Count as used, and keep the files of the chat from Gradio's deletion of old files."""
        self.used = time.monotonic()
        for question in (*self.shown, *self.cleared):
            for file in (*question.files, *(image.thumbnail for image in question.images)):
                with contextlib.suppress(OSError):
                    os.utime(file)


class Chats:
    """
    The open chats. The one used longest ago is closed when there are more than `visitors`, those without a question
    first, and a chat that was not used for `idle_seconds`.

    Args:
        limits (`Limits`): Their number and age.
        new_session (`Callable`): Makes the session of a new chat.
        stop (`Callable`): Called with a chat that was closed.
    """

    def __init__(self, limits: Limits, new_session: Callable[[], ChatSession], stop: Callable[[Chat], None]):
        self.limits, self._new_session, self._stop = limits, new_session, stop
        self._secret = secrets.token_bytes(32)
        self._chats: OrderedDict[str, Chat] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._chats)

    def key(self, chat: Chat) -> str:
        """The key of a chat (`str`): its name, whether it has a question, and the signature of both."""
        signed = f"{chat.name}.{int(bool(chat.shown))}"
        return f"{signed}.{self._sign(signed)}"

    def find(self, key: Any) -> tuple[Chat, bool]:
        """
        The chat of a key, and whether the page that sent the key shows another one, which is gone: it was closed, or
        another process of this server signed the key. An empty key is that of a new page.
        """
        signed, _, signature = str(key or "").rpartition(".")
        genuine = hmac.compare_digest(signature.encode("utf-8", "replace"), self._sign(signed).encode())
        name, _, asked = signed.partition(".")
        self.close_idle()
        with self._lock:
            chat = self._chats.get(name) if genuine else None
            lost = bool(key) and chat is None and (not genuine or asked == "1")
            if chat is None:
                # the key of a lost chat stays lost until its page has a new one
                chat = Chat(self._new_session(), secrets.token_urlsafe(16) if lost or not genuine else name)
                self._chats[chat.name] = chat
            self._chats.move_to_end(chat.name)
            surplus = [self._remove_one() for _ in range(len(self._chats) - self.limits.visitors)]
        chat.touch()
        for old in surplus:
            self._close(old)
        return chat, lost

    def clear(self, chat: Chat) -> Chat:
        """
        Close a chat and put an empty one in its place (`Chat`), which can bring its questions back. A recording that
        is still in the composer is heard for the new one.
        """
        kept = {"cleared": chat.answered or chat.cleared, "heard": chat.heard, "refused": chat.refused}
        with self._lock:
            fresh = self._chats[chat.name] = Chat(self._new_session(), chat.name, **kept)
        fresh.touch()
        self._close(chat)
        return fresh

    def close_idle(self) -> None:
        """Close the chats that were not used for `idle_seconds`."""
        oldest = time.monotonic() - self.limits.idle_seconds
        with self._lock:
            idle = [self._chats.pop(name) for name, chat in [*self._chats.items()] if chat.used < oldest]
        for chat in idle:
            self._close(chat)

    def watch(self) -> None:
        """Close idle chats from now on, also while no request comes."""

        def run() -> None:
            while True:
                time.sleep(min(LOOK, self.limits.idle_seconds))
                self.close_idle()

        threading.Thread(target=run, name="idle-chats", daemon=True).start()

    def _remove_one(self) -> Chat:
        *others, _ = self._chats.values()  # the last one is in use
        return self._chats.pop(next((chat for chat in others if not chat.shown), others[0]).name)

    def _close(self, chat: Chat) -> None:
        with chat.lock:
            chat.closed, chat.pending = True, None
        self._stop(chat)

    def _sign(self, text: str) -> str:
        return hmac.new(self._secret, text.encode("utf-8", "replace"), hashlib.sha256).hexdigest()


def summary(turn: Turn) -> str:
    """Token counts and times of an answer in one line (`str`)."""
    speed = turn.new_tokens / max(turn.seconds, 1e-9)
    return (
        f"{turn.prompt_tokens} tokens, {turn.cached_tokens} of them cached · first word after "
        f"{turn.seconds_to_first_token:.2f} s · {turn.new_tokens} new tokens, {speed:.0f} a second"
    ) + ENDS.get(turn.finish_reason, "")
