"""Idle connections and idle uploads over real sockets: each ends, and meanwhile other addresses are answered."""

import re
import socket
import threading
import time

import pytest


pytest.importorskip("gradio", reason="the app extra (gradio) is not installed")
import uvicorn  # noqa: E402

from jnana.chat import connections  # noqa: E402
from jnana.chat import gate as gate_module
from jnana.chat.connections import LimitedProtocol, limit_connections  # noqa: E402
from jnana.chat.gate import Gate  # noqa: E402


OTHERS = "127.0.0.2"  # another address of this machine
SECONDS = 60


async def application(scope, receive, send):
    """Reads the body, and answers."""
    message = {"more_body": True}
    while message.get("more_body"):
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RuntimeError("the client has left")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def port(tmp_path, monkeypatch):
    """A server with room for one and a half uploads of an address, in which nothing ends before a test says so."""
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", uvicorn.config.HTTP_PROTOCOLS["auto"])
    limit_connections()
    monkeypatch.setattr(LimitedProtocol, "most", 12)
    monkeypatch.setattr(LimitedProtocol, "most_of_one_address", 8)
    monkeypatch.setattr(connections, "IDLE_SECONDS", float("inf"))
    monkeypatch.setattr(connections, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(gate_module, "STALL_SECONDS", 10 * SECONDS)
    monkeypatch.setattr(gate_module, "COUNT_HOLDS", -1)
    app = Gate(application, tmp_path, upload_megabytes=0.1, folder_megabytes=0.3)
    server = uvicorn.Server(uvicorn.Config(app, host="0.0.0.0", port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(timeout=SECONDS)


def connect(port: int, address: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=SECONDS, source_address=(address, 0))


def head(length: int) -> bytes:
    return f"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()


def answer(connection: socket.socket) -> str:
    """All that the server sends until it closes the connection, or the end of an answer comes."""
    got = b""
    while not got.endswith(b"ok") and (part := connection.recv(4096)):
        got += part
    return got.decode()


def status(port: int, address: str = "127.0.0.1", length: int = 10) -> int:
    with connect(port, address) as connection:
        connection.sendall(head(length) + bytes(length))
        found = re.match(r"HTTP/1.1 (\d+)", answer(connection))
        assert found is not None
        return int(found[1])


def test_idle_connections_shut_nobody_else_out_and_end(port, monkeypatch):
    idle = [connect(port) for _ in range(8)]
    with connect(port) as surplus:
        assert "too many connections" in answer(surplus)
    assert status(port, OTHERS) == 200  # one address takes its share only
    idle[0].sendall(b"POST / HTTP/1.1\r\nHost: loc")  # a header that never ends
    with connect(port) as surplus:
        assert "too many connections" in answer(surplus)  # the control: all of them are still open
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.3)
    assert [answer(connection) for connection in idle] == [""] * 8
    assert status(port) == 200


def test_more_connections_than_the_server_takes_are_answered_and_not_logged(port, caplog):
    held = [connect(port, f"127.0.0.{number}") for number in range(2, 14)]
    with connect(port, "127.0.0.99") as surplus:
        assert answer(surplus).startswith("HTTP/1.1 503")
    assert not caplog.records  # asyncio logs each connection that it can't accept
    for connection in held:
        connection.close()


def test_idle_uploads_hold_only_the_share_of_their_address_and_end(port, monkeypatch):
    idle = [connect(port) for _ in range(2)]
    for connection in idle:
        connection.sendall(head(100_000) + b"x")
    deadline = time.monotonic() + SECONDS
    while (said := status(port, length=100_000)) != 503 and time.monotonic() < deadline:
        time.sleep(0.01)  # the second idle upload has not arrived yet
    assert said == 503 and status(port, OTHERS, length=90_000) == 200
    monkeypatch.setattr(gate_module, "STALL_SECONDS", 0.3)
    for connection in idle:
        connection.sendall(b"x")  # from the next part of its body on
        assert re.match(r"HTTP/1.1 (408|503)", answer(connection))
    assert status(port, length=100_000) == 200


def test_a_body_that_trickles_in_ends(port, monkeypatch):
    monkeypatch.setattr(gate_module, "BODY_SECONDS", 1.0)
    monkeypatch.setattr(gate_module, "BYTES_A_SECOND", 1e9)
    with connect(port) as connection:
        connection.sendall(head(50_000))
        connection.settimeout(0.2)
        got = b""
        deadline = time.monotonic() + SECONDS
        while not got and time.monotonic() < deadline:
            connection.sendall(b"x")
            try:
                got = connection.recv(4096)
            except TimeoutError:
                continue
        assert got.startswith(b"HTTP/1.1 408")
