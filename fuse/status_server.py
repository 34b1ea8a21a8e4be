"""Asks a running mount how it is: `GET /api/v1/status` as JSON over HTTP/1.1 on a unix socket, mode 0600.

Concurrency: one task accepts, one serves each connection; the number of connections is bounded, and each must
send its request within `REQUEST_TIMEOUT_S`.
"""

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

import h11
import msgspec
import trio

STATUS_TARGET = b"/api/v1/status"
REQUEST_TIMEOUT_S = 10.0
CONNECTIONS_MAX = 32
_SOCKET_PATH_MAX = 107


async def serve_status(
    path: Path,
    status: Callable[[], msgspec.Struct],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answers on the socket `path` until cancelled, then removes it. A socket left there is replaced."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as raw:
        _bind(raw, path)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(raw))
        connections = trio.CapacityLimiter(CONNECTIONS_MAX)

        async def handle(stream: trio.SocketStream) -> None:
            async with stream, connections:
                with trio.move_on_after(REQUEST_TIMEOUT_S), contextlib.suppress(trio.BrokenResourceError):
                    await _answer(stream, status)

        try:
            task_status.started()
            await trio.serve_listeners(handle, [listener])
        finally:
            path.unlink(missing_ok=True)


def _bind(listener: socket.socket, path: Path) -> None:
    """Binds before anybody but the owner may connect; the address of a unix socket has 107 bytes only."""
    path.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        long = len(os.fsencode(path)) > _SOCKET_PATH_MAX
        address = f"/proc/self/fd/{directory}/{path.name}" if long else os.fspath(path)
        listener.bind(address)
        # Nobody can connect before `listen`.
        os.chmod(address, 0o600)
    finally:
        os.close(directory)
    listener.listen()


async def _answer(stream: trio.SocketStream, status: Callable[[], msgspec.Struct]) -> None:
    connection = h11.Connection(h11.SERVER)
    try:
        request = await _next_request(stream, connection)
    except h11.RemoteProtocolError:
        await _send(stream, connection, 400, b'{"error":"not an HTTP request"}')
        return
    if request is None:
        return
    if request.target != STATUS_TARGET:
        await _send(stream, connection, 404, b'{"error":"no such resource"}')
    elif request.method != b"GET":
        await _send(stream, connection, 405, b'{"error":"only GET"}')
    else:
        await _send(stream, connection, 200, msgspec.json.encode(status()))


async def _next_request(stream: trio.SocketStream, connection: h11.Connection) -> h11.Request | None:
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(65536))
        elif isinstance(event, h11.Request):
            return event
        else:
            return None


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
