"""The event handlers of the chat page. Each returns the new values of the page's components.

Every error of a request becomes one line on the visitor's page. The messages of `Refused` and `ContextFullError` are
shown as they are. All other errors show a general message, with the details in the log only.

A question is queued when it is sent and answered when the model is free. Until then the visitor can withdraw it.
"""

import functools
import html
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from .assistant import Assistant, Chat, QueuedQuestion, Visitor, is_out_of_memory
from .limits import Refused, check_question
from .session import ContextFullError


logger = logging.getLogger(__name__)

GENERAL_ERROR = "Something went wrong on the server, and was logged. Try again, or clear the chat."
STILL_ANSWERING = "Your last question is still being answered. Wait for the answer, or stop it."
STILL_RECEIVING = "Your picture is still being uploaded. Send again in a moment."
CHAT_LOST = (
    "This chat was closed after a long time without a question, or because many others have come. Its pictures are "
    "gone: send them again with the question."
)
WAITING = "waiting for the model ..."


def line_for_visitor(handler: Callable, error: Exception) -> str:
    """One line about an exception of a handler, without details, which are logged."""
    if isinstance(error, (Refused, ContextFullError)):
        text = str(error)
        return text[0].upper() + text[1:]
    logger.error("%s failed", handler.__name__, exc_info=error)
    return GENERAL_ERROR


def in_status_line(handler: Callable, num_outputs: int) -> Callable:
    """
    Decorate a handler that runs outside the queue and whose last output is the status line: every exception becomes
    one line there, and everything else on the page stays as it is.
    """

    @functools.wraps(handler)
    def guarded(*args: Any) -> Any:
        try:
            return handler(*args)
        except Exception as error:
            line = line_for_visitor(handler, error)
        return line if num_outputs == 1 else (*(gr.skip() for _ in range(num_outputs - 1)), line)

    return guarded


def with_notice(handler: Callable) -> Callable:
    """
    Decorate a handler outside the queue whose success starts an answer: every exception is kept as the chat's notice,
    which [`Page.show_notice`] shows, and raised, so that no answer is started.
    """

    @functools.wraps(handler)
    def guarded(*args: Any) -> Any:
        try:
            return handler(*args)
        except Exception as error:
            visitor = next(arg for arg in args if isinstance(arg, Visitor))
            visitor.chat.notice = line_for_visitor(handler, error)
            raise gr.Error(visitor.chat.notice, print_exception=False) from None

    return guarded


def for_visitors(handler: Callable) -> Callable:
    """Decorate a queued handler: every exception becomes one line for the visitor, and the app continues."""

    def visitor_error(error: Exception) -> gr.Error:
        refused = isinstance(error, (Refused, ContextFullError))
        text = line_for_visitor(handler, error)
        return gr.Error(text, title="Not possible" if refused else "Sorry", print_exception=False)

    @functools.wraps(handler)
    def guarded(*args: Any) -> Any:
        try:
            return handler(*args)
        except Exception as error:
            raise visitor_error(error) from None

    @functools.wraps(handler)
    def guarded_stream(*args: Any) -> Iterator[Any]:
        try:
            yield from handler(*args)
        except Exception as error:
            raise visitor_error(error) from None

    return guarded_stream if inspect.isgeneratorfunction(handler) else guarded


