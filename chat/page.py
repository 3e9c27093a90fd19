"""What happens when a visitor presses something: the handlers of the page, each with what the page shows next.

Whatever goes wrong in a request ends as one line on the visitor's page: what can be said to a visitor (`Refused`, a
chat that is too long) in its own words, everything else as "something went wrong", the details in the log alone.

A question is taken at once and answered when it is its turn. In between it can be taken back, and the box is free.
"""

import functools
import html
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
import torch

from .assistant import Asked, Assistant, Chat, Visitor
from .limits import Refused, check_question
from .session import ContextFullError


logger = logging.getLogger(__name__)

APOLOGY = "Something went wrong here. It has been noted; try again, or clear the chat."
STILL = "Your last question is still being answered. Wait for the answer, or stop it."
RECEIVING = "Your picture is still being taken in. Send again in a moment."
WAITING = "waiting for its turn ..."


def for_visitors(handler: Callable) -> Callable:
    """Turn every exception of a handler into one line for the visitor; the app goes on."""

    def told(error: Exception) -> gr.Error:
        if isinstance(error, (Refused, ContextFullError)):
            text = str(error)
            return gr.Error(text[0].upper() + text[1:], title="Not possible", print_exception=False)
        logger.error("%s failed", handler.__name__, exc_info=error)
        return gr.Error(APOLOGY, title="Sorry", print_exception=False)

    @functools.wraps(handler)
    def guarded(*args: Any) -> Any:
        try:
            return handler(*args)
        except Exception as error:
            raise told(error) from None

    @functools.wraps(handler)
    def guarded_stream(*args: Any) -> Iterator[Any]:
        try:
            yield from handler(*args)
        except Exception as error:
            raise told(error) from None

    return guarded_stream if inspect.isgeneratorfunction(handler) else guarded


