"""What happens when a visitor presses something: the handlers of the page, each with what the page shows next.

Whatever goes wrong in a request ends as one line on the visitor's page: what can be said to a visitor (`Refused`, a
chat that is too long) in its own words, everything else as "something went wrong", the details in the log alone.

A question is taken at once and answered when it is its turn. In between it can be taken back, and the box is free.
"""

import functools
import html
import logging
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
import torch

from .assistant import Asked, Assistant, Visitor
from .limits import Refused, check_question
from .session import ContextFullError


logger = logging.getLogger(__name__)

APOLOGY = "Something went wrong here. It has been noted; try again, or clear the chat."
STILL = "Your last question is still being answered. Wait for the answer, or stop it."
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

    return guarded_stream if handler.__code__.co_flags & 0x20 else guarded  # 0x20: a generator


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

    def add_picture(self, path: str | None, visitor: Visitor | None):
        """An uploaded picture -> the row of pictures that wait for a question; the input is free for the next."""
        if path is None:  # it was just made free
            return (gr.skip(),) * 4
        visitor = self._present(visitor)
        try:
            self.assistant.receive(visitor, path)
        except Refused as error:
            gr.Warning(str(error), title="Not possible")
        return *self._pictures(visitor), None

    def drop_pictures(self, visitor: Visitor | None):
        visitor = self._present(visitor)
        visitor.waiting = []
        return self._pictures(visitor)

    def choose_example(self, index: int, visitor: Visitor | None):
        visitor = self._present(visitor)
        path, question = self.examples[int(index)]
        visitor.waiting = []
        self.assistant.receive(visitor, path)
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

    def take(self, question: str, visitor: Visitor | None):
        """The question and the waiting pictures go into the chat, to be answered when it is their turn."""
        visitor = self._present(visitor)
        question = check_question(question, self.assistant.limits)
        if visitor.asked is not None or visitor.session.busy:
            raise Refused(STILL)
        if not question and not visitor.waiting:
            raise Refused("Type or say a question, or give a picture.")
        visitor.asked = asked = Asked(question, visitor.waiting, visitor.transcript)
        visitor.transcript = [*asked.before, *self._messages(asked)]
        visitor.waiting = []
        return self._view(visitor, "", WAITING)

    def take_again(self, visitor: Visitor | None):
        """The last question is to be answered once more."""
        visitor = self._present(visitor)
        if visitor.asked is not None or visitor.session.busy:
            raise Refused(STILL)
        if not visitor.session.messages:
            raise Refused("Nothing has been asked yet.")
        visitor.asked = Asked("", [], visitor.transcript, again=True)
        visitor.transcript = visitor.transcript[:-1]
        return self._view(visitor, gr.skip(), WAITING)

    def answer(self, temperature: float, new_tokens: int, visitor: Visitor | None):
        """What was asked -> the answer while it is written."""
        if visitor is None or visitor.asked is None:  # taken back, or the chat was cleared
            yield self._unchanged()
            return
        asked, visitor.asked = visitor.asked, None
        try:
            options = self._options(temperature, new_tokens)
            if asked.again:
                answer = visitor.session.retry(**options)
            else:
                answer = visitor.session.ask(asked.question, [shown.picture for shown in asked.pictures], **options)
            yield from self._write(visitor, answer)
        except Exception as error:  # the session is as it was; so is the page
            yield self._take_back(visitor, asked)
            if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
                logger.exception("memory has run out; a smaller --kept_chats leaves more of it")
                self.assistant.make_room()
                raise Refused("There was too little memory for that. There is more now: send it again.") from None
            raise

    def stop(self, visitor: Visitor | None):
        """An answer ends here; a question that still waits for its turn goes back into its box."""
        if visitor is None:
            return self._unchanged()
        if visitor.asked is None:
            visitor.session.stop()
        return self.give_up(visitor)

    def clear(self, visitor: Visitor | None):
        self.assistant.goodbye(visitor)
        return self._view(self.assistant.welcome(), "", "")

    def settle(self, visitor: Visitor | None):
        """After an answer: the chat as it is, in case it was cleared in the answer's last moment."""
        if visitor is None or visitor.transcript:
            return gr.skip(), gr.skip()
        return [], ""

    def give_up(self, visitor: Visitor | None):
        """A question whose turn can't come, since too many wait already, goes back into its box."""
        if visitor is None or visitor.asked is None:
            return self._unchanged()
        asked, visitor.asked = visitor.asked, None
        return self._take_back(visitor, asked)

    # ------------------------------------------------------------------ inside

    def _present(self, visitor: Visitor | None) -> Visitor:
        return self.assistant.welcome() if visitor is None or visitor.gone else visitor

    def _write(self, visitor: Visitor, answer: Iterator[str]):
        said = {"role": "assistant", "content": ""}
        visitor.transcript = [*visitor.transcript, said]
        yield self._progress(visitor, "reading ...")
        try:
            for text in answer:
                said["content"] = text
                if not visitor.gone:
                    yield self._progress(visitor, "writing ...")
        finally:
            answer.close()  # type: ignore[attr-defined]  # a generator: what the page is closed by ends it as well
            self.assistant.keep_recent(visitor)
        turn = visitor.session.last_turn
        if visitor.gone or turn is None:
            return
        said["content"] = visitor.session.messages[-1]["content"][0]["text"] or "(no answer)"
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
        yield self._progress(visitor, status + ends.get(turn.finish_reason, ""))

    def _take_back(self, visitor: Visitor, asked: Asked):
        """The page as it was before the question."""
        visitor.transcript, visitor.waiting = asked.before, [*asked.pictures, *visitor.waiting]
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
        return *self._pictures(visitor), as_plain_text(visitor.transcript), question, status

    def _progress(self, visitor: Visitor, status: str):
        """Only what changes while an answer is written: the next question may be typed meanwhile."""
        return gr.skip(), gr.skip(), gr.skip(), as_plain_text(visitor.transcript), gr.skip(), status

    def _unchanged(self):
        return (gr.skip(),) * 6

    def _pictures(self, visitor: Visitor):
        """The visitor, the row of waiting pictures and the button that empties it."""
        some = bool(visitor.waiting)
        row = gr.update(value=[shown.thumbnail for shown in visitor.waiting], visible=some)
        return visitor, row, gr.update(visible=some)


def as_plain_text(transcript: list[dict]) -> list[dict]:
    """A chat for Gradio, which takes what is written for HTML even where it is told not to take it for Markdown."""
    return [
        {**message, "content": html.escape(message["content"], quote=False)}
        if isinstance(message["content"], str)
        else message
        for message in transcript
    ]
