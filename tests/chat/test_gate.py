"""The routes of the page's server: those it needs are there, and nothing else of what Gradio serves."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from chat.limits import Limits


pytest.importorskip("gradio", reason="the app extra (gradio) is not installed")
from fastapi.testclient import TestClient  # noqa: E402
from gradio.routes import App  # noqa: E402

from chat.gate import Gate  # noqa: E402
from chat.interface import build_interface, launch_options  # noqa: E402


CLOSED = (
    ("GET", "/gradio_api/file=http://example.com/"),
    ("GET", "/gradio_api/file=http%3A%2F%2Fexample.com/"),
    ("GET", "/gradio_api/proxy=http://example.com"),
    ("POST", "/gradio_api/process_recording"),
    ("GET", "/gradio_api/runs"),
    ("GET", "/gradio_api/run-history/buckets"),
    ("GET", "/gradio_api/info"),
    ("POST", "/gradio_api/call/take"),
    ("GET", "/openapi.json"),
    ("GET", "/monitoring"),
)


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Makes a client of the page's server."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))

    def make(login: tuple[str, str] | None = None, gate: bool = True) -> TestClient:
        limits = Limits(upload_megabytes=0.1, all_uploads_megabytes=0.5)
        assistant = SimpleNamespace(
            limits=limits, transcriber=None, speech_note="off", describe=lambda: "tiny", goodbye=lambda visitor: None
        )
        assistant.welcome = lambda: None
        blocks = build_interface(assistant)
        options = launch_options(assistant, tmp_path)
        blocks.max_file_size = options["max_file_size"]
        blocks.config = blocks.get_config_file()
        blocks.auth, blocks.auth_message = login and [login], None  # as `launch` does
        return TestClient(App.create_app(blocks, app_kwargs=options["app_kwargs"] if gate else None))

    return make


def test_only_the_pages_own_routes_answer(client, monkeypatch):
    fetched = []

    async def fetch(url, *_, **__):
        fetched.append(url)
        raise OSError("fetched")

    monkeypatch.setattr("gradio.route_utils.secure_url_stream_response", fetch)
    monkeypatch.setattr("gradio.routes.secure_url_stream_response", fetch)
    page = client()
    assert page.get("/gradio_api/app_id").status_code == 200
    for method, path in CLOSED:
        reply = page.request(method, path)
        assert (reply.status_code, reply.text) == (404, "There is nothing here."), path
    assert fetched == []
    assert page.get("/gradio_api/file=/etc/passwd").status_code == 403  # Gradio's own word
    with pytest.raises(OSError, match="fetched"):  # the control: what Gradio does by itself
        client(gate=False).get("/gradio_api/file=http://example.com/")


def test_uploads_have_room_until_there_is_none(client, tmp_path):
    page = client()

    def upload(*sizes: int, **options):
        files = [("files", (f"{number}.bin", bytes(size))) for number, size in enumerate(sizes)]
        return page.post("/gradio_api/upload", files=files, **options)

    assert upload(90_000).status_code == 200
    for sizes in ((90_000, 90_000), (300_000,)):  # many files in one request count together
        assert (reply := upload(*sizes)).status_code == 413 and "maximum allowed size of 0.1 MB" in reply.text
    endless = page.post("/gradio_api/upload", content=iter([b"x"]), headers={"Content-Type": "multipart/form-data"})
    assert endless.status_code == 411
    (tmp_path / "others").write_bytes(bytes(400_000))
    assert (reply := upload(90_000)).status_code == 503 and "no room" in reply.text
    (tmp_path / "others").unlink()
    assert upload(80_000).status_code == 200


def test_behind_a_login_nothing_answers_without_it(client):
    page = client(login=("anna", "secret"))
    doors = [("GET", "/config"), ("GET", "/gradio_api/file=x.png"), ("POST", "/gradio_api/upload")]
    doors += [("POST", "/gradio_api/queue/join"), ("POST", "/gradio_api/run/predict")]
    doors += [("GET", "/gradio_api/queue/data?session_hash=x")]
    for method, path in doors:
        options = {"json": {"data": [], "fn_index": 0, "session_hash": "x"}} if method == "POST" else {}
        if path.endswith("upload"):
            options = {"files": {"files": ("a.png", b"x")}}
        assert page.request(method, path, **options).status_code == 401, path
    assert page.post("/login", data={"username": "anna", "password": "wrong"}).status_code == 400
    assert page.post("/login", data={"username": "bob", "password": "secret"}).status_code == 400
    assert page.get("/config").status_code == 401
    assert page.post("/login", data={"username": "anna", "password": "secret"}).status_code == 200
    assert page.get("/config").status_code == 200


def test_a_path_in_front_is_no_way_around(tmp_path):
    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    gate = Gate(inner, Path(tmp_path), 1, 1)

    def status(path: str, root: str = "", kind: str = "http") -> list[int]:
        sent: list[dict] = []

        async def send(message):
            sent.append(message)

        scope = {"type": kind, "path": path, "root_path": root, "method": "GET", "headers": []}
        asyncio.run(gate(scope, None, send))
        return [message["status"] for message in sent if "status" in message]

    assert status("/jnana/config", "/jnana") == status("/config") == [200]
    assert status("/jnana/gradio_api/runs", "/jnana") == status("/config/x") == [404]
    assert status("/config\n/gradio_api/runs") == [404]
    assert status("/config", kind="websocket") == []