class Page:
    """
    The handlers of the page.

    Args:
        assistant (`Assistant`): Who answers.
        examples (`list[tuple[str, str]]`): Picture files and questions to click.
    """

    def __init__(self, assistant: Assistant, examples: list[tuple[str, str]]):
        self.assistant = assistant
        self.examples = examples

    def add_picture(self, path: str | None, visitor: Visitor):
        """An uploaded picture -> the row of pictures that wait for a question; the input is free for the next."""
        if path is None:  # it was just made free
            return (gr.skip(),) * 4
        try:
            self.assistant.receive(visitor.chat, path)
        except Refused as error:
            gr.Warning(str(error), title="Not possible")
        return *self._pictures(visitor), None

    def drop_pictures(self, visitor: Visitor):
        chat = visitor.chat
        with chat.lock:
            chat.waiting = []
        return self._pictures(visitor)

    def choose_example(self, index: int, visitor: Visitor):
        path, question = self.examples[int(index)]
        self.drop_pictures(visitor)
        self.assistant.receive(visitor.chat, path)
        return *self._pictures(visitor), question

    def notice(self, path: str | None) -> str:
        """What the status says while a recording is listened to."""
        if path is None or self.assistant.transcriber is None:
            return ""
        if self.assistant.transcriber.ready:
            return "listening to the recording ..."
        return "the speech recogniser is starting; its first start takes minutes, later ones seconds ..."

    def transcribe(self, path: str | None) -> tuple[str, str]:
        """A recording -> its words, and an empty status."""
        return ("" if path is None else self.assistant.listen(path)), ""

    def add_words(self, heard: str, question: str) -> str:
        """What was heard goes behind what is typed by now, to be read and corrected before it is sent."""
        return f"{question} {heard}".strip() if heard else question

    def take(self, question: str, visitor: Visitor):
        """The question and the waiting pictures go into the chat, to be answered when it is their turn."""
        chat, question = visitor.chat, check_question(question, self.assistant.limits)
        with chat.lock:
            if chat.asked or chat.answering:
                raise Refused(STILL)
            if chat.receiving:
                raise Refused(RECEIVING)
            if not question and not chat.waiting:
                raise Refused("Type or say a question, or give a picture.")
            chat.asked = asked = Asked(question, chat.waiting, chat.transcript)
            chat.transcript = [*asked.before, *self._messages(asked)]
            chat.waiting = []
        return self._view(visitor, "", WAITING)

    def take_again(self, visitor: Visitor):
        """The last question is to be answered once more."""
        chat = visitor.chat
        with chat.lock:
            if chat.asked or chat.answering:
                raise Refused(STILL)
            if not chat.session.messages:
                raise Refused("Nothing has been asked yet.")
            chat.asked = Asked("", [], chat.transcript, again=True)
            chat.transcript = chat.transcript[:-1]
        return self._view(visitor, gr.skip(), WAITING)

    def answer(self, temperature: float, new_tokens: int, visitor: Visitor):
        """What was asked -> the answer while it is written."""
        chat, problem = visitor.chat, None
        try:
            answer = self._begin(chat, temperature, new_tokens)
            if answer is None:  # taken back, or the chat was cleared
                yield self._unchanged()
                return
            yield from self._write(visitor, chat, answer)
            view = self._summary(visitor, chat)
        except Exception as error:  # the session is as it was; so is the page
            problem, view = error, self._take_back(visitor, chat, chat.answering)
            if chat.gone:
                logger.error("an answer failed whose chat was cleared meanwhile", exc_info=error)
        finally:  # before the last view: who sees it may ask again
            chat.answering = None
        if problem is not None and is_out_of_memory(problem):
            logger.error("memory has run out; a smaller --kept_chats leaves more of it", exc_info=problem)
            self.assistant.make_room()
            problem = Refused("There was too little memory for that. There is more now: send it again.")
        yield view
        if problem is not None and not chat.gone:
            raise problem

    def stop(self, visitor: Visitor):
        """An answer ends here; a question that still waits for its turn goes back into its box."""
        chat = visitor.chat
        with chat.lock:
            if chat.asked is None:
                chat.session.stop()
        return self.give_up(visitor)

    def clear(self, visitor: Visitor):
        self.assistant.goodbye(visitor)
        return self._view(visitor, "", "")

    def settle(self, visitor: Visitor):
        """After an answer: the chat as it is, in case it was cleared in the answer's last moment."""
        if visitor.chat.transcript:
            return gr.skip(), gr.skip()
        return [], ""

    def give_up(self, visitor: Visitor):
        """A question whose turn can't come, since too many wait already, goes back into its box."""
        chat = visitor.chat
        with chat.lock:
            asked, chat.asked = chat.asked, None
            return self._unchanged() if asked is None else self._take_back(visitor, chat, asked)

    # ------------------------------------------------------------------ inside

    def _begin(self, chat: Chat, temperature: float, new_tokens: int) -> Iterator[str] | None:
        """From waiting to being answered, in one step for whoever presses Stop; `None` if nothing waits."""
        with chat.lock:
            asked, chat.asked = chat.asked, None
            if asked is None:
                return None
            chat.answering = asked
            options = self._options(temperature, new_tokens)
            if asked.again:
                return chat.session.retry(**options)
            return chat.session.ask(asked.question, [shown.picture for shown in asked.pictures], **options)

    def _write(self, visitor: Visitor, chat: Chat, answer: Iterator[str]):
        said = {"role": "assistant", "content": ""}
        chat.transcript = [*chat.transcript, said]
        try:
            yield self._progress(visitor, "reading ...")
            while not chat.gone and (text := next(answer, None)) is not None:
                said["content"] = text
                if not chat.gone:
                    yield self._progress(visitor, "writing ...")
        finally:
            answer.close()  # type: ignore[attr-defined]  # a generator: what the page is closed by ends it as well
            self.assistant.keep_recent(chat)
        if not chat.gone:
            said["content"] = chat.session.messages[-1]["content"][0]["text"] or "(no answer)"

    def _summary(self, visitor: Visitor, chat: Chat):
        """The complete answer, and what it took."""
        turn = chat.session.last_turn
        if chat.gone or turn is None:
            return self._unchanged()
        speed = turn.new_tokens / max(turn.seconds, 1e-9)
        ends = {
            "length": " · cut at the length that is set",
            "context": " · the chat is full: clear it",
            "stopped": " · stopped",
        }
        status = (
            f"{turn.prompt_tokens} tokens, {turn.cached_tokens} of them known from before · first word after "
            f"{turn.seconds_to_first_token:.2f} s · {turn.new_tokens} new tokens, {speed:.0f} a second"
        )
        return self._progress(visitor, status + ends.get(turn.finish_reason, ""))

    def _take_back(self, visitor: Visitor, chat: Chat, asked: Asked):
        """The page as it was before the question; if the chat was cleared since, as it is."""
        if chat.gone:
            return self._unchanged()
        with chat.lock:
            chat.transcript, chat.waiting = asked.before, [*asked.pictures, *chat.waiting]
        return self._view(visitor, gr.skip() if asked.again else asked.question, "")

    def _options(self, temperature: float, new_tokens: int) -> dict[str, Any]:
        try:
            temperature, new_tokens = float(temperature), int(new_tokens)
        except (TypeError, ValueError, OverflowError):
            raise Refused("Temperature and length must be numbers.") from None
        if not 0 <= temperature <= 2 or not 1 <= new_tokens <= self.assistant.limits.new_tokens:
            raise Refused(f"The temperature is 0 to 2, the length 1 to {self.assistant.limits.new_tokens} tokens.")
        return {"temperature": temperature, "max_new_tokens": new_tokens}

    def _messages(self, asked: Asked) -> list[dict]:
        messages: list[dict] = [
            {"role": "user", "content": {"path": shown.thumbnail, "alt_text": "picture"}} for shown in asked.pictures
        ]
        return [*messages, {"role": "user", "content": asked.question}] if asked.question else messages

    def _view(self, visitor: Visitor, question: Any, status: str):
        return *self._pictures(visitor), as_plain_text(visitor.chat.transcript), question, status

    def _progress(self, visitor: Visitor, status: str):
        """Only what changes while an answer is written: the next question may be typed meanwhile. (The visitor is the
        same; handed over, it counts as not idle.)"""
        return visitor, gr.skip(), gr.skip(), as_plain_text(visitor.chat.transcript), gr.skip(), status

    def _unchanged(self):
        return (gr.skip(),) * 6

    def _pictures(self, visitor: Visitor):
        """The visitor, the row of waiting pictures and the button that empties it."""
        shown = [shown.thumbnail for shown in visitor.chat.waiting]
        return visitor, gr.update(value=shown, visible=bool(shown)), gr.update(visible=bool(shown))


def is_out_of_memory(error: Exception) -> bool:
    """Of a GPU, of Python, or of PyTorch on a CPU, which says so in an ordinary `RuntimeError`."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def as_plain_text(transcript: list[dict]) -> list[dict]:
    """A chat for Gradio, which takes what is written for HTML even where it is told not to take it for Markdown."""
    return [
        {**message, "content": html.escape(message["content"], quote=False)}
        if isinstance(message["content"], str)
        else message
        for message in transcript
    ]
