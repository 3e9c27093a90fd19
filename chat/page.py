"""The event handlers of the chat page. Each returns the new values of the page's components.

Every error becomes one line on the page: the words of `Refused` and `ContextFullError`, else a general message, with
the details in the log only. A question is queued when it is sent; until the model is free it can be withdrawn.
"""

import functools
import inspect
import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from .assistant import Assistant, is_out_of_memory
from .chats import Chat, Question
from .limits import Refused, check_question, check_sampling
from .session import ContextFullError


logger = logging.getLogger(__name__)

GENERAL_ERROR = "Something went wrong on the server, and was logged. Try again, or clear the chat."
STILL_ANSWERING = "Your last question is still being answered. Wait for the answer, or stop it."
NOTHING_ASKED = "Type or say a question, or give a picture."
NOTHING_YET = "Nothing has been asked yet."
FULL = "Too many questions are waiting for the model. Send yours again in a moment."
NO_MEMORY = "There was too little memory for that. Some has been freed: send it again."
CHAT_LOST = (
    "This chat was closed after a long time without a question, or because many others have come. Its pictures are "
    "gone: send them again with the question."
)
SOUND = re.compile(r"\.(aac|amr|flac|m4a|mp3|mp4|oga|ogg|opus|wav|weba|webm|wma)$", re.IGNORECASE)
SPEECH_STARTS = "the speech recogniser is starting; its first start takes minutes, later ones seconds ..."
LATE = 5.0  # seconds after which a page is shown that was reloaded in the middle of an answer
PLACE = 0.5  # seconds between two looks at the place in the line
UNCHANGED = (gr.skip(), gr.skip())  # status line and messages
BREAK = "\u2060"  # an invisible character, after which `<` begins no HTML and `!` no image


def line_for_visitor(handler: Callable, error: Exception) -> str:
    """One line about an exception of a handler, without details, which are logged."""
    if isinstance(error, (Refused, ContextFullError)):
        text = str(error)
        return text[0].upper() + text[1:]
    logger.error("%s failed", handler.__name__, exc_info=error)
    return GENERAL_ERROR


