"""Limits on connections, which uvicorn lacks: their number, the share of one address, and the time without a request.

An idle connection takes a file descriptor. Without limits, as many of them as a process may have descriptors make the
server unreachable, and asyncio logs each failed attempt to accept one.
"""

import asyncio
from collections import Counter
from typing import Any

from uvicorn import config
from uvicorn.protocols.http.auto import AutoHTTPProtocol


try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]


IDLE_SECONDS = 15.0  # without a complete request header
LOOK_SECONDS = 5.0  # between two looks for idle connections
RESERVED = 200  # descriptors for files, the model and the speech worker
FULL = b"The server has too many connections. Try again later."
ANSWER = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain\r\nretry-after: 15\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(FULL), FULL)
)


class LimitedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's protocol. A connection beyond the limits is answered with 503 and closed, an idle one is closed."""

    most, most_of_one_address = 800, 400
    open_connections: Counter[str] = Counter()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.address = str((transport.get_extra_info("peername") or [""])[0])
        self.open_connections[self.address] += 1
        self.watch: asyncio.TimerHandle | None = None
        self.idle, self.last_cycle = 0.0, None
        if self.open_connections.total() > self.most or self.open_connections[self.address] > self.most_of_one_address:
            transport.write(ANSWER)
            transport.close()
        else:
            self._look(transport)

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)

    def _look(self, transport: Any) -> None:
        """Close the connection if it had no request for `IDLE_SECONDS`; else look again later."""
        # a new request since the last look, or one that is being answered
        answering = self.cycle is not self.last_cycle or (self.cycle is not None and not self.cycle.response_complete)
        self.last_cycle = self.cycle
        if not answering and self.idle >= IDLE_SECONDS:
            transport.close()
            return
        self.idle = 0.0 if answering else self.idle + LOOK_SECONDS
        self.watch = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.watch is not None:
            self.watch.cancel()
        self.open_connections[self.address] -= 1
        if self.open_connections[self.address] <= 0:
            del self.open_connections[self.address]


def limit_connections() -> None:
    """Use [`LimitedProtocol`] in all servers of this process, for as many connections as descriptors allow."""
    if resource is not None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        # an upload holds a connection and a file
        usable = (4096 if soft == resource.RLIM_INFINITY else soft) - RESERVED
        LimitedProtocol.most = max(usable // 2, 16)
        LimitedProtocol.most_of_one_address = max(usable // 4, 8)
    # Gradio starts uvicorn without an option for the protocol, so the default is replaced
    config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{LimitedProtocol.__name__}"
