"""What the page's server answers at all: the few routes the page uses, and uploads while there is room for them.

Gradio's server has more: one route streams whatever web address it is given, one hands videos to ffmpeg, some speak to
the Hugging Face Hub. Nothing here needs them, so they do not exist for visitors. Gradio bounds each uploaded file, but
neither how many come in one request nor how much lies on the disk.
"""

import os
import re
from pathlib import Path
from typing import Any


# What a browser asks for while it shows and uses the page, and nothing else
OPEN = re.compile(
    r"/|/(config|login|logout|theme\.css|favicon\.ico|robots\.txt|manifest\.json|pwa_icon)/?"
    r"|/(assets|static|svelte|pwa_icon)/.*"
    r"|/gradio_api/(run/predict|queue/join|queue/data|cancel|reset|upload|upload_progress)/?"
    r"|/gradio_api/(startup-events|login_check|user|app_id|theme\.css)/?"
    r"|/gradio_api/heartbeat/[^/]+|/gradio_api/file=(?!.*://).*"
)
ENVELOPE = 65_536  # bytes of an upload request beside its file


class Gate:
    """
    ASGI middleware in front of Gradio's routes.

    Args:
        app (`ASGI application`): What answers where the gate is open.
        folder (`Path`): Where uploads lie.
        upload_megabytes (`float`): Of one upload request.
        folder_megabytes (`float`): Of all that lies in the folder; beyond that nothing is taken in.
    """

    def __init__(self, app: Any, folder: Path, upload_megabytes: float, folder_megabytes: float):
        self.app, self.folder = app, folder
        self.upload_megabytes, self.folder_megabytes = upload_megabytes, folder_megabytes

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # a web socket: not answered
        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
        status, said = 200, ""
        if not OPEN.fullmatch(path):
            status, said = 404, "There is nothing here."
        elif path.startswith("/gradio_api/upload") and scope["method"] == "POST":
            status, said = self.why_not_uploaded(dict(scope["headers"]).get(b"content-length", b""))
        if said:
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": said.encode()})
        else:
            await self.app(scope, receive, send)

    def why_not_uploaded(self, length: bytes) -> tuple[int, str]:
        """Status and words with which an upload of so many bytes (its header) is refused; no words if it is not."""
        if not length.isdigit():
            return 411, "An upload must say how long it is."
        if int(length) > self.upload_megabytes * 1e6 + ENVELOPE:
            return 413, f"That is more than the maximum allowed size of {self.upload_megabytes:g} MB."
        if size_of(self.folder) + int(length) > self.folder_megabytes * 1e6:
            return 503, "This page has no room for uploads just now. Try again later."
        return 200, ""


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder and its folders (`int`); what vanishes meanwhile counts nothing."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(where, name)).st_size
            except OSError:
                continue
    return total