def safe_markdown(text: str) -> str:
    """
    Markdown in which HTML is text and images of other addresses are links, whatever the model or a visitor wrote. Code
    stays as it is, because Markdown shows it as text.
    """
    parts = re.split(r"(^```.*?(?:^```|\Z)|(?<![\\`])`(?!`)[^`\n]+`(?!`))", text, flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [re.sub(r"<(?=[A-Za-z/!?])|!(?=\[)", rf"\g<0>{BREAK}", part) for part in parts[::2]]
    return "".join(parts)


class Page:
    """
    The handlers of the page. Each takes the visitor's chat first.

    Args:
        assistant (`Assistant`): The model that answers.
        examples (`list[tuple[str, str]]`): Image files and questions to click.
    """

    def __init__(self, assistant: Assistant, examples: list[tuple[str, str]]):
        self.assistant, self.examples = assistant, examples

    def guarded(self, handler: Callable, otherwise: Callable[[Chat], Any]) -> Callable:
        """
        The function for Gradio: it finds the chat of the key that the page sends, and every exception becomes one line
        on the page, with the outputs of `otherwise`.
        """

        def find(key: str) -> tuple[Chat, bool]:
            chat, lost = self.assistant.chats.find(key)
            if otherwise == self.view and handler not in (self.show, self.open) or lost:
                chat.notice = CHAT_LOST if lost else ""
            return chat, lost

        @functools.wraps(handler)
        def once(key: str, *args: Any) -> Any:
            chat, lost = find(key)
            try:
                return otherwise(chat) if lost else handler(chat, *args)
            except Exception as error:
                chat.notice = line_for_visitor(handler, error)
                return otherwise(chat)

        @functools.wraps(handler)
        def stream(key: str, *args: Any) -> Iterator[Any]:
            yield from handler(find(key)[0], *args)

        return stream if inspect.isgeneratorfunction(handler) else once

    def receive(self, chat: Chat, value: dict) -> str:
        """Decode the images in the composer while the visitor types; drop those that can't be used, in words."""
        pictures, taken = [file for file in value["files"] if not SOUND.search(file)], []
        for file in pictures:
            try:
                self.assistant.receive(chat, [*taken, file])
                taken.append(file)
                chat.refused.discard(file)
            except Refused as error:
                chat.refused.add(file)
                chat.notice = line_for_visitor(self.receive, error)
        with chat.reading:  # forget those that were taken out of the composer
            chat.received = {file: image for file, image in chat.received.items() if file in pictures}
            chat.refused &= set(value["files"])
        return self.line(chat)

    def listen(self, chat: Chat, value: dict) -> Iterator[str]:
        """Transcribe the recordings in the composer."""
        for file in filter(SOUND.search, value["files"]):
            if file in chat.heard:
                continue
            starting = self.assistant.transcriber and not self.assistant.transcriber.ready
            yield SPEECH_STARTS if starting else "transcribing the recording ..."
            try:
                chat.heard[file] = self.assistant.listen(file)
                chat.refused.discard(file)
            except Exception as error:
                chat.refused.add(file)
                chat.notice = line_for_visitor(self.listen, error)
        yield self.line(chat)

    def tidy(self, chat: Chat, value: dict) -> Any:
        """The composer without refused files, and with transcripts in its text, where they can be corrected."""
        files = value["files"]
        said = " ".join(chat.heard[file] for file in files if file in chat.heard)
        kept = [file for file in files if file not in chat.heard and file not in chat.refused]
        if kept == files:
            return gr.skip()
        return {"text": f"{value['text']} {said}".strip(), "files": kept}

    def take(self, chat: Chat, value: dict):
        """Queue the question in the composer."""
        files, text = value["files"], check_question(value["text"], self.assistant.limits)
        if any(map(SOUND.search, files)):
            raise Refused("Your recording is still being transcribed. Send again in a moment.")
        if not text and not files:
            raise Refused(NOTHING_ASKED)
        images = self.assistant.receive(chat, files)
        return self._queue(chat, Question(text, images, files, len(chat.answered)), {"text": "", "files": []})

    def choose(self, chat: Chat, event: gr.SelectData):
        """Queue an example."""
        if event.index not in range(len(self.examples)):
            raise Refused("There is no such example.")
        path, text = self.examples[event.index]
        image = self.assistant.read(path)
        return self._queue(chat, Question(text, [image], [image.thumbnail], len(chat.answered)))

    def retry(self, chat: Chat):
        """Queue the last question again."""
        if not chat.answered:
            raise Refused(NOTHING_YET)
        last = chat.answered[-1]
        return self._queue(chat, Question(last.text, last.images, last.files, len(chat.answered) - 1, returns=False))

    def edit(self, chat: Chat, event: gr.EditData):
        """Queue a question of the chat with another text; its answer replaces all that follows."""
        owners = [number for number, question in enumerate(chat.shown) for _ in messages_of(question)]
        if chat.pending or event.index not in range(len(owners)):
            raise Refused(STILL_ANSWERING if chat.pending else "There is no such question.")
        old = chat.answered[owners[event.index]]
        text = check_question(str(event.value).replace(BREAK, ""), self.assistant.limits)
        return self._queue(chat, Question(text, old.images, old.files, owners[event.index], returns=False))

    def undo(self, chat: Chat):
        """Take the last question back into the composer, its answer out of the chat; of an empty chat undo Clear."""
        with chat.lock:
            if chat.pending or not (chat.answered or chat.cleared):
                raise Refused(STILL_ANSWERING if chat.pending else NOTHING_YET)
            if chat.answered:
                *chat.answered, chat.withdrawn = chat.answered
            else:
                chat.answered, chat.cleared = chat.cleared, []
            chat.status = ""
        return self.show(chat)

    def stop(self, chat: Chat):
        """Stop the answer, or withdraw the queued question into the composer."""
        with chat.lock:
            if chat.pending and chat.pending.writing:
                chat.session.stop()
            elif chat.pending:
                chat.withdraw(chat.pending)
        return self.show(chat)

    def clear(self, chat: Chat):
        return self.view(self.assistant.chats.clear(chat))

    def open(self, chat: Chat):
        """A page that was opened or reloaded: an answer being written is stopped, a waiting question returns."""
        late = time.monotonic() + LATE
        while (question := chat.pending) and time.monotonic() < late:
            chat.session.stop() if question.writing else chat.withdraw(question)
            time.sleep(0.1)
        return self.show(chat)

    def show(self, chat: Chat):
        """The page as it is, after an answer too, whose last lines may have crossed a click."""
        back = chat.take_back()
        return self.view(chat, back and {"text": back.text, "files": [f for f in back.files if Path(f).is_file()]})

    def answer(self, chat: Chat, system: str, temperature: float, top_p: float, new_tokens: int):
        """Wait for the model with the queued question, and stream the answer."""
        if (question := chat.claim()) is None:  # the question was refused or withdrawn, or the chat was cleared
            yield UNCHANGED
            return
        turn, shown = self.assistant.turn, 0
        ticket = turn.join()
        try:
            options = check_sampling(temperature, top_p, new_tokens, self.assistant.limits)
            system = check_question(str(system or ""), self.assistant.limits)
            while (place := turn.wait(ticket, PLACE)) and chat.pending is question:
                if place != shown:
                    yield self._progress(chat, f"waiting for the model: {place} before you ...")
                shown = place
            yield from self._write(chat, question, system, options)
        except Exception as error:
            if is_out_of_memory(error):
                logger.error("out of memory; a smaller --kept_chats keeps fewer caches", exc_info=error)
                self.assistant.make_room()
                error = Refused(NO_MEMORY)
            chat.notice = line_for_visitor(self.answer, error)
        finally:  # also when the page was closed
            turn.leave(ticket)
            chat.withdraw(question)
        yield self._progress(chat, chat.status)

    def _write(self, chat: Chat, question: Question, system: str, options: dict[str, Any]):
        session = chat.session
        with chat.lock:  # which Stop takes too
            if chat.pending is not question:
                return
            messages, images = chat.conversation(question, system)
            self.assistant.check_system(messages, images)
            answer = session.answer(messages, images, **options)
            question.writing, session.last_turn = True, None
        try:
            yield self._progress(chat, "reading ...")
            while not chat.closed and (text := next(answer, None)) is not None:
                question.answer = text
                yield self._progress(chat, "writing ...")
        finally:
            answer.close()  # type: ignore[attr-defined]  # stops the answer when the page is closed
            self.assistant.keep_recent(chat)
            chat.record(question)

    def _queue(self, chat: Chat, question: Question, composer: dict | None = None):
        with chat.lock:
            if chat.pending:
                raise Refused(STILL_ANSWERING)
            if len(self.assistant.turn) > self.assistant.limits.queue_length:
                raise Refused(FULL)
            chat.pending, chat.cleared, chat.received, chat.heard, chat.refused = question, [], {}, {}, set()
            chat.status = "waiting for the model ..."
        return self.view(chat, composer)

    def view(self, chat: Chat, composer: dict | None = None):
        """The key, the messages, the composer and the status line."""
        busy, value = chat.pending is not None, {} if composer is None else {"value": composer}
        messages = [m for one in chat.shown for m in messages_of(one, chat.status if one is chat.pending else "")]
        update = gr.update(submit_btn=not busy, stop_btn=busy, **value)
        return self.assistant.chats.key(chat), messages, update, self.line(chat)

    def line(self, chat: Chat) -> str:
        return f"{chat.status} {chat.notice}".strip() if chat.pending else chat.notice or chat.status

    def _progress(self, chat: Chat, status: str):
        """The values that change while an answer is written; the composer stays, because the visitor may be typing."""
        if chat.closed:
            return UNCHANGED
        chat.status = status
        chat.touch()
        return self.line(chat), self.view(chat)[1]


def messages_of(question: Question, status: str = "") -> list[dict]:
    """A question and its answer as the page shows them; the status of a pending one takes the answer's place."""
    images = [{"path": image.thumbnail, "alt_text": "picture"} for image in question.images]
    texts = [{"type": "text", "text": safe_markdown(question.text)}] if question.text else []
    answer = safe_markdown(question.answer or "") or (f"*{status}*" if status else "(no answer)")
    messages = [{"role": "user", "content": content} for content in (*images, *texts)]
    return [*messages, {"role": "assistant", "content": {"type": "text", "text": answer}}]
