"""A server on loopback that answers as it is told, lies and breakdowns included."""

import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import h11
import trio


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it came in; header names are in lower case."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes

    @property
    def range(self) -> tuple[int, int] | None:
        """First and last byte of the Range header."""
        if "range" not in self.headers:
            return None
        first, _, last = self.headers["range"].removeprefix("bytes=").partition("-")
        return int(first), int(last)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer. `length` is what Content-Length says; `then` is what happens after `body` was sent.

    `then` is "keep" (the connection), "close", "reset" or "stall" (for ever); with "drop" there is no
    answer at all, only a reset. `before` runs first.
    """

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    length: int | None = None
    then: str = "keep"
    before: Callable[[], Awaitable[object]] | None = None


@dataclass(slots=True)
class FaultServer:
    """What was asked, in order, and where: `host` is HOST:PORT."""

    host: str = ""
    asked: list[Asked] = field(default_factory=list)

    @property
    def url(self) -> str:
        """The address without a slash at the end."""
        return f"http://{self.host}"

    def requests(self) -> list[str]:
        """Method and path of each request."""
        return [f"{asked.method} {asked.path}" for asked in self.asked]


def ranged(asked: Asked, content: bytes) -> Reply:
    """What an honest server answers to a GET or HEAD of `content`."""
    if asked.method == "HEAD":
        return Reply(length=len(content))
    if asked.range is None:
        return Reply(body=content)
    first, last = asked.range
    head = ("Content-Range", f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}")
    return Reply(206, (head,), content[first : last + 1])


@asynccontextmanager
async def fault_server(answer: Callable[[Asked], Reply]) -> AsyncIterator[FaultServer]:
    """Serves `answer` on a free port of 127.0.0.1 until the block ends."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    name = listeners[0].socket.getsockname()
    server = FaultServer(f"{name[0]}:{name[1]}")

    async def connection(stream: trio.SocketStream) -> None:
        try:
            while await _serve_one(stream, server, answer):
                pass
        except (trio.BrokenResourceError, h11.RemoteProtocolError):
            return

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, connection, listeners)
        yield server
        nursery.cancel_scope.cancel()


async def _serve_one(
    stream: trio.SocketStream, server: FaultServer, answer: Callable[[Asked], Reply]
) -> bool:
    asked = await _receive(stream)
    if asked is None:
        return False
    server.asked.append(asked)
    reply = answer(asked)
    if reply.before is not None:
        await reply.before()
    if reply.then == "drop":
        _reset_at_close(stream)
        return False
    length = len(reply.body) if reply.length is None else reply.length
    lines = [f"HTTP/1.1 {reply.status} Told", f"Content-Length: {length}"]
    lines += [f"{name}: {value}" for name, value in reply.headers]
    head = "\r\n".join([*lines, "", ""]).encode()
    await stream.send_all(head + (b"" if asked.method == "HEAD" else reply.body))
    if reply.then == "stall":
        await trio.sleep_forever()
    if reply.then == "reset":
        _reset_at_close(stream)
    return reply.then == "keep"


def _reset_at_close(stream: trio.SocketStream) -> None:
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def _receive(stream: trio.SocketStream) -> Asked | None:
    """One request. A connection of its own to h11 each time: no pipelining here."""
    connection = h11.Connection(h11.SERVER)
    request: h11.Request | None = None
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            data = await stream.receive_some(65536)
            if not data and request is None:
                return None
            connection.receive_data(data)
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            assert request is not None
            path, _, query = request.target.decode().partition("?")
            headers = {name.decode(): value.decode() for name, value in request.headers}
            return Asked(request.method.decode(), path, query, headers, bytes(body))
        else:
            return None