class Page:
    """
    The handlers of the page.

    Args:
        assistant (`Assistant`): The model that answers.
        examples (`list[tuple[str, str]]`): Image files and questions to click.
    """

    def __init__(self, assistant: Assistant, examples: list[tuple[str, str]]):
        self.assistant = assistant
        self.examples = examples

    def add_image(self, path: str | None, visitor: Visitor, request: gr.Request | None = None):
        """Add an uploaded image to the waiting ones, and empty the input for the next image."""
        if path is None:  # the input was emptied; another `None` would end an upload that has begun since
            return (gr.skip(),) * 5
        refusal = ""
        try:
            self._check_lost(visitor, request)
            self.assistant.receive(visitor.chat, path)
        except Exception as error:
            refusal = line_for_visitor(self.add_image, error)
        return *self._waiting_images(visitor), None, refusal

    def drop_images(self, visitor: Visitor):
        chat = visitor.chat
        with chat.lock:
            chat.waiting = []
        return *self._waiting_images(visitor), ""

    def choose_example(self, index: int, visitor: Visitor, request: gr.Request | None = None):
        self._check_lost(visitor, request)
        path, question = self.examples[int(index)]
        chat = visitor.chat
        with chat.lock:
            before, chat.waiting = chat.waiting, []
        try:
            self.assistant.receive(chat, path)
        except Exception:
            with chat.lock:
                chat.waiting = [*before, *chat.waiting]
            raise
        return *self._waiting_images(visitor), question, ""

    def notice(self, path: str | None) -> str:
        """The status line while a recording is transcribed."""
        if path is None or self.assistant.transcriber is None:
            return ""
        if self.assistant.transcriber.ready:
            return "transcribing the recording ..."
        return "the speech recogniser is starting; its first start takes minutes, later ones seconds ..."

    def transcribe(self, path: str | None) -> tuple[str, str]:
        """The transcript of a recording, and an empty status line."""
        return ("" if path is None else self.assistant.listen(path)), ""

    def append_transcript(self, transcript: str, question: str) -> tuple[str, str]:
        """Append a transcript to the question box, where the visitor can correct it; and an empty status line."""
        return (f"{question} {transcript}".strip() if transcript else question), ""

    def take(self, question: str, visitor: Visitor, request: gr.Request | None = None):
        """Queue the question with the waiting images."""
        self._check_lost(visitor, request)
        chat, question = visitor.chat, check_question(question, self.assistant.limits)
        with chat.lock:
            chat.notice = ""
            if chat.queued or chat.answering:
                raise Refused(STILL_ANSWERING)
            if chat.receiving:
                raise Refused(STILL_RECEIVING)
            if not question and not chat.waiting:
                raise Refused("Type or say a question, or give a picture.")
            chat.queued = queued = QueuedQuestion(question, chat.waiting, chat.transcript)
            chat.transcript = [*queued.before, *self._messages(queued)]
            chat.waiting = []
        return self._view(visitor, "", WAITING)

    def take_again(self, visitor: Visitor, request: gr.Request | None = None):
        """Queue the last question again."""
        self._check_lost(visitor, request)
        chat = visitor.chat
        with chat.lock:
            chat.notice = ""
            if chat.queued or chat.answering:
                raise Refused(STILL_ANSWERING)
            if not chat.session.messages:
                raise Refused("Nothing has been asked yet.")
            chat.queued = QueuedQuestion("", [], chat.transcript, is_retry=True)
            chat.transcript = chat.transcript[:-1]
        return self._view(visitor, gr.skip(), WAITING)

    def answer(self, temperature: float, new_tokens: int, visitor: Visitor):
        """Answer the queued question, and stream the answer."""
        chat, problem = visitor.chat, None
        try:
            answer = self._begin(chat, temperature, new_tokens)
            if answer is None:  # the question was withdrawn, or the chat was cleared
                yield self._unchanged()
                return
            with self.assistant.turn:  # page and API take turns
                yield from self._write(visitor, chat, answer)
            view = self._summary(visitor, chat)
        except Exception as error:  # the session has restored its state; restore the page too
            problem, view = error, self._restore(visitor, chat, chat.answering)
            if chat.closed:
                logger.error("the answer failed after its chat was cleared", exc_info=error)
        finally:  # before the last view is shown, because the visitor may then ask again
            chat.answering = None
        if problem is not None and is_out_of_memory(problem):
            logger.error("out of memory; a smaller --kept_chats keeps fewer caches", exc_info=problem)
            self.assistant.make_room()
            problem = Refused("There was too little memory for that. Some has been freed: send it again.")
        yield view
        if problem is not None and not chat.closed:
            raise problem

    def stop(self, visitor: Visitor):
        """Stop the answer, or withdraw the queued question into its box."""
        chat = visitor.chat
        with chat.lock:
            if chat.queued is None:
                chat.session.stop()
        return self.withdraw(visitor)

    def clear(self, visitor: Visitor):
        self.assistant.close_chat(visitor)
        self.assistant.forget_tab(visitor)
        return self._view(visitor, "", "")

    def show_notice(self, visitor: Visitor):
        """The page as it is, with the notice in the status line."""
        return self._view(visitor, gr.skip(), visitor.chat.notice)

    def settle(self, visitor: Visitor):
        """Called after an answer: shows an empty chat if the chat was cleared just before the answer ended."""
        if visitor.chat.transcript:
            return gr.skip(), gr.skip()
        return [], visitor.chat.notice

    def withdraw(self, visitor: Visitor):
        """Put the queued question back into its box; also called if the queue is full."""
        chat = visitor.chat
        with chat.lock:
            queued, chat.queued = chat.queued, None
            return self._unchanged() if queued is None else self._restore(visitor, chat, queued)

    # ------------------------------------------------------------------ helpers

    def _check_lost(self, visitor: Visitor, request: gr.Request | None) -> None:
        """
        Refuse once, so that the page is emptied, if the tab had another visitor before: Gradio has deleted that one.

        Raises:
            Refused: with the reason.
        """
        tab = None if request is None else request.session_hash
        if tab is not None and self.assistant.has_lost_chat(tab, visitor):
            raise Refused(CHAT_LOST)

    def _begin(self, chat: Chat, temperature: float, new_tokens: int) -> Iterator[str] | None:
        """Start answering the queued question, under the lock that Stop takes too; `None` if none is queued."""
        with chat.lock:
            queued, chat.queued = chat.queued, None
            if queued is None:
                return None
            chat.answering = queued
            options = self._options(temperature, new_tokens)
            if queued.is_retry:
                return chat.session.retry(**options)
            return chat.session.ask(queued.question, [image.prepared for image in queued.images], **options)

    def _write(self, visitor: Visitor, chat: Chat, answer: Iterator[str]):
        reply = {"role": "assistant", "content": ""}
        chat.transcript = [*chat.transcript, reply]
        try:
            yield self._progress(visitor, "reading ...")  # with the notice that a question was sent too early
            while not chat.closed and (text := next(answer, None)) is not None:
                reply["content"] = text
                if not chat.closed:
                    yield self._progress(visitor, "writing ...")
        finally:
            answer.close()  # type: ignore[attr-defined]  # stops the answer when the page is closed
            self.assistant.keep_recent(chat)
        if not chat.closed:
            reply["content"] = chat.session.messages[-1]["content"][0]["text"] or "(no answer)"

    def _summary(self, visitor: Visitor, chat: Chat):
        """The complete answer, with its token counts and times."""
        turn, chat.notice = chat.session.last_turn, ""
        if chat.closed or turn is None:
            return self._unchanged()
        speed = turn.new_tokens / max(turn.seconds, 1e-9)
        ends = {
            "length": " · truncated at the longest answer set",
            "context": " · the context is full: clear the chat",
            "stopped": " · stopped",
        }
        status = (
            f"{turn.prompt_tokens} tokens, {turn.cached_tokens} of them cached · first word after "
            f"{turn.seconds_to_first_token:.2f} s · {turn.new_tokens} new tokens, {speed:.0f} a second"
        )
        return self._progress(visitor, status + ends.get(turn.finish_reason, ""))

    def _restore(self, visitor: Visitor, chat: Chat, question: QueuedQuestion):
        """Restore the page as it was before the question, unless the chat has been cleared since."""
        if chat.closed:
            return self._unchanged()
        with chat.lock:
            chat.transcript, chat.waiting = question.before, [*question.images, *chat.waiting]
        return self._view(visitor, gr.skip() if question.is_retry else question.question, "")

    def _options(self, temperature: float, new_tokens: int) -> dict[str, Any]:
        try:
            temperature, new_tokens = float(temperature), int(new_tokens)
        except (TypeError, ValueError, OverflowError):
            raise Refused("Temperature and length must be numbers.") from None
        if not 0 <= temperature <= 2 or not 1 <= new_tokens <= self.assistant.limits.new_tokens:
            raise Refused(f"The temperature is 0 to 2, the length 1 to {self.assistant.limits.new_tokens} tokens.")
        return {"temperature": temperature, "max_new_tokens": new_tokens}

    def _messages(self, queued: QueuedQuestion) -> list[dict]:
        messages: list[dict] = [
            {"role": "user", "content": {"path": image.thumbnail, "alt_text": "picture"}} for image in queued.images
        ]
        return [*messages, {"role": "user", "content": queued.question}] if queued.question else messages

    def _view(self, visitor: Visitor, question: Any, status: str):
        return *self._waiting_images(visitor), as_plain_text(visitor.chat.transcript), question, status

    def _progress(self, visitor: Visitor, status: str):
        """
        The values that change while an answer is written; the question box stays untouched, because the visitor may be
        typing. Returning the visitor resets its idle time.
        """
        chat = visitor.chat
        line = f"{status} {chat.notice}" if chat.notice else status
        return visitor, gr.skip(), gr.skip(), as_plain_text(chat.transcript), gr.skip(), line

    def _unchanged(self):
        return (gr.skip(),) * 6

    def _waiting_images(self, visitor: Visitor):
        """The visitor, the gallery of waiting images, and the button that removes them."""
        files = [image.thumbnail for image in visitor.chat.waiting]
        return visitor, gr.update(value=files, visible=bool(files)), gr.update(visible=bool(files))


def as_plain_text(transcript: list[dict]) -> list[dict]:
    """A transcript with its text escaped: Gradio renders HTML in messages even with `render_markdown=False`."""
    return [
        {**message, "content": html.escape(message["content"], quote=False)}
        if isinstance(message["content"], str)
        else message
        for message in transcript
    ]
