"""Requests that no browser makes, to the page's server over a real socket: every handler and every route of it."""

import json
import re
import secrets
from types import SimpleNamespace
from urllib.parse import quote

import pytest


pytest.importorskip("gradio", reason="the app extra (gradio) is not installed")
import httpx  # noqa: E402

from jnana.chat.interface import build_interface, launch_options  # noqa: E402
from tests.chat.test_gate import routes_of  # noqa: E402
from tests.chat.test_interface import MARK, assistant, typed  # noqa: E402, F401  (a fixture)


SECRET = b"the operator's secret"
SECONDS = 240  # of one request, on a busy machine


@pytest.fixture(scope="module")
def served(assistant, tmp_path_factory):  # noqa: F811
    """The page's server, a client of it, and the paths of files that no visitor may name."""
    folder = tmp_path_factory.mktemp("served")
    uploads = folder / "uploads"
    uploads.mkdir()
    (folder / "secret.png").write_bytes(SECRET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        blocks = build_interface(assistant)
        _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, **launch_options(assistant, uploads))
        try:
            with httpx.Client(base_url=address, timeout=SECONDS) as client:
                foreign = [str(folder / "secret.png"), "/dev/zero", "/no/such/file"]
                yield SimpleNamespace(blocks=blocks, client=client, foreign=foreign)
        finally:
            blocks.close(verbose=False)


def run(client: httpx.Client, number: int, data: list, route: str) -> dict:
    """Have a handler run, by one of Gradio's two routes; its last message, whose `success` says whether it ran."""
    body = {"data": data, "fn_index": number, "session_hash": secrets.token_hex(8)}
    reply = client.post(f"/gradio_api/{route}", json=body)
    if route == "run/predict" or reply.status_code != 200:
        return {"success": reply.status_code == 200, "output": reply.text}
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": body["session_hash"]}) as stream:
        for line in stream.iter_lines():
            message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
            if message.get("msg") == "process_completed":
                return message
    raise AssertionError("the event did not end")


def test_every_handler_refuses_files_that_no_visitor_uploaded(served):
    """One such request ended the server, or told what an image elsewhere on its disk shows."""
    asked = 0
    handlers = {number: f for number, f in served.blocks.fns.items() if f.fn is not None}
    for number, function in handlers.items():
        for route in ("queue/join", "run/predict"):
            for path in served.foreign:
                for file in ({"path": path}, {"path": path, "meta": MARK}):
                    data = ["", *[{"text": "", "files": [file]}] * (len(function.inputs) - 1)]
                    data = data if len(data) > 1 else [file]
                    message = run(served.client, number, data, route)
                    assert not message["success"], (function.name, route, path)
                    said = json.dumps(message["output"])
                    assert path not in said and "No such file" not in said  # nothing tells whether it exists
                    asked += 1
    assert asked == 12 * len(handlers) > 150
    take = next(number for number, function in handlers.items() if function.name == "take")
    assert run(served.client, take, ["", typed("why?")], "queue/join")["success"]  # the control


def test_no_route_gives_away_a_foreign_file(served):
    client = served.client
    routes = {(method, path) for path, methods in routes_of(served.blocks.app.routes) for method in methods}
    assert len(routes) > 50
    for method, route in sorted(routes):
        for path in served.foreign[:2]:
            address = re.sub(r"\{[^}]+\}", quote(path, safe=""), route)
            body = {"path": path, "data": [{"path": path}], "session_hash": "x", "url": f"file://{path}"}
            options = {} if method in ("GET", "HEAD", "OPTIONS") else {"json": body}
            reply = client.request(method, address, params={"path": path, "url": path}, **options)
            assert SECRET not in reply.content, (method, route)
            assert "{" not in route or reply.status_code in (403, 404, 405), (method, route, reply.status_code)
    uploaded = client.post("/gradio_api/upload", files={"files": ("mine.png", SECRET)}).json()[0]
    assert client.get(f"/gradio_api/file={uploaded}").content == SECRET  # the control: one of a visitor is served
