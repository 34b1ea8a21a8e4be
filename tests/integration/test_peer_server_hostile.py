"""Clients of the upload server that are slow, greedy, broken or gone are counted; nobody else suffers."""

import errno
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from backend.peers.served import BlobRequest
from backend.peers.server_options import ServerOptions
from tests.peer_host import (
    DECODED,
    ENCODED,
    Client,
    FillingFile,
    Serving,
    TestAdmission,
    TestShelf,
    client_of,
    random_file,
    request,
    serving,
)

SIZE = 8 << 20
SOON_S = 0.15
QUICK = ServerOptions(
    head_timeout_s=SOON_S,
    idle_timeout_s=SOON_S,
    slice_timeout_s=SOON_S,
    first_byte_timeout_s=SOON_S,
    arrival_timeout_s=SOON_S,
)


@pytest.fixture
def file(tmp_path: Path) -> FillingFile:
    return random_file(tmp_path / "blob", SIZE)[0]


@asynccontextmanager
async def undisturbed(server: Serving) -> AsyncIterator[None]:
    """Another client is served before, while and after the block does its worst."""
    async with client_of(server) as other:
        assert (await other.get("/healthy")).status == 200
        yield
    async with client_of(server) as other:
        assert len((await other.get(DECODED, "Range: bytes=0-99999")).body) == 100000


async def ended(client: Client) -> bytes:
    """What the server still says before it ends the connection, reset or not."""
    with trio.fail_after(5):
        try:
            return await client.rest()
        except trio.BrokenResourceError:
            return b""


async def counted(server: Serving, reason: str, count: int = 1) -> None:
    """Returns when so many were counted."""
    with trio.fail_after(5):
        while server.refused.get(reason, 0) < count:
            await trio.lowlevel.checkpoint()
    assert server.refused[reason] == count


async def _send_for_ever(client: Client, data: bytes) -> None:
    with trio.fail_after(10):
        while True:
            await client.send(data)


async def _never(shelf: TestShelf, wanted: BlobRequest) -> None:
    await trio.sleep_forever()


async def test_a_head_that_trickles_has_a_deadline_in_all(file: FillingFile) -> None:
    async with serving(file, options=QUICK) as server, undisturbed(server), client_of(server) as client:
        with trio.move_on_after(5) as patience:
            try:
                for byte in request(DECODED) * 100:
                    await client.send(bytes([byte]))
                    with trio.move_on_after(SOON_S / 20):
                        if not await client.stream.receive_some(1):
                            break
            except trio.BrokenResourceError:
                pass
        assert not patience.cancelled_caught
        await counted(server, "head not complete in time")


async def test_a_client_that_says_nothing_is_not_waited_for(file: FillingFile) -> None:
    async with serving(file, options=QUICK) as server, client_of(server) as client:
        assert await ended(client) == b""
        await counted(server, "head not complete in time")


async def test_an_idle_connection_is_closed(file: FillingFile) -> None:
    async with serving(file, options=QUICK) as server, client_of(server) as client:
        assert (await client.get("/healthy")).status == 200
        assert await ended(client) == b""
        await counted(server, "idle for too long")


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70000, 431, "head too large"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: x\r\n" * 12000, 431, "head too large"),
        (b"GET /" + b"a" * 70000, 431, "head too large"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(200), 400, "not HTTP"),
        (b"\r\n\r\n\r\n", 400, "not HTTP"),
        (b"GET\r\n\r\n", 400, "not HTTP"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "not HTTP"),  # no Host
        (b"GET / HTTP/1.1\r\nHost: a\r\nA b: c\r\n\r\n", 400, "not HTTP"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nA: b\0c\r\n\r\n", 400, "not HTTP"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n", 400, "not HTTP"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", 400, "not HTTP"),
        (request(DECODED, "Content-Length: 5") + b"12345", 413, "request with a body"),
        (request(DECODED, "Content-Length: 99999999999"), 413, "request with a body"),
        (
            request(DECODED, "Transfer-Encoding: chunked") + b"5\r\n12345\r\n0\r\n\r\n",
            413,
            "request with a body",
        ),
        (request(DECODED, "Content-Length: 5", method="POST"), 413, "request with a body"),
    ],
)
async def test_what_is_no_request_ends_the_connection(
    file: FillingFile, data: bytes, status: int, reason: str
) -> None:
    async with serving(file) as server, undisturbed(server), client_of(server) as client:
        await client.send(data)
        assert (await client.reply()).status == status
        assert await ended(client) == b""
        await counted(server, reason)


