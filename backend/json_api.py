"""Answers requests on a listening socket: JSON over HTTP/1.1, connections are kept.

Concurrency: one task accepts, one serves each connection; the number of connections is bounded, and each
must send a request that it has begun within `REQUEST_TIMEOUT_S`, and the next one within `IDLE_TIMEOUT_S`. A
handler may take as long as it needs, and is not stopped when who asked has gone.
"""

import contextlib
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import h11
import msgspec
import trio

from rafs.errors import NydusError

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 10.0
IDLE_TIMEOUT_S = 30.0
CONNECTIONS_MAX = 64
BODY_MAX_BYTES = 1 << 20
HEAD_MAX_BYTES = 16 << 10
JSON = "application/json"

Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """The body of a request, and the address it came from ("" on a unix socket).

    `certificate` is the client's, as `getpeercert()` gives it; None without TLS.
    """

    body: bytes
    peer: str = ""
    certificate: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class PlainText:
    """An answer that is no JSON."""

    text: str
    content_type: str


Handler = Callable[[ApiRequest], Awaitable[object]]
"""Gives what is answered as JSON, or `PlainText`. A `NydusError` is answered as `ApiError`."""
Routes = Mapping[tuple[str, str], Handler]
"""By method and target."""


class ApiError(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a request has failed. `exit_code` is that of the error's class, 0 for a request that is none."""

    error: str
    exit_code: int = 0


async def serve_api(
    listener: socket.socket,
    routes: Routes,
    *,
    connections_max: int = CONNECTIONS_MAX,
    ssl_context: ssl.SSLContext | None = None,
) -> None:
    """Answers on a listening socket until cancelled, and closes it then."""
    connections = trio.CapacityLimiter(connections_max)

    async def handle(plain: trio.SocketStream) -> None:
        stream = _secured(plain, ssl_context) if ssl_context else plain
        async with stream, connections:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                peer = plain.socket.getpeername() if plain.socket.family != socket.AF_UNIX else ("",)
                await _serve(stream, routes, str(peer[0]))

    async with trio.SocketListener(trio.socket.from_stdlib_socket(listener)) as accepting:
        await trio.serve_listeners(handle, [accepting])


def _secured(plain: trio.SocketStream, context: ssl.SSLContext) -> "trio.SSLStream[trio.SocketStream]":
    """Clients of HTTP hang up without a word."""
    return trio.SSLStream(plain, context, server_side=True, https_compatible=True)


async def _serve(stream: Stream, routes: Routes, peer: str) -> None:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_MAX_BYTES)
    with trio.CancelScope(deadline=trio.current_time() + REQUEST_TIMEOUT_S) as deadline:
        while await _answer(stream, connection, routes, peer, deadline):
            connection.start_next_cycle()
            deadline.deadline = trio.current_time() + IDLE_TIMEOUT_S


async def _answer(
    stream: Stream, connection: h11.Connection, routes: Routes, peer: str, deadline: trio.CancelScope
) -> bool:
    """Answers one request; whether another one may come."""
    try:
        request, body = await _read_request(stream, connection, deadline)
        if request is None:
            return False
    except h11.RemoteProtocolError:
        if connection.our_state is not h11.IDLE:
            return False
        await _send(stream, connection, 400, msgspec.json.encode(ApiError("not an HTTP request")))
        return False
    deadline.deadline = float("inf")
    certificate = stream.getpeercert() if isinstance(stream, trio.SSLStream) else None
    call = ApiRequest(body, peer, certificate)
    code, answer, kind = await _handle(routes, request.method.decode(), request.target.decode(), call)
    deadline.deadline = trio.current_time() + REQUEST_TIMEOUT_S
    # Who is refused may have a new certificate by now, which it can show only on a new connection.
    is_last = certificate is not None and code != 200
    await _send(stream, connection, code, answer, kind, is_last=is_last)
    return connection.our_state is h11.DONE and connection.their_state is h11.DONE


async def _handle(routes: Routes, method: str, target: str, call: ApiRequest) -> tuple[int, bytes, str]:
    """Status, body and content type."""
    code, answer = await _outcome(routes, method, target, call)
    if isinstance(answer, PlainText):
        return code, answer.text.encode(), answer.content_type
    return code, msgspec.json.encode(answer), JSON


async def _outcome(routes: Routes, method: str, target: str, call: ApiRequest) -> tuple[int, object]:
    handler = routes.get((method, target))
    if handler is None:
        methods = [known for known, path in routes if path == target]
        if not methods:
            return 404, ApiError("no such resource")
        return 405, ApiError(f"only {', '.join(methods)}")
    try:
        return 200, await handler(call)
    except Exception as error:
        return failed(error, f"{method} {target}")


def failed(error: Exception, what: str) -> tuple[int, ApiError]:
    """How the error of a handler is answered; faults of ours are logged."""
    if isinstance(error, msgspec.DecodeError):
        return 400, ApiError(f"the body cannot be read: {error}")
    if isinstance(error, NydusError):
        return 422, ApiError(str(error), error.exit_code)
    log.error("fault while answering %s", what, exc_info=error)
    return 500, ApiError(f"{type(error).__name__}: {error}")


async def _read_request(
    stream: Stream, connection: h11.Connection, deadline: trio.CancelScope
) -> tuple[h11.Request | None, bytes]:
    request, body = None, bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            data = await stream.receive_some(65536)
            if data and request is None:
                deadline.deadline = min(deadline.deadline, trio.current_time() + REQUEST_TIMEOUT_S)
            connection.receive_data(bytes(data))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > BODY_MAX_BYTES:
                raise h11.RemoteProtocolError("the body is too large")
        elif isinstance(event, h11.EndOfMessage):
            return request, bytes(body)
        else:
            return None, b""


async def _send(
    stream: Stream,
    connection: h11.Connection,
    code: int,
    body: bytes,
    kind: str = JSON,
    *,
    is_last: bool = False,
) -> None:
    headers = [("Content-Type", kind), ("Content-Length", str(len(body)))]
    if is_last:
        headers.append(("Connection", "close"))
    parts = (
        connection.send(h11.Response(status_code=code, headers=headers)),
        connection.send(h11.Data(data=body)),
        connection.send(h11.EndOfMessage()),
    )
    await stream.send_all(b"".join(part for part in parts if part))
