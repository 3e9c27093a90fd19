"""The gate: only the page's own routes answer, and requests and uploads have limits."""

import asyncio
import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from jnana.chat.limits import Limits


pytest.importorskip("gradio", reason="the app extra (gradio) is not installed")
from fastapi.testclient import TestClient  # noqa: E402
from gradio.routes import App  # noqa: E402

from jnana.chat import gate as gate_module  # noqa: E402
from jnana.chat.gate import ENTRY, REST, Gate, tidy_size_of  # noqa: E402
from jnana.chat.interface import build_interface, launch_options  # noqa: E402


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
    monkeypatch.setattr(gate_module, "COUNT_HOLDS", -1)

    def make(login: tuple[str, str] | None = None, gate: bool = True) -> TestClient:
        limits = Limits(upload_megabytes=0.1, all_uploads_megabytes=0.5)
        assistant = SimpleNamespace(
            limits=limits,
            transcriber=None,
            speech_note="off",
            name="tiny",
        )
        blocks = build_interface(assistant)
        options = launch_options(assistant, tmp_path, ["testserver"])
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
        assert (reply.status_code, reply.text) == (404, "Not found."), path
    assert fetched == []
    assert page.get("/gradio_api/file=/etc/passwd").status_code == 403  # refused by Gradio
    with pytest.raises(OSError, match="fetched"):  # the control: what Gradio does by itself
        client(gate=False).get("/gradio_api/file=http://example.com/")


def test_only_the_pages_own_names_are_answered(client):
    page = client()
    for host in (
        "localhost",
        "localhost:7860",
        "127.0.0.1:7860",
        "[::1]:7860",
        "192.168.1.7",
        "TestServer",
        "testserver:80",
    ):
        assert page.get("/gradio_api/app_id", headers={"host": host}).status_code == 200, host
    for host in (
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example:7860",
        "",
        "[bad",
        "testserver.evil",
    ):
        for method, path in (("GET", "/"), ("GET", "/gradio_api/app_id"), ("POST", "/gradio_api/upload")):
            reply = page.request(method, path, headers={"host": host})
            assert reply.status_code == 421 and "not served under that name" in reply.text, (host, path)
    unguarded = client(gate=False)  # the control: what Gradio does by itself
    assert unguarded.get("/gradio_api/app_id", headers={"host": "evil.example"}).status_code == 200


CHANGING = ("run/predict", "queue/join", "cancel", "reset", "upload")


def test_pages_of_other_sites_change_nothing(client):
    page = client()
    routes = [("POST", f"/gradio_api/{name}") for name in CHANGING] + [("POST", "/login"), ("GET", "/logout")]
    for method, path in routes:
        others = ("http://127.0.0.1:9999", "http://localhost:3000")  # other servers of this machine
        for foreign in ("http://evil.example", "https://testserver.evil", "null", *others):
            reply = page.request(method, path, headers={"origin": foreign, "content-length": "0"})
            assert (reply.status_code, reply.text) == (403, "Requests from other sites are not answered."), path
        fetched = page.request(method, path, headers={"sec-fetch-site": "cross-site", "content-length": "0"})
        assert fetched.status_code == 403
        for own in ("http://testserver", "https://testserver"):  # the control; the second is that of a proxy with TLS
            reply = page.request(method, path, headers={"origin": own}, follow_redirects=False)
            assert reply.status_code not in (403, 421), path
    assert page.get("/gradio_api/app_id", headers={"origin": "http://evil.example"}).status_code == 200  # only reads


def routes_of(routes, prefix: str = ""):
    """The paths and methods of all routes, those of included routers too."""
    for route in routes:
        inner = getattr(route, "original_router", None) or getattr(route, "app", None)
        path = prefix + getattr(route, "path", "")
        if getattr(route, "methods", None):
            yield path, route.methods
        elif inner is not None:
            yield from routes_of(getattr(inner, "routes", ()), path)


def test_every_route_of_the_page_is_guarded(client):
    """Whatever routes Gradio has: a foreign name gets nothing, and a foreign page changes nothing."""
    page = client()
    routes = {(method, path) for path, methods in routes_of(page.app.routes) for method in methods}
    assert len(routes) > 50
    for method, path in sorted(routes):
        assert page.request(method, path, headers={"host": "evil.example"}).status_code == 421, path
        if method not in ("GET", "HEAD"):
            headers = {"origin": "http://evil.example", "content-length": "0"}
            assert page.request(method, path, headers=headers).status_code == 403, path


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


def test_no_other_request_is_longer_than_a_question_needs(client):
    def post(page, path: str, length: int, **headers: str):
        body = b'{"data": [], "fn_index": 0, "session_hash": "x", "event_id": "y"}'.ljust(length)
        return page.post(path, content=body, headers={"Content-Type": "application/json", **headers})

    page = client(login=("anna", "secret"))
    bound = len(json.dumps("\N{GRINNING FACE}" * Limits().question_characters)) - 2 + 65_536
    for path in ("/login", "/gradio_api/run/predict", "/gradio_api/queue/join", "/gradio_api/cancel"):
        assert (reply := post(page, path, bound + 1)).status_code == 413 and f"size of {bound} bytes" in reply.text
        assert post(page, path, 100, **{"Transfer-Encoding": "chunked", "Content-Length": "100"}).status_code == 411
        assert post(page, path, bound).status_code not in (411, 413), path
    unguarded = client(login=("anna", "secret"), gate=False)  # the control: what Gradio does by itself
    assert post(unguarded, "/gradio_api/run/predict", bound + 1).status_code == 401


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


