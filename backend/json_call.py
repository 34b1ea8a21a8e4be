"""One request to a service on a unix socket: the client's side of `backend.json_api`, for the loop."""

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeVar

import h11
import msgspec
import trio

from backend.json_api import BODY_MAX_BYTES

T = TypeVar("T")


class CallFailed(Exception):
    """Nobody answers there, or not with what was expected."""


async def call_socket(path: Path, target: str, body: msgspec.Struct, answer: type[T]) -> T:
    """POSTs `body` and gives the answer. Raises `CallFailed`, whose text never quotes the answer."""
    try:
        async with _connected(path) as stream:
            status, data = await _exchange(stream, target, msgspec.json.encode(body))
    except (OSError, trio.BrokenResourceError, h11.RemoteProtocolError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise CallFailed(reason.lower()) from error
    if status != 200:
        raise CallFailed(f"it answered with status {status}")
    try:
        return msgspec.json.decode(data, type=answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise CallFailed("it answered something that is not the JSON expected") from None


@contextlib.asynccontextmanager
async def _connected(path: Path) -> AsyncIterator[trio.SocketStream]:
    # By way of a descriptor: the address of a unix socket has room for 107 bytes only.
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        stream = await trio.open_unix_socket(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.close(directory)
    async with stream:
        yield stream


async def _exchange(stream: trio.SocketStream, target: str, body: bytes) -> tuple[int, bytes]:
    connection = h11.Connection(h11.CLIENT)
    headers = [("Host", "localhost"), ("Content-Length", str(len(body))), ("Connection", "close")]
    parts = (
        connection.send(h11.Request(method="POST", target=target, headers=headers)),
        connection.send(h11.Data(data=body)),
        connection.send(h11.EndOfMessage()),
    )
    await stream.send_all(b"".join(part for part in parts if part))
    status, data = 0, bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(bytes(await stream.receive_some(65536)))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            data += event.data
            if len(data) > BODY_MAX_BYTES:
                raise h11.RemoteProtocolError("the answer is too large")
        elif isinstance(event, h11.EndOfMessage):
            return status, bytes(data)
        elif isinstance(event, h11.ConnectionClosed):
            raise h11.RemoteProtocolError("no answer")