@pytest.mark.parametrize("head", ["CONNECT a:1", "OPTIONS *", "PUT /healthy", f"TRACE {DECODED}"])
async def test_other_methods_are_refused(file: FillingFile, head: str) -> None:
    async with serving(file) as server, undisturbed(server), client_of(server) as client:
        await client.send(
            f"{head} HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n".encode()
        )
        assert (await client.reply()).status == 405
        await counted(server, "method not allowed")
        assert await ended(client) == b""


async def test_garbage_after_a_request_ends_the_connection_after_its_answer(file: FillingFile) -> None:
    async with serving(file) as server, undisturbed(server), client_of(server) as client:
        await client.send(request(DECODED, "Range: bytes=0-9") + b"\0" * 100 + b"\r\n\r\n")
        assert (await client.reply()).status == 206
        assert (await client.reply()).status == 400
        assert await ended(client) == b""
        await counted(server, "not HTTP")


async def test_a_garbage_stream_without_end_is_not_read(file: FillingFile) -> None:
    async with serving(file) as server, undisturbed(server), client_of(server) as client:
        with pytest.raises(trio.BrokenResourceError):
            await _send_for_ever(client, b"x" * 65536)


async def test_connections_are_limited_for_one_peer(file: FillingFile) -> None:
    options = ServerOptions(connections_of_peer_max=3)
    async with serving(file, options=options) as server:
        async with client_of(server) as first, client_of(server) as second, client_of(server) as third:
            for client in (first, second, third):
                assert (await client.get("/healthy")).status == 200
            async with client_of(server) as fourth:
                assert (await fourth.reply()).status == 503
                assert await ended(fourth) == b""
            assert (await first.get("/healthy")).status == 200
        await counted(server, "too many connections of one peer")
        with trio.fail_after(5):
            while server.counters.connections:
                await trio.lowlevel.checkpoint()
        async with client_of(server) as client:
            assert (await client.get("/healthy")).status == 200


async def test_connections_are_limited_in_all(file: FillingFile) -> None:
    async with serving(file, options=ServerOptions(connections_max=2)) as server:
        async with client_of(server) as first, client_of(server) as second:
            assert (await first.get("/healthy")).status == (await second.get("/healthy")).status == 200
            async with client_of(server) as third:
                assert (await third.reply()).status == 503
        await counted(server, "too many connections")


