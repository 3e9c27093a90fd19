"""A request of OpenAI's chat completions API: each parameter is honoured, or refused by its name.

A parameter that this server can't honour is accepted where its value changes nothing: `n: 1`, zero penalties, `user`.
Images come as base64 in `data:` addresses; no address is fetched and no file of the server is read.
"""

import base64
import binascii
import hashlib
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from .assistant import Assistant
from .limits import Refused, decode_image
from .session import ChatSession, PreparedImage


DEFAULT_TEMPERATURE = 1.0  # that of the schema
VALUES = 250_000  # in the JSON of a request: each takes up to some hundred bytes once it is parsed
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)  # matches at each quote, so in linear time
CHARACTERS = 1_000_000  # of all messages; more is refused before it is tokenised
MESSAGES = 10_000
STOPS = 4
DATA_ADDRESS = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)
ANYTHING = object()
# Parameters without effect here, and their values that ask for none; `null` is one of each.
NEUTRAL: dict[str, Any] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ANYTHING,
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_cache_key": ANYTHING,
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "safety_identifier": ANYTHING,
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "user": ANYTHING,
    "verbosity": ("medium",),
    "web_search_options": (),
}
HONOURED = (
    *("max_completion_tokens", "max_tokens", "messages", "model", "seed", "stop"),
    *("stream", "stream_options", "temperature", "top_p"),
)


