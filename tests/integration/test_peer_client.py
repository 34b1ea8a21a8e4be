"""The client of the peer cache against the real upload server, and against hosts that do it wrong."""

import random
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from backend.peers.client import STALL_S, PeerClient, PeerFailed, PeerRequest, Verdict
from backend.peers.reach import PATIENCE_S, reach
from backend.peers.served import Busy, Paused, Redirect
from backend.peers.server_options import ServerOptions
from backend.priority import FetchClass
from tests.peer_host import BLOB_ID, FillingFile, TestAdmission, serving

CONTENT = random.Random(1).randbytes(3 << 20)


def wants(offset: int, *, may_fetch: bool = False) -> PeerRequest:
    return PeerRequest(BLOB_ID, offset, "host/image@sha256:0", FetchClass.ON_DEMAND, may_fetch)


async def fetched(client: PeerClient, url: str, offset: int, size: int, *, may_fetch: bool = False) -> bytes:
    buffer = bytearray(size)
    await client.fetch(url, wants(offset, may_fetch=may_fetch), memoryview(buffer))
    return bytes(buffer)


async def verdict(client: PeerClient, url: str, *, may_fetch: bool = False) -> PeerFailed:
    with pytest.raises(PeerFailed) as caught:
        await fetched(client, url, 0, 1000, may_fetch=may_fetch)
    return caught.value


async def test_ranges_arrive_on_one_kept_connection(tmp_path: Path) -> None:
    client = PeerClient("http://127.0.0.1:9")
    async with serving(FillingFile(tmp_path / "file", CONTENT)) as server:
        for offset, size in ((0, 1), (5, 4096), (1 << 20, 2 << 20), (len(CONTENT) - 10, 10)):
            assert await fetched(client, server.url(""), offset, size) == CONTENT[offset : offset + size]
        assert server.counters.connections_made == 1
        (asked,) = {request.peer_url for request in server.shelf.asked}
        assert asked == "http://127.0.0.1:9"
        client.close()


def scattered(count: int, *, is_encoded: bool = False) -> PeerRequest:
    ranges = tuple((n << 14, (n << 14) + 1000 + n) for n in range(count))
    request = wants(0)
    return replace(request, ranges=ranges, is_encoded=is_encoded)


@pytest.mark.parametrize("is_encoded", [False, True])
async def test_scattered_ranges_come_with_one_request(tmp_path: Path, *, is_encoded: bool) -> None:
    client, request = PeerClient(), scattered(100, is_encoded=is_encoded)
    async with serving(FillingFile(tmp_path / "file", CONTENT)) as server:
        for _ in range(2):  # the connection is kept
            buffer = bytearray(sum(end - offset for offset, end in request.ranges))
            assert await client.fetch(server.url(""), request, memoryview(buffer)) == list(request.ranges)
            assert bytes(buffer) == b"".join(CONTENT[offset:end] for offset, end in request.ranges)
        assert (server.counters.requests, server.counters.connections_made) == (2, 1)
        assert {asked.kind for asked in server.shelf.asked} == {"encoded" if is_encoded else "decoded"}
        client.close()


async def test_of_scattered_ranges_one_is_not_there(tmp_path: Path) -> None:
    client, file = PeerClient(), FillingFile(tmp_path / "file", CONTENT, whole=False)
    file.land(0, 100_000)
    async with serving(file) as server:
        with pytest.raises(PeerFailed) as caught:
            await client.fetch(server.url(""), scattered(10), memoryview(bytearray(20_000)))
        assert caught.value.verdict is Verdict.ABSENT
        client.close()


async def test_a_connection_that_was_closed_meanwhile_is_made_again(tmp_path: Path) -> None:
    client = PeerClient()
    options = ServerOptions(idle_timeout_s=0.3)  # a new connection may wait a while for its request, too
    async with serving(FillingFile(tmp_path / "file", CONTENT), options=options) as server:
        for _ in range(2):
            assert await fetched(client, server.url(""), 0, 100) == CONTENT[:100]
            await trio.sleep(0.8)  # more than what the server waits for
        assert server.counters.connections_made == 2
        client.close()


