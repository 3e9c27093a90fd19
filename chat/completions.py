"""Answers the requests of API clients one at a time, in the order of their arrival, beside those of the page.

Transformers' continuous batching takes token ids alone (5.24 has no inputs for images), so requests are not batched.
Instead the sessions of the latest requests keep their keys and values, and a request continues the session that begins
as it does: a client's next turn, or another question about the same image.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Iterator
from typing import Any

from .api_request import ApiError, CompletionRequest
from .assistant import Assistant, is_out_of_memory
from .chats import Chat
from .session import Turn


logger = logging.getLogger(__name__)
FULL = "Too many requests are waiting for the model. Try again later."
GENERAL = "Something went wrong on the server, and was logged."
MEMORY = "There was too little memory for that request. Some has been freed: send it again."
REASONS = {"end": "stop", "stopped": "stop", "length": "length", "context": "length"}


class Job:
    """
    A request on its way through the worker.

    Args:
        request (`CompletionRequest`): What to answer.

    Attributes:
        events (`asyncio.Queue`): Pieces of the answer (`str`), then its counts (`Turn`) or an `ApiError`.
        cancelled (`threading.Event`): Set when nobody waits for the answer any more.
    """

    def __init__(self, request: CompletionRequest):
        self.request = request
        self.events: asyncio.Queue[str | Turn | ApiError] = asyncio.Queue()
        self.cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()

    def send(self, event: str | Turn | ApiError) -> None:
        """Called by the worker's thread."""
        try:
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the server has ended
            self.cancelled.set()


class Worker:
    """
    The thread that answers.

    Args:
        assistant (`Assistant`): The model that answers, shared with the page.
    """

    def __init__(self, assistant: Assistant):
        self.assistant = assistant
        self._jobs: queue.Queue[Job] = queue.Queue(assistant.limits.queue_length)
        self._chats: list[Chat] = []  # the one used longest ago first
        threading.Thread(target=self._run, name="completions", daemon=True).start()

    def submit(self, job: Job) -> None:
        """
        Queue a request.

        Raises:
            ApiError: if `queue_length` requests wait already.
        """
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise ApiError(FULL, status=429, code="rate_limit_exceeded") from None

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                with self.assistant.turn:
                    if not job.cancelled.is_set():
                        job.send(self._answer(job))
            except ApiError as error:
                job.send(error)
            except Exception as error:
                job.send(self._explain(error))

    def _explain(self, error: Exception) -> ApiError:
        logger.error("a completion failed", exc_info=error)
        if is_out_of_memory(error):
            self.assistant.make_room()
            return ApiError(MEMORY, status=503)
        return ApiError(GENERAL, status=500)

    def _answer(self, job: Job) -> Turn:
        request, chat = job.request, self._choose(job.request)
        answer = chat.session.answer(request.messages, request.images, **request.options)
        written = Written(request.stops)
        try:
            for text in answer:
                if piece := written.add(text):
                    job.send(piece)
                if written.stopped or job.cancelled.is_set():
                    break
        finally:
            answer.close()  # type: ignore[attr-defined]
            self.assistant.keep_recent(chat)
        turn = chat.session.last_turn
        assert turn is not None
        if piece := written.finish(chat.session.messages[-1]["content"][0]["text"]):
            job.send(piece)
        if written.stopped:
            turn.finish_reason = "stopped"
        return turn

    def _choose(self, request: CompletionRequest) -> Chat:
        """
        The chat to continue: the one with the longest common beginning, if that holds an image or is at least half of
        the request or of the chat. Else a new one, which takes the place of the one used longest ago if there are
        `kept_chats`.
        """
        chats, chosen, longest = self._chats, None, 0
        for chat in chats:
            common = chat.session.count_cached(request.ids, request.images)
            worth = self.assistant.processor.image_token_id in request.ids[:common]
            worth = worth or 2 * common >= min(len(request.ids), chat.session.cached_tokens)
            if worth and common > longest:
                chosen, longest = chat, common
        if chosen is None and len(chats) >= self.assistant.limits.kept_chats:
            chosen = chats[0]
        if chosen is None:
            chosen = Chat(self.assistant.new_session())
        else:
            chats.remove(chosen)
        chats.append(chosen)
        return chosen


class Written:
    """
    The pieces of an answer, up to the first of its stop texts.

    Args:
        stops (`list[str]`): The stop texts. A piece that may be the beginning of one is held back.
    """

    def __init__(self, stops: list[str]):
        self.stops = stops
        self.stopped = False
        self._sent = ""

    def add(self, text: str) -> str:
        """The next piece (`str`), given the whole answer so far."""
        text = self._cut(text)
        return self._piece(text if self.stopped else text[: len(text) - self._held_back(text)])

    def finish(self, text: str) -> str:
        """The last piece (`str`), given the whole answer."""
        return self._piece(self._cut(text))

    def _cut(self, text: str) -> str:
        ends = [end for stop in self.stops if (end := text.find(stop)) >= 0]
        self.stopped = self.stopped or bool(ends)
        return text[: min(ends)] if ends else text

    def _held_back(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop text."""
        lengths: Iterator[int] = (
            size for stop in self.stops for size in range(1, len(stop)) if text.endswith(stop[:size])
        )
        return max(lengths, default=0)

    def _piece(self, text: str) -> str:
        piece = text[len(self._sent) :] if text.startswith(self._sent) else ""
        self._sent += piece
        return piece


def usage_of(turn: Turn) -> dict[str, Any]:
    """Token counts as OpenAI's clients read them."""
    return {
        "prompt_tokens": turn.prompt_tokens,
        "completion_tokens": turn.new_tokens,
        "total_tokens": turn.prompt_tokens + turn.new_tokens,
        "prompt_tokens_details": {"cached_tokens": turn.cached_tokens},
    }