@pytest.mark.logs_warning
async def test_a_lack_of_descriptors_passes(
    file: FillingFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    accept, failures = socket.socket.accept, [errno.EMFILE, errno.EMFILE, errno.ECONNABORTED]

    def accept_in_the_end(listener: socket.socket) -> tuple[socket.socket, Any]:
        if failures:
            raise OSError(failures.pop(0), "of a test")
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", accept_in_the_end)
    async with serving(file) as server, client_of(server) as client:
        assert (await client.get("/healthy")).status == 200
    assert caplog.text.count("peers cannot connect") == 1


@pytest.mark.parametrize("wanted", ["0-", f"{SIZE - 100}-{SIZE - 91},{SIZE - 10}-"])
async def test_a_file_that_is_shorter_than_it_should_be_tears_the_body(
    file: FillingFile, tmp_path: Path, wanted: str
) -> None:
    os.truncate(tmp_path / "blob", SIZE // 2)
    async with serving(file) as server, client_of(server) as client:
        await client.send(request(DECODED, f"Range: bytes={wanted}"))
        with pytest.raises((trio.BrokenResourceError, EOFError)):
            await client.reply()
        await counted(server, "body torn")


async def test_a_client_that_stops_reading_is_dropped(file: FillingFile) -> None:
    admission = TestAdmission()
    async with (
        serving(file, options=QUICK, admission=admission, send_buffer_bytes=65536) as server,
        undisturbed(server),
        client_of(server, receive_buffer_bytes=65536) as client,
    ):
        await client.send(request(DECODED))
        assert (await client.head())[0] == 200
        await counted(server, "client stopped reading")
        await admission.ended.wait()
        assert admission.over[0][2] < SIZE
        with pytest.raises((trio.BrokenResourceError, EOFError)):
            await client.take(SIZE)


async def test_a_client_that_sends_requests_and_reads_no_answer_is_dropped(file: FillingFile) -> None:
    async with (
        serving(file, options=QUICK, send_buffer_bytes=16384) as server,
        undisturbed(server),
        client_of(server, receive_buffer_bytes=16384) as client,
    ):
        with pytest.raises(trio.BrokenResourceError):
            await _send_for_ever(client, request("/healthy") * 100)
        await counted(server, "client stopped reading")


async def test_a_client_that_leaves_in_the_middle_of_a_body(file: FillingFile) -> None:
    admission = TestAdmission()
    async with serving(file, admission=admission) as server, undisturbed(server):
        async with client_of(server) as client:
            await client.send(request(DECODED))
            assert (await client.head())[0] == 200
            client.reset()
        await counted(server, "client has gone")
        await admission.ended.wait()
        assert len(admission.over) == 1


@pytest.mark.parametrize("there", [0, 100])
async def test_a_client_that_leaves_while_bytes_arrive_is_noticed(tmp_path: Path, there: int) -> None:
    file, _ = random_file(tmp_path / "blob", SIZE, whole=False)
    file.ready = [(0, there)]
    admission = TestAdmission()
    async with serving(file, admission=admission) as server:
        async with client_of(server) as client:
            await client.send(request(DECODED, "Nydus-Fetch: 1"))
            with trio.fail_after(5):
                while not file.waits:
                    await trio.lowlevel.checkpoint()
        await counted(server, "client has gone")
        assert admission.over == [(0, SIZE, there)]


async def test_bytes_that_do_not_arrive_in_time(tmp_path: Path) -> None:
    file, content = random_file(tmp_path / "blob", SIZE, whole=False)
    async with serving(file, options=QUICK) as server, client_of(server) as client:
        assert (await client.get(DECODED, "Nydus-Fetch: 1")).status == 503
        file.land(0, 100)
        await client.send(request(DECODED, "Nydus-Fetch: 1"))
        assert (await client.head())[0] == 200
        assert await client.take(100) == content[:100]
        await counted(server, "body torn")
        with pytest.raises((trio.BrokenResourceError, EOFError)):
            await client.take(1)


async def test_a_shelf_that_does_not_answer_in_time(
    file: FillingFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(file, options=QUICK) as server, undisturbed(server), client_of(server) as client:
        with monkeypatch.context() as patch:
            patch.setattr(TestShelf, "open", _never)
            assert (await client.get(DECODED)).status == 503


async def test_too_many_ranges_are_refused(file: FillingFile) -> None:
    async with serving(file) as server, undisturbed(server), client_of(server) as client:
        for wanted in (",".join(["0-"] * 257), "0-0," * 2000 + "5-6"):
            reply = await client.get(DECODED, f"Range: bytes={wanted}")
            assert (reply.status, reply.headers["content-range"]) == (416, f"bytes */{SIZE}")
        # As many as are allowed, all the same: the file once, not 256 times.
        reply = await client.get(ENCODED, f"Range: bytes={','.join(['0-'] * 256)}", method="HEAD")
        assert reply.headers["content-length"] == str(SIZE)


@pytest.mark.logs_warning
async def test_a_fault_of_ours_costs_one_connection(
    file: FillingFile, caplog: pytest.LogCaptureFixture
) -> None:
    async def pace() -> None:
        await trio.lowlevel.checkpoint()
        if len(server.paced) == 1:
            raise RuntimeError("a fault")

    async with serving(file, pace=pace) as server, undisturbed(server), client_of(server) as client:
        await client.send(request(DECODED))
        with pytest.raises((trio.BrokenResourceError, EOFError)):
            await client.reply()
        await counted(server, "fault of ours")
    assert "a fault" in caplog.text


async def test_one_slow_client_does_not_slow_another(file: FillingFile) -> None:
    async with serving(file) as server, client_of(server, receive_buffer_bytes=65536) as slow:
        await slow.send(request(DECODED))
        assert (await slow.head())[0] == 200
        async with client_of(server) as quick:
            with trio.fail_after(5):
                for _ in range(10):
                    assert len((await quick.get(DECODED)).body) == SIZE