def test_small_files_count_what_they_take_and_remains_go(tmp_path):
    for name in ("one", "two", "emptied"):
        (tmp_path / name).mkdir()
    for name in ("one/a.png", "two/b.png", "broken-off"):
        (tmp_path / name).write_bytes(b"x")
    assert tidy_size_of(tmp_path) == 7 * ENTRY
    for name in ("one", "one/a.png", "emptied", "broken-off"):
        os.utime(tmp_path / name, (0, time.time() - REST - 9))
    assert tidy_size_of(tmp_path) == 5 * ENTRY
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.png", "b.png", "one", "two"]


def test_what_is_on_its_way_takes_room(tmp_path):
    """Three uploads at once, of which two fit; meanwhile nothing else waits."""
    here = threading.get_ident()

    async def inner(scope, receive, send):
        await done.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def upload(length: int) -> None:
        async def send(message):
            if "status" in message:
                said.append(message["status"])

        headers = [(b"host", b"localhost"), (b"content-length", b"%d" % length)]
        await gate({"type": "http", "path": "/gradio_api/upload", "method": "POST", "headers": headers}, None, send)

    async def all_at_once() -> None:
        uploads = [asyncio.create_task(upload(400_000)) for _ in range(3)]
        async with asyncio.timeout(240):  # on a busy machine
            while not said:
                await asyncio.sleep(0.001)
        done.set()
        await asyncio.gather(*uploads)
        await upload(400_000)

    def count(folder: Path) -> int:
        assert threading.get_ident() != here
        return tidy_size_of(folder)

    for holds in (-1, 9):  # one measurement for each upload, or one for all
        said: list[int] = []
        done = asyncio.Event()
        gate = Gate(inner, tmp_path, 1, 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gate_module, "COUNT_HOLDS", holds)
            patch.setattr(gate_module, "tidy_size_of", count)
            asyncio.run(all_at_once())
        assert said == ([503, 200, 200, 200] if holds < 0 else [503, 200, 200, 503])


def test_a_path_in_front_is_no_way_around(tmp_path):
    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    gate = Gate(inner, Path(tmp_path), 1, 1)

    def status(path: str, root: str = "", kind: str = "http") -> list:
        sent: list[dict] = []

        async def send(message):
            sent.append(message)

        headers = [(b"host", b"localhost")]
        scope = {"type": kind, "path": path, "root_path": root, "method": "GET", "headers": headers}
        asyncio.run(gate(scope, None, send))
        return [message.get("status", message["type"]) for message in sent if message["type"] != "http.response.body"]

    assert status("/jnana/config", "/jnana") == status("/config") == [200]
    assert status("/jnana/gradio_api/runs", "/jnana") == status("/config/x") == [404]
    assert status("/config\n/gradio_api/runs") == [404]
    assert status("/config", kind="websocket") == ["websocket.close"]


def test_an_address_takes_half_of_the_memory_of_api_bodies(tmp_path):
    """Meanwhile other addresses are answered, and all together no more than there is."""
    waiting, go = [], asyncio.Event()

    async def inner(scope, receive, send):
        waiting.append(scope["client"][0])
        await go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    gate = Gate(inner, None, api_megabytes=0.001, page=False)

    async def status(address: str, length: int = 1000) -> int:
        sent: list[dict] = []

        async def send(message):
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-length", str(length).encode())]
        scope = {"type": "http", "path": "/v1/x", "method": "POST", "headers": headers, "client": (address, 1)}
        await gate(scope, None, send)
        return sent[0]["status"]

    async def all_at_once() -> list[int]:
        first = [asyncio.create_task(status("a")) for _ in range(5)]
        await asyncio.sleep(0.01)
        others = [asyncio.create_task(status(name)) for name in "bbbcd"]
        await asyncio.sleep(0.01)
        assert waiting == [*"aaaabbbc"]  # half for a; together they have all
        go.set()
        said = [await task for task in (*first, *others)]
        return [*said, await status("a")]  # what has been answered takes no memory any more

    assert asyncio.run(all_at_once()) == [200, 200, 200, 200, 503, 200, 200, 200, 200, 503, 200]
    assert not gate.api_arriving


def test_a_page_loads_nothing_from_other_servers(client):
    policy = client().get("/gradio_api/app_id").headers["content-security-policy"]
    for rule in ("img-src 'self' data: blob:", "connect-src 'self'", "form-action 'self'", "object-src 'none'"):
        assert rule in policy
    assert "content-security-policy" not in client(gate=False).get("/gradio_api/app_id").headers  # the control
