"""Middleware that lets only the routes of page and API through, and limits the size of requests and of all uploads.

Gradio's server has more routes than the page needs: one downloads any web address, one runs ffmpeg on videos, some
access the Hugging Face Hub. The gate answers them with 404. Gradio limits the size of each uploaded file, but neither
the number of files in a request nor the disk space of all uploads. It also reads the whole body of any other request
before it checks the login.
"""

import asyncio
import contextlib
import ipaddress
import json
import os
import re
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .limits import Limits


# The routes that a browser requests while it shows and uses the page
OPEN = re.compile(
    r"/|/(config|login|logout|theme\.css|favicon\.ico|robots\.txt|manifest\.json|pwa_icon)/?"
    r"|/(assets|static|svelte|pwa_icon)/.*"
    r"|/gradio_api/(run/predict|queue/join|queue/data|cancel|reset|upload|upload_progress)/?"
    r"|/gradio_api/(startup-events|login_check|user|app_id|theme\.css)/?"
    r"|/gradio_api/heartbeat/[^/]+|/gradio_api/file=(?!.*://).*"
)
API = re.compile(r"/v1/.*|/health")
API_BODIES = 8  # of the largest size that may be in memory at one time
# Whatever an answer of the model holds, the page loads nothing from other servers and sends nothing there
POLICY = (
    b"img-src 'self' data: blob:; media-src 'self' data: blob:; connect-src 'self' data: blob:; "
    b"font-src 'self' data:; object-src 'none'; form-action 'self'; base-uri 'self'"
)
ENVELOPE = 65_536  # bytes of a request in addition to its file or its question
CHARACTER = 12  # largest size in bytes of one character in JSON
ENTRY = 8_192  # smallest size in bytes of a file or a directory on the disk
STALL_SECONDS = 20.0  # between two parts of a body
BODY_SECONDS = 30.0  # for a whole body, in addition to its length at `BYTES_A_SECOND`
BYTES_A_SECOND = 32_768  # of a slow telephone
COUNT_HOLDS = 1.0  # seconds between two measurements of the upload directory
REST = 3_600  # seconds without change after which empty directories and files of aborted uploads are deleted


class Gate:
    """
    ASGI middleware in front of Gradio's routes.

    Args:
        app (`ASGI application`): Gradio's application, which answers the allowed requests.
        folder (`Path`): The upload directory.
        upload_megabytes (`float`): Limit of one upload request.
        folder_megabytes (`float`): Limit of the upload directory, running uploads included.
        host_names (`Collection[str]`): Names under which the page may be opened, besides `localhost` and addresses in
            numbers. Another name in a request's Host header is that of a foreign site which resolves to this server
            (DNS rebinding).
        question_characters (`int`): Limit of one question, the largest content of any other request.
        api_megabytes (`float`): Limit of one request of an API client; 0 closes the API's routes.
        page (`bool`): Whether the page's routes answer.
    """

    def __init__(
        self,
        app: Any,
        folder: Path | None = None,
        upload_megabytes: float = Limits.upload_megabytes,
        folder_megabytes: float = Limits.all_uploads_megabytes,
        host_names: Collection[str] = (),
        question_characters: int = Limits.question_characters,
        api_megabytes: float = 0,
        page: bool = True,
    ):
        self.app, self.folder = app, folder
        self.host_names = {name.lower() for name in host_names}
        self.upload_megabytes, self.folder_megabytes = upload_megabytes, folder_megabytes
        self.other_bytes = question_characters * CHARACTER + ENVELOPE
        self.api_bytes, self.page = int(api_megabytes * 1e6), page
        self.api_arriving: Counter[str | None] = Counter()  # bytes of the API's running requests, by address
        self.counting = asyncio.Lock()
        self.counted_at = float("-inf")
        self.counted = 0  # bytes in the directory at the last measurement, and those accepted since
        self.arriving: Counter[str | None] = Counter()  # bytes of running uploads, by the client's address

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
        upload = self.page and path.startswith("/gradio_api/upload") and scope["method"] == "POST"
        length = length_of(scope)
        status, problem = self.check_source(path, scope)
        if not problem:
            status, problem = self.check(path, upload, length)
        address = (scope.get("client") or [None])[0]
        if upload and not problem and not await self.has_room(length or 0, address):
            status, problem = 503, "There is no room for uploads at the moment. Try again later."
        api = self.is_api(path)
        if api and not problem and not self.has_memory(length or 0, address):
            status, problem = 503, "Too many large requests are being answered. Try again later."
        if problem:
            await refuse(send, status, problem, as_json=api)
            return
        body = Body(receive, send, length or 0)
        try:
            await self.app(scope, body.receive, body.send)
        except Exception:
            if not body.stalled:
                raise
        finally:
            if upload:
                self.arriving[address] -= length or 0
                self.arriving = +self.arriving
            if api:
                self.api_arriving[address] -= length or 0
                self.api_arriving = +self.api_arriving
        if body.stalled and not body.answered:
            await refuse(send, 408, "The request took too long to arrive.", as_json=api)

    def has_memory(self, length: int, address: str | None = None) -> bool:
        """
        Whether `length` more bytes fit beside the bodies of the API's running requests, and into the half of that
        memory which one address may take; if so, they are counted.
        """
        most = self.api_bytes * API_BODIES
        if self.api_arriving.total() + length > most or self.api_arriving[address] + length > most / 2:
            return False
        self.api_arriving[address] += length
        return True

    def is_api(self, path: str) -> bool:
        """Whether a path is one of the API, and the API is on."""
        return self.api_bytes > 0 and API.fullmatch(path) is not None

    def check_source(self, path: str, scope: dict[str, Any]) -> tuple[int, str]:
        """
        Check that a request is for this page by name, and does not come from the page of another site. Returns status
        and error message; the message of an allowed one is empty.
        """
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        if not self.is_own(host_name(f"//{host}")):
            return (
                421,
                "This page is not served under that name. The operator can allow it by JNANA_HOST_NAMES.",
            )
        origin = headers.get(b"origin")
        changes = scope["method"] not in ("GET", "HEAD") or path.rstrip("/") == "/logout"
        foreign = headers.get(b"sec-fetch-site") == "cross-site"
        if origin is not None:
            name = host_name(origin)
            # Behind a proxy the Host header may be this server's address, and the origin the page's public name. Other
            # servers of this machine share the name `localhost`, so that name does not do.
            foreign = origin.partition("://")[2] != host and name not in self.host_names
        return (403, "Requests from other sites are not answered.") if changes and foreign else (200, "")

    def is_own(self, name: str | None) -> bool:
        """Whether a host name is one of this page. An address in numbers can't be pointed at another server."""
        if not name:
            return False
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(name)
            return True
        return name == "localhost" or name in self.host_names

    def check(self, path: str, upload: bool, length: int | None) -> tuple[int, str]:
        """Check the header of a request. Returns status and error message; the message of an allowed one is empty."""
        api = self.is_api(path)
        if not (api or (self.page and OPEN.fullmatch(path))):
            return 404, "Not found."
        if length is None:
            return 411, "A request must state its length."
        if api:
            if length > self.api_bytes:
                return 413, f"The request has {length:,} bytes; at most {self.api_bytes:,} are allowed."
            return 200, ""
        if upload and length > self.upload_megabytes * 1e6 + ENVELOPE:
            return 413, f"The request exceeds the maximum allowed size of {self.upload_megabytes:g} MB."
        if not upload and length > self.other_bytes:
            return 413, f"The request exceeds the maximum allowed size of {self.other_bytes} bytes."
        return 200, ""

    async def has_room(self, length: int, address: str | None = None) -> bool:
        """
        Whether `length` more bytes fit into the upload directory, and into the half of it that the running uploads of
        one address may take; if so, they are counted as arriving.
        """
        share = max(self.folder_megabytes / 2, self.upload_megabytes) * 1e6
        if address is not None and self.arriving[address] + length > share:
            return False
        async with self.counting:  # one measurement at a time, in a thread, because it takes long with many files
            if time.monotonic() - self.counted_at > COUNT_HOLDS:
                assert self.folder is not None
                arriving = self.arriving.total()  # partly on the disk already; counted twice rather than missed
                self.counted = arriving + await asyncio.to_thread(tidy_size_of, self.folder)
                self.counted_at = time.monotonic()
            if self.counted + length > self.folder_megabytes * 1e6:
                return False
            self.counted += length
            self.arriving[address] += length
            return True


