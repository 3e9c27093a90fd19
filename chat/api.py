"""OpenAI's chat completions API over the model of an [`Assistant`]: `/v1/models` and `/v1/chat/completions`.

The routes go into the server of `python -m jnana.chat.serve`, or into that of the page (`python app.py --api`), each
behind the [`Gate`]. docs/serving.md shows requests and lists the parameters.
"""

import asyncio
import functools
import hmac
import json
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from .api_request import ApiError, CompletionRequest, RequestReader, check_size
from .assistant import Assistant
from .completions import GENERAL, REASONS, Job, Worker, usage_of
from .gate import error_object
from .session import ContextFullError, Turn


logger = logging.getLogger(__name__)
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
READERS = 4  # requests that are parsed and whose images are decoded at one time; others wait
LOOK_UP = 0.5  # seconds between two looks whether the client is still there


def find_api_key(given: str | None) -> str | None:
    return given or os.environ.get("JNANA_API_KEY") or None


class Api:
    """
    The routes of the API.

    Args:
        assistant (`Assistant`): The model that answers.
        key (`str`, *optional*): Key that clients must send.

    Attributes:
        routes (`list`): For a FastAPI application.
        body_megabytes (`float`): Limit of one request: all its images together are at most `upload_megabytes`.
    """

    def __init__(self, assistant: Assistant, key: str | None = None):
        self.assistant, self.key = assistant, key
        self.reader, self.worker = RequestReader(assistant), Worker(assistant)
        self.started = int(time.time())
        self.reading = asyncio.Semaphore(READERS)
        self.body_megabytes = assistant.limits.upload_megabytes * 4 / 3 + 1  # base64, and the texts
        router = APIRouter()
        for path, method, handler in (
            ("/v1/models", "GET", self.list_models),
            ("/v1/models/{name:path}", "GET", self.show_model),
            ("/v1/chat/completions", "POST", self.complete),
        ):
            router.add_api_route(path, self._answered(handler), methods=[method], response_model=None)
        router.add_api_route("/health", self.health, methods=["GET"])
        router.add_api_route("/v1/{path:path}", self._answered(self.not_found), methods=METHODS, response_model=None)
        self.routes = router.routes

    def _answered(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Check the key, and turn every exception of a handler into an error object."""

        async def answered(request: Request) -> Response:
            try:
                self._check_key(request)
                return await handler(request)
            except ApiError as error:
                return refusal(error)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:
                logger.error("%s failed", handler.__name__, exc_info=error)
                return refusal(ApiError(GENERAL, status=500))

        return answered

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if self.key is not None and not hmac.compare_digest(given, self.key.encode()):
            raise ApiError("The API key is missing or wrong.", status=401, code="invalid_api_key")

    # ------------------------------------------------------------------ routes

    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    async def not_found(self, request: Request) -> Response:
        raise ApiError(f"There is no {request.method} {request.url.path[:200]} here.", status=404, code="unknown_url")

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def show_model(self, request: Request) -> Response:
        if request.path_params["name"] != self.assistant.name:
            message = f"Only {self.assistant.name!r} is served here."
            raise ApiError(message, "model", 404, "model_not_found")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self.assistant.name, "object": "model", "created": self.started, "owned_by": "jnana"}

    async def complete(self, request: Request) -> Response:
        body = await request.body()
        async with self.reading:
            job = Job(await asyncio.to_thread(self._read, body))
        self.worker.submit(job)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.assistant.name}
        if job.request.stream:
            return StreamingResponse(stream(job, head), media_type="text/event-stream")
        return JSONResponse(await collect(job, head, request))

    def _read(self, body: bytes) -> CompletionRequest:
        check_size(body)
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            raise ApiError("The request is not valid JSON.") from None
        try:
            return self.reader.read(content)
        except ContextFullError as error:
            text = str(error).partition(". Clear")[0]
            raise ApiError(f"{text[0].upper()}{text[1:]}.", "messages", code="context_length_exceeded") from None


async def collect(job: Job, head: dict[str, Any], request: Request) -> dict[str, Any]:
    """The whole answer. It is not written further after the client has gone."""
    pieces: list[str] = []
    try:
        while True:
            try:
                event = await asyncio.wait_for(job.events.get(), LOOK_UP)
            except TimeoutError:
                if await request.is_disconnected():
                    raise ClientDisconnect from None
                continue
            if isinstance(event, ApiError):
                raise event
            if isinstance(event, Turn):
                break
            pieces.append(event)
    finally:
        job.cancelled.set()
    message = {"role": "assistant", "content": "".join(pieces), "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": REASONS[event.finish_reason]}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": usage_of(event)}


async def stream(job: Job, head: dict[str, Any]) -> AsyncIterator[str]:
    """The answer as server-sent events, one a token."""
    line = functools.partial(chunk, head, job.request.usage)
    try:
        yield line({"role": "assistant", "content": ""})
        while isinstance(event := await job.events.get(), str):
            yield line({"content": event})
        if isinstance(event, ApiError):
            yield sse(error_object(event.status, event.message, event.param, event.code))
        else:
            yield line({}, REASONS[event.finish_reason])
            if job.request.usage:
                yield sse({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage_of(event)})
        yield "data: [DONE]\n\n"
    finally:  # also when the client has gone
        job.cancelled.set()


def chunk(head: dict[str, Any], usage: bool, delta: dict[str, Any], finish_reason: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    empty = {"usage": None} if usage else {}
    return sse({**head, "object": "chat.completion.chunk", "choices": [choice], **empty})


def sse(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def refusal(error: ApiError) -> Response:
    return JSONResponse(error_object(error.status, error.message, error.param, error.code), error.status)