class ApiError(Exception):
    """
    A request that is not answered.

    Args:
        message (`str`): Why, for the client.
        param (`str`, *optional*): The parameter at fault.
        status (`int`, *optional*, defaults to 400): HTTP status.
        code (`str`, *optional*): OpenAI's code of the error.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


@dataclass
class CompletionRequest:
    """
    Args:
        messages (`list[dict]`): The chat, as chat templates take it.
        images (`list[PreparedImage]`): Its images, in reading order.
        stream (`bool`): Whether the answer is sent while it is written.
        usage (`bool`): Whether a streamed answer ends with its token counts.
        stops (`list[str]`): The answer ends before the first of these.
        options (`dict`): Those of [`ChatSession.answer`].
        ids (`list[int]`): The tokens of the chat.
    """

    messages: list[dict] = field(default_factory=list)
    images: list[PreparedImage] = field(default_factory=list)
    stream: bool = False
    usage: bool = False
    stops: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    ids: list[int] = field(default_factory=list)


class RequestReader:
    """
    Reads requests for one model.

    Args:
        assistant (`Assistant`): The model, and the limits of requests.
    """

    def __init__(self, assistant: Assistant):
        self.assistant = assistant
        self._session = ChatSession(assistant.model, assistant.processor)  # for its preprocessing; it never answers
        self._prepared: OrderedDict[str, PreparedImage] = OrderedDict()  # clients send all images again in each turn
        self._lock = threading.Lock()

    def read(self, body: Any) -> CompletionRequest:
        """
        Check a request and prepare its images.

        Args:
            body (`Any`): The request's JSON.

        Raises:
            ApiError: if it can't be honoured.
            ContextFullError: if the chat is longer than the model's context.
        """
        if not isinstance(body, dict):
            raise ApiError("The request must be a JSON object.")
        given = {name: value for name, value in body.items() if value is not None}
        check_neutral(given)
        if not isinstance(given.get("model"), str):
            raise ApiError("model must be the name of the model, as GET /v1/models lists it.", "model")
        if given["model"] != self.assistant.name:
            message = f"The model {given['model'][:200]!r} is not served here, only {self.assistant.name!r}."
            raise ApiError(message, "model", 404, "model_not_found")
        request = CompletionRequest(
            stream=read_bool(given, "stream"), stops=read_stops(given), options=self._options(given)
        )
        request.usage = read_stream_options(given, request.stream)
        self._read_messages(given.get("messages"), request)
        request.ids = self._encode(request)
        return request

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        longest = self.assistant.limits.new_tokens
        lengths = [(name, read_int(given, name, 1, None)) for name in ("max_completion_tokens", "max_tokens")]
        chosen = {length for _, length in lengths if length is not None}
        if len(chosen) > 1:
            raise ApiError("max_tokens and max_completion_tokens differ; give one of them.", "max_tokens")
        for name, length in lengths:
            if length is not None and length > longest:
                raise ApiError(f"{name} is {length}; this server writes at most {longest} tokens.", name)
        temperature = read_number(given, "temperature", 0, 2, DEFAULT_TEMPERATURE)
        top_p = read_number(given, "top_p", 0, 1, 1.0)
        if top_p == 0:  # only the likeliest token is left
            temperature, top_p = 0.0, 1.0
        return {
            "max_new_tokens": chosen.pop() if chosen else longest,
            "temperature": temperature,
            "top_p": top_p,
            "seed": read_int(given, "seed", -(2**63), 2**63 - 1),
        }

    def _encode(self, request: CompletionRequest) -> list[int]:
        from jinja2 import TemplateError

        try:
            return self._session.encode(request.messages, request.images)
        except TemplateError as error:  # such as roles that do not alternate
            raise ApiError(f"The model's chat template refuses these messages: {error}", "messages") from None

    # ------------------------------------------------------------------ messages

    def _read_messages(self, messages: Any, request: CompletionRequest) -> None:
        if not isinstance(messages, list) or not messages:
            raise ApiError("messages must be a list with at least one message.", "messages")
        if len(messages) > MESSAGES:
            raise ApiError(f"messages has {len(messages):,} messages; at most {MESSAGES:,} are allowed.", "messages")
        addresses: list[tuple[str, str]] = []
        for index, message in enumerate(messages):
            request.messages.append(self._read_message(message, f"messages[{index}]", addresses))
        if request.messages[-1]["role"] != "user":
            raise ApiError("The last message must be one of the user.", f"messages[{len(messages) - 1}].role")
        texts = [part["text"] for message in request.messages for part in message["content"] if "text" in part]
        if (characters := sum(map(len, texts))) > CHARACTERS:
            message = f"The messages have {characters:,} characters; at most {CHARACTERS:,} are allowed."
            raise ApiError(message, "messages", code="context_length_exceeded")
        if len(addresses) > self.assistant.limits.images:
            most = self.assistant.limits.images
            raise ApiError(f"The chat has {len(addresses)} images; at most {most} are allowed.", "messages")
        request.images = [self._prepare(address, param) for address, param in addresses]

    def _read_message(self, message: Any, param: str, addresses: list[tuple[str, str]]) -> dict:
        if not isinstance(message, dict):
            raise ApiError(f"{param} must be an object with role and content.", param)
        role = message.get("role")
        if role not in ("system", "developer", "user", "assistant"):
            raise ApiError(f"{param}.role is {short(role)}; it must be system, user or assistant.", f"{param}.role")
        for name in message:
            if name not in ("role", "content") and message[name] is not None:
                raise ApiError(f"{param}.{name} is not supported.", f"{param}.{name}")
        content, where = message.get("content"), f"{param}.content"
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list) or not content:
            raise ApiError(f"{where} must be a text or a list of parts.", where)
        parts = [self._read_part(part, f"{where}[{index}]", role, addresses) for index, part in enumerate(content)]
        if len(parts) == 1 and "text" in parts[0]:
            parts[0]["text"] = parts[0]["text"].strip()  # as the page does
        if role == "user" and not any(part["type"] == "image" or part["text"].strip() for part in parts):
            raise ApiError(f"{where} holds neither a text nor an image.", where)
        return {"role": "system" if role == "developer" else role, "content": parts}

    def _read_part(self, part: Any, param: str, role: str, addresses: list[tuple[str, str]]) -> dict:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            check_names(part, ("type", "text"), param)
            # lone surrogates, which UTF-8 cannot encode, become question marks
            return {"type": "text", "text": part["text"].encode("utf-8", "replace").decode()}
        if kind == "image_url" and isinstance(part.get("image_url"), dict):
            if role != "user":
                raise ApiError(f"{param} is an image; only messages of the user may hold one.", param)
            check_names(part, ("type", "image_url"), param)
            image = part["image_url"]
            if image.get("detail") not in (None, "auto"):
                where = f"{param}.image_url.detail"
                raise ApiError(f"{where} is {short(image['detail'])}; only auto is supported.", where)
            check_names(image, ("url", "detail"), f"{param}.image_url")
            addresses.append((image.get("url"), f"{param}.image_url.url"))
            return {"type": "image"}
        raise ApiError(f"{param} must be a text or an image_url part; other kinds are not supported.", param)

    def _prepare(self, address: Any, param: str) -> PreparedImage:
        """The image of a `data:` address. The latest ones are kept, by a digest of the file."""
        match = DATA_ADDRESS.match(address) if isinstance(address, str) else None
        if match is None:
            message = f"{param} must hold the image itself: data:image/png;base64,... Other addresses are not fetched."
            raise ApiError(message, param)
        try:
            data = base64.b64decode(address[match.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise ApiError(f"{param} is not valid base64.", param) from None
        limits, digest = self.assistant.limits, hashlib.sha256(data).hexdigest()
        with self._lock:
            if digest in self._prepared:
                self._prepared.move_to_end(digest)
                return self._prepared[digest]
        if len(data) > limits.upload_megabytes * 1e6:
            raise ApiError(f"{param} has more than the {limits.upload_megabytes:g} MB that are allowed.", param)
        try:
            prepared = self._session.prepare(decode_image(data, limits))
        except Refused as error:
            raise ApiError(f"{param}: {error}", param) from None
        with self._lock:
            self._prepared[digest] = prepared
            while len(self._prepared) > limits.kept_chats:
                self._prepared.popitem(last=False)
        return prepared


def check_size(body: bytes) -> None:
    """
    Bound the memory that parsing a request takes, before it is parsed: 22 MB of `[],[],[], ...` would take 500 MB.

    Raises:
        ApiError: if the JSON has more than `VALUES` values.
    """
    structure = STRING.sub(b"", body)
    values = sum(structure.count(mark) for mark in (b",", b":", b"[", b"{"))
    if values > VALUES:
        raise ApiError(f"The request has {values:,} values in its JSON; at most {VALUES:,} are allowed.")


def check_neutral(given: dict[str, Any]) -> None:
    """Refuse the first parameter that is neither honoured nor of a neutral value."""
    for name, value in given.items():
        if name in HONOURED:
            continue
        if name not in NEUTRAL:
            raise ApiError(
                f"{short(name)} is not a parameter of chat completions.", name[:100], code="unknown_parameter"
            )
        neutral = NEUTRAL[name]
        if neutral is ANYTHING or any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in neutral):
            continue
        allowed = " or ".join(short(v) for v in neutral)
        remedy = f"leave it out or give {allowed}" if allowed else "leave it out"
        raise ApiError(f"{name} is {short(value)}, which is not supported; {remedy}.", name, code="unsupported_value")


def check_names(part: dict, names: tuple[str, ...], param: str) -> None:
    for name, value in part.items():
        if name not in names and value is not None:
            raise ApiError(f"{param}.{name[:100]} is not supported.", f"{param}.{name[:100]}")


def read_number(given: dict[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ApiError(f"{name} is {short(value)}; it must be a number from {low} to {high}.", name)
    return float(value)


def read_int(given: dict[str, Any], name: str, low: int, high: int | None) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise ApiError(f"{name} is {short(value)}; it must be a whole number of at least {low}.", name)
    return value


def read_bool(given: dict[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise ApiError(f"{name} is {short(value)}; it must be true or false.", name)
    return value


def read_stops(given: dict[str, Any]) -> list[str]:
    value = given.get("stop", [])
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > STOPS or not all(isinstance(s, str) and s for s in stops):
        raise ApiError(f"stop must be a text, or a list of at most {STOPS} texts, none of them empty.", "stop")
    return stops


def read_stream_options(given: dict[str, Any], stream: bool) -> bool:
    """Whether the token counts are asked for."""
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or (options and not stream):
        raise ApiError("stream_options must be an object, and needs stream: true.", "stream_options")
    for name, value in options.items():
        if name != "include_usage" and not (name == "include_obfuscation" and value in (None, False)):
            raise ApiError(f"stream_options.{name[:100]} is not supported.", f"stream_options.{name[:100]}")
    return read_bool({"include_usage": options.get("include_usage") or False}, "include_usage")


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