class Body:
    """
    A request whose body must arrive in time; of one that does not, the application sees a client that has left.

    Args:
        receive, send (`Callable`): Those of the request.
        length (`int`): Of the body, in bytes.

    Attributes:
        stalled (`bool`): Whether the body did not arrive in time.
        answered (`bool`): Whether the application has begun to answer.
    """

    def __init__(self, receive: Any, send: Any, length: int):
        self._receive, self._send = receive, send
        self._left = length
        self._deadline = time.monotonic() + BODY_SECONDS + length / BYTES_A_SECOND
        self.stalled = self.answered = False

    async def receive(self) -> dict[str, Any]:
        if self._left <= 0:
            return await self._receive()
        try:
            seconds = min(STALL_SECONDS, self._deadline - time.monotonic())
            message = await asyncio.wait_for(self._receive(), max(seconds, 0))
        except TimeoutError:
            self.stalled = True
            return {"type": "http.disconnect"}
        self._left -= len(message.get("body", b""))
        return message

    async def send(self, message: dict[str, Any]) -> None:
        if self.stalled and not self.answered:
            return  # the application's answer to a client that has left; the gate answers
        self.answered = True
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (b"content-security-policy", POLICY)]}
        await self._send(message)


def error_object(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def refuse(send: Any, status: int, problem: str, as_json: bool) -> None:
    """Answer a request with an error, as text or for API clients, and close the connection."""
    body = json.dumps(error_object(status, problem)) if as_json else problem
    kind = b"application/json" if as_json else b"text/plain; charset=utf-8"
    headers = [(b"content-type", kind), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body.encode()})


def host_name(address: str) -> str | None:
    """The host name of an address (`http://name:port`, `//name:port`) in lower case; `None` if it has none."""
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def length_of(scope: dict[str, Any]) -> int | None:
    """Length of a request's body in bytes, from its header; `None` if the header states no definite length."""
    headers = dict(scope["headers"])
    if b"transfer-encoding" in headers:  # takes precedence over a content length
        return None
    length = headers.get(b"content-length", b"0" if scope["method"] in ("GET", "HEAD") else b"")
    return int(length) if length.isdigit() else None


def tidy_size_of(folder: Path) -> int:
    """
    Bytes that the files and directories of a directory take on the disk (`int`). Entries deleted meanwhile count 0.

    Gradio deletes old files, but not their directories, nor the files of aborted uploads, which lie at the top level.
    This function deletes both after `REST` seconds without change.
    """
    total, rested = 0, time.time() - REST
    for where, folders, names in os.walk(folder):
        at_top_level = where == str(folder)
        try:
            if not (at_top_level or folders or names) and os.stat(where).st_mtime < rested:
                os.rmdir(where)
                continue
        except OSError:
            pass
        total += ENTRY
        for name in names:
            file = os.path.join(where, name)
            try:
                known = os.stat(file)
                if at_top_level and known.st_mtime < rested:
                    os.remove(file)
                else:
                    total += max(known.st_size, ENTRY)
            except OSError:
                continue
    return total
