"""The status socket: HTTP in, JSON out, nothing else."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from fuse.status_socket import serve_status

CLOSE = b"\r\nHost: x\r\nConnection: close\r\n\r\n"


class Answer(msgspec.Struct, frozen=True):
    """A status."""

    fine: bool = True


@asynccontextmanager
async def server(path: Path) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_status, path, Answer)
        yield
        nursery.cancel_scope.cancel()


async def talk(path: Path, request: bytes) -> bytes:
    answer = b""
    async with await trio.open_unix_socket(str(path)) as stream:
        await stream.send_all(request)
        async for part in stream:
            answer += part
    return answer


@pytest.mark.parametrize(
    ("request_bytes", "status", "body"),
    [
        (b"GET /api/v1/status HTTP/1.1" + CLOSE, b"200", b'{"fine":true}'),
        (b"GET / HTTP/1.1" + CLOSE, b"404", b'{"error":"no such resource"}'),
        (
            b"DELETE /api/v1/status HTTP/1.1" + CLOSE,
            b"405",
            b'{"error":"only GET"}',
        ),
        (b"\x16\x03\x01 hello\r\n\r\n", b"400", b'{"error":"not an HTTP request"}'),
    ],
)
async def test_requests(tmp_path: Path, request_bytes: bytes, status: bytes, body: bytes) -> None:
    path = tmp_path / "socket"
    async with server(path):
        answer = await talk(path, request_bytes)
        assert answer.startswith(b"HTTP/1.1 " + status)
        assert answer.endswith(b"\r\n\r\n" + body)
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()


async def test_a_connection_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    request = b"GET /api/v1/status HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /api/v1/status HTTP/1.1" + CLOSE
    async with server(path):
        assert (await talk(path, request + request + last)).count(b'{"fine":true}') == 3


async def test_silent_and_vanishing_clients_do_no_harm(tmp_path: Path, autojump_clock: object) -> None:
    path = tmp_path / "socket"
    async with server(path):
        async with await trio.open_unix_socket(str(path)) as stream:
            await stream.send_all(b"GET /api")
        async with await trio.open_unix_socket(str(path)) as stream:
            assert await stream.receive_some(1) == b""
        assert b"200" in await talk(path, b"GET /api/v1/status HTTP/1.1" + CLOSE)


async def test_old_socket_and_long_path(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 120)
    folder.mkdir()
    (folder / "socket").touch()
    async with server(folder / "socket"):
        assert (folder / "socket").is_socket()