async def test_what_a_host_says_instead(tmp_path: Path) -> None:
    client, admission = PeerClient(), TestAdmission()
    file = FillingFile(tmp_path / "file", CONTENT, whole=False)
    async with serving(file, admission=admission) as server:
        url = server.url("")
        assert (await verdict(client, url)).verdict is Verdict.ABSENT
        file.land(0, len(CONTENT))
        admission.answer = Busy(0.25)
        busy = await verdict(client, url)
        assert (busy.verdict, busy.retry_after_s) == (Verdict.BUSY, 0.25)
        admission.answer = Redirect("http://10.0.0.9:1")
        moved = await verdict(client, url)
        assert (moved.verdict, moved.location) == (Verdict.MOVED, "http://10.0.0.9:1")
        admission.answer = Paused()
        assert (await verdict(client, url)).verdict is Verdict.PAUSED
        assert server.refused["paused"] == 1
        client.close()


async def test_an_owner_passes_on_what_arrives(tmp_path: Path) -> None:
    client = PeerClient()
    file = FillingFile(tmp_path / "file", CONTENT, whole=False)
    got: list[bytes] = []

    async def ask() -> None:
        got.append(await fetched(client, server.url(""), 0, 2 << 20, may_fetch=True))

    async with serving(file) as server:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            for part in range(4):
                await trio.sleep(0.05)
                assert not got
                file.land(part << 19, (part + 1) << 19)
        assert got == [CONTENT[: 2 << 20]]
        client.close()


async def test_a_body_that_ends_early_is_no_answer(tmp_path: Path) -> None:
    client = PeerClient()
    file = FillingFile(tmp_path / "file", CONTENT, whole=False)
    file.land(0, 500)
    async with serving(file) as server:

        async def die_soon() -> None:
            await trio.sleep(0.05)
            file.die()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(die_soon)
            assert (await verdict(client, server.url(""), may_fetch=True)).verdict is Verdict.DEAD
    client.close()


Behaviour = Callable[[trio.SocketStream], Awaitable[None]]


async def hangs_up(stream: trio.SocketStream) -> None:
    await stream.receive_some()


async def talks_nonsense(stream: trio.SocketStream) -> None:
    await stream.receive_some()
    await stream.send_all(b"\x00\x01\x02 hello\r\n\r\n")


async def sends_another_range(stream: trio.SocketStream) -> None:
    await stream.receive_some()
    head = b"HTTP/1.1 206 P\r\nContent-Range: bytes 1-1000/2000\r\nContent-Length: 1000\r\n\r\n"
    await stream.send_all(head + bytes(1000))


async def sends_everything(stream: trio.SocketStream) -> None:
    await stream.receive_some()
    await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + bytes(2000))


async def sends_parts_that_nobody_asked_for(stream: trio.SocketStream) -> None:
    await stream.receive_some()
    body = b"\r\n--b\r\nContent-Range: bytes 5-9/2000\r\n\r\nhello\r\n--b--\r\n"
    head = b"HTTP/1.1 206 P\r\nContent-Type: multipart/byteranges; boundary=b\r\nContent-Length: %d\r\n\r\n"
    await stream.send_all(head % len(body) + body)


async def sends_endless_parts(stream: trio.SocketStream) -> None:
    await stream.receive_some()
    kind = b"Content-Type: multipart/byteranges; boundary=b\r\n"
    await stream.send_all(b"HTTP/1.1 206 P\r\n" + kind + b"Content-Length: 10000000000\r\n\r\n")


