"""Answers requests on a unix socket: JSON over HTTP/1.1.

Concurrency: one task accepts, one serves each connection; the number of connections is bounded, and each must
send its request within `REQUEST_TIMEOUT_S`. A handler may take as long as it needs, and is not stopped when
who asked has gone.
"""

import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import h11
import msgspec
import trio

from fuse.supervisor.listener import listen
from rafs.errors import NydusError

log = logging.getLogger(__name__)

STATUS_TARGET = "/api/v1/status"
REQUEST_TIMEOUT_S = 10.0
CONNECTIONS_MAX = 64
BODY_MAX_BYTES = 1 << 20

Handler = Callable[[bytes], Awaitable[object]]
"""Takes the body of a request; gives what is answered as JSON. A `NydusError` is answered as `ApiError`."""
Routes = Mapping[tuple[str, str], Handler]
"""By method and target."""


class ApiError(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a request has failed. `exit_code` is that of the error's class, 0 for a request that is none."""

    error: str
    exit_code: int = 0


async def serve_status(
    path: Path,
    status: Callable[[], msgspec.Struct],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answers `GET /api/v1/status` on the socket `path` until cancelled, then removes it."""

    async def answer(body: bytes) -> msgspec.Struct:
        await trio.lowlevel.checkpoint()
        return status()

    listener = listen(path)
    try:
        task_status.started()
        await serve_api(listener, {("GET", STATUS_TARGET): answer})
    finally:
        path.unlink(missing_ok=True)


async def serve_api(listener: socket.socket, routes: Routes) -> None:
    """Answers on a listening socket until cancelled, and closes it then."""
    connections = trio.CapacityLimiter(CONNECTIONS_MAX)

    async def handle(stream: trio.SocketStream) -> None:
        async with stream, connections:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await _answer(stream, routes)

    async with trio.SocketListener(trio.socket.from_stdlib_socket(listener)) as accepting:
        await trio.serve_listeners(handle, [accepting])


async def _answer(stream: trio.SocketStream, routes: Routes) -> None:
    connection = h11.Connection(h11.SERVER)
    try:
        with trio.move_on_after(REQUEST_TIMEOUT_S) as reading:
            request, body = await _read_request(stream, connection)
        if reading.cancelled_caught or request is None:
            return
    except h11.RemoteProtocolError:
        code, answer = 400, msgspec.json.encode(ApiError("not an HTTP request"))
    else:
        code, answer = await _handle(routes, request.method.decode(), request.target.decode(), body)
    with trio.move_on_after(REQUEST_TIMEOUT_S):
        await _send(stream, connection, code, answer)


async def _handle(routes: Routes, method: str, target: str, body: bytes) -> tuple[int, bytes]:
    handler = routes.get((method, target))
    if handler is None:
        methods = [known for known, path in routes if path == target]
        if not methods:
            return 404, msgspec.json.encode(ApiError("no such resource"))
        return 405, msgspec.json.encode(ApiError(f"only {', '.join(methods)}"))
    try:
        return 200, msgspec.json.encode(await handler(body))
    except msgspec.DecodeError as error:
        return 400, msgspec.json.encode(ApiError(f"the body cannot be read: {error}"))
    except NydusError as error:
        return 422, msgspec.json.encode(ApiError(str(error), error.exit_code))
    except Exception as error:
        log.exception("fault while answering %s %s", method, target)
        return 500, msgspec.json.encode(ApiError(f"{type(error).__name__}: {error}"))


async def _read_request(
    stream: trio.SocketStream, connection: h11.Connection
) -> tuple[h11.Request | None, bytes]:
    request, body = None, bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(65536))
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


async def _send(stream: trio.SocketStream, connection: h11.Connection, code: int, body: bytes) -> None:
    headers = [
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
    ]
    parts = (
        connection.send(h11.Response(status_code=code, headers=headers)),
        connection.send(h11.Data(data=body)),
        connection.send(h11.EndOfMessage()),
    )
    await stream.send_all(b"".join(part for part in parts if part))
