"""What the page's server answers at all: the few routes the page uses, and uploads while there is room for them.

Gradio's server has more: one route streams whatever web address it is given, one hands videos to ffmpeg, some speak to
the Hugging Face Hub. Nothing here needs them, so they do not exist for visitors. Gradio bounds each uploaded file, but
neither how many come in one request nor how much lies on the disk; any other request it reads whole, however long, and
before it looks who sends it.
"""

import asyncio
import os
import re
import time
from pathlib import Path
from typing import Any

from .limits import Limits


# What a browser asks for while it shows and uses the page, and nothing else
OPEN = re.compile(
    r"/|/(config|login|logout|theme\.css|favicon\.ico|robots\.txt|manifest\.json|pwa_icon)/?"
    r"|/(assets|static|svelte|pwa_icon)/.*"
    r"|/gradio_api/(run/predict|queue/join|queue/data|cancel|reset|upload|upload_progress)/?"
    r"|/gradio_api/(startup-events|login_check|user|app_id|theme\.css)/?"
    r"|/gradio_api/heartbeat/[^/]+|/gradio_api/file=(?!.*://).*"
)
ENVELOPE = 65_536  # bytes of a request beside its file or its question
CHARACTER = 12  # bytes of one character at most, as JSON writes it
ENTRY = 8_192  # bytes that a file or a folder takes on the disk at least
COUNT_HOLDS = 1.0  # seconds; until then what is let in is added to the last count
REST = 3_600  # seconds after which what no upload needs any more goes


class Gate:
    """
    ASGI middleware in front of Gradio's routes.

    Args:
        app (`ASGI application`): What answers where the gate is open.
        folder (`Path`): Where uploads lie.
        upload_megabytes (`float`): Of one upload request.
        folder_megabytes (`float`): Of all that lies in the folder or is on its way; beyond that nothing is taken in.
        question_characters (`int`): Of one question, the longest that any other request carries.
    """

    def __init__(
        self,
        app: Any,
        folder: Path,
        upload_megabytes: float,
        folder_megabytes: float,
        question_characters: int = Limits.question_characters,
    ):
        self.app, self.folder = app, folder
        self.upload_megabytes, self.folder_megabytes = upload_megabytes, folder_megabytes
        self.other_bytes = question_characters * CHARACTER + ENVELOPE
        self.counting = asyncio.Lock()
        self.counted_at = float("-inf")
        self.counted = 0  # bytes in the folder, and those let in since
        self.arriving = 0  # bytes of the uploads that are on their way

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
        upload = path.startswith("/gradio_api/upload") and scope["method"] == "POST"
        length = length_of(scope)
        status, said = self.why_not(path, upload, length)
        if upload and not said and not await self.has_room(length or 0):
            status, said = 503, "This page has no room for uploads just now. Try again later."
        if said:
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": said.encode()})
            return
        try:
            await self.app(scope, receive, send)
        finally:
            if upload:
                self.arriving -= length or 0

    def why_not(self, path: str, upload: bool, length: int | None) -> tuple[int, str]:
        """Status and words with which a request is refused for what its head says; no words if it is not."""
        if not OPEN.fullmatch(path):
            return 404, "There is nothing here."
        if length is None:
            return 411, "A request must say how long it is."
        if upload and length > self.upload_megabytes * 1e6 + ENVELOPE:
            return 413, f"That is more than the maximum allowed size of {self.upload_megabytes:g} MB."
        if not upload and length > self.other_bytes:
            return 413, f"That is more than the maximum allowed size of {self.other_bytes} bytes."
        return 200, ""

    async def has_room(self, length: int) -> bool:
        """Whether so many bytes still fit into the folder; if so, they count as arriving."""
        async with self.counting:  # one at a time, and not where requests are answered: many files take a while
            if time.monotonic() - self.counted_at > COUNT_HOLDS:
                arriving = self.arriving  # partly on the disk already: counted twice rather than not at all
                self.counted = arriving + await asyncio.to_thread(tidy_size_of, self.folder)
                self.counted_at = time.monotonic()
            if self.counted + length > self.folder_megabytes * 1e6:
                return False
            self.counted += length
            self.arriving += length
            return True


def length_of(scope: dict[str, Any]) -> int | None:
    """Bytes of a request's body as its head says; `None` if it has one and does not say, or says it in two ways."""
    headers = dict(scope["headers"])
    if b"transfer-encoding" in headers:  # whatever else it says, its end is where it stops
        return None
    length = headers.get(b"content-length", b"0" if scope["method"] in ("GET", "HEAD") else b"")
    return int(length) if length.isdigit() else None


def tidy_size_of(folder: Path) -> int:
    """
    Bytes that a folder's files and folders take on the disk (`int`); what vanishes meanwhile counts nothing.

    Gradio deletes old files but leaves their folders, and the files of uploads that broke off, which lie on top. Both
    go here once they have rested.
    """
    total, rested = 0, time.time() - REST
    for where, folders, names in os.walk(folder):
        on_top = where == str(folder)
        try:
            if not (on_top or folders or names) and os.stat(where).st_mtime < rested:
                os.rmdir(where)
                continue
        except OSError:
            pass
        total += ENTRY
        for name in names:
            file = os.path.join(where, name)
            try:
                known = os.stat(file)
                if on_top and known.st_mtime < rested:
                    os.remove(file)
                else:
                    total += max(known.st_size, ENTRY)
            except OSError:
                continue
    return total