async def has_an_endless_head(stream: trio.SocketStream) -> None:
    await stream.receive_some()
    await stream.send_all(b"HTTP/1.1 206 P\r\n" + b"X: " + b"y" * 40_000)


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [
        (hangs_up, Verdict.DEAD),
        (talks_nonsense, Verdict.DEAD),
        (has_an_endless_head, Verdict.DEAD),
        (sends_another_range, Verdict.FAULTY),
        (sends_everything, Verdict.FAULTY),
        (sends_parts_that_nobody_asked_for, Verdict.FAULTY),
        (sends_endless_parts, Verdict.FAULTY),
    ],
)
async def test_hosts_that_do_it_wrong(behaviour: Behaviour, expected: Verdict) -> None:
    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            await behaviour(stream)

    client = PeerClient()
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, handle, [listener])
        url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        with trio.fail_after(5):
            assert (await verdict(client, url)).verdict is expected
        nursery.cancel_scope.cancel()
    client.close()


async def test_nobody_there_is_known_within_a_second() -> None:
    with socket.socket() as bound:  # bound, not listening: refused
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with trio.fail_after(0.5):
            assert (await verdict(PeerClient(), url)).verdict is Verdict.DEAD


async def test_a_full_backlog_is_like_a_dead_host() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        port = listener.getsockname()[1]
        kept = [await reach("127.0.0.1", port)]

        async def fill() -> None:
            for _ in range(4):
                kept.append(await reach("127.0.0.1", port))

        since = trio.current_time()
        with pytest.raises(TimeoutError):
            await fill()
        assert trio.current_time() - since < 2 * PATIENCE_S
        for each in kept:
            each.close()


class Late(trio.abc.Instrument):
    """Something else has the processor for a while, each time that a connection is about to be tried."""

    def __init__(self, times: int) -> None:
        self.times = times

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        if task.name.endswith("attempt") and self.times:
            self.times -= 1
            time.sleep(PATIENCE_S + 0.2)  # the loop stands still, as on a machine without a free processor


async def test_a_host_is_not_dead_because_this_one_was_late() -> None:
    """Found where eight hosts shared two processors: each took some of the others for dead."""
    client = PeerClient()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        late = Late(1)
        trio.lowlevel.add_instrument(late)
        try:
            assert await client.is_alive(url)
        finally:
            trio.lowlevel.remove_instrument(late)
    assert late.times == 0
    assert client.late_verdicts == 1


def stand_still() -> None:
    """Nothing of this process runs, as on a machine without a free processor."""
    time.sleep(STALL_S + 0.2)


async def test_silence_while_this_host_was_late_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []

    async def look(host: str, port: int, on_late: object) -> bool:
        looks.append(host)
        await trio.lowlevel.checkpoint()
        return False

    monkeypatch.setattr("backend.peers.client.is_reachable", look)
    client, file = PeerClient(), FillingFile(tmp_path / "file", CONTENT, whole=False)
    async with serving(file) as server, trio.open_nursery() as nursery:
        nursery.start_soon(partial(fetched, client, server.url(""), 0, 1000, may_fetch=True))
        await trio.testing.wait_all_tasks_blocked(0.01)
        for _ in range(3):
            stand_still()
            await trio.testing.wait_all_tasks_blocked()
        file.land(0, 1000)
    assert not looks
    assert client.late_verdicts >= 3
    client.close()


async def test_one_of_many_stalled_requests_looks_whether_the_host_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[int] = []

    async def look(host: str, port: int, on_late: object) -> bool:
        looks.append(port)
        await trio.sleep(0.05)
        return port == 1

    monkeypatch.setattr("backend.peers.client.is_reachable", look)
    client, found = PeerClient(), dict[str, list[bool]]()

    async def ask(url: str) -> None:
        found.setdefault(url, []).append(await client.is_alive(url))

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(ask, "http://10.0.0.1:1")
            nursery.start_soon(ask, "http://10.0.0.1:2")
    assert sorted(looks) == [1, 2]
    assert found == {"http://10.0.0.1:1": [True] * 8, "http://10.0.0.1:2": [False] * 8}
