"""The scheduler on a socket: what it holds back, and what it does with clients that mean harm."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import trio

from backend.json_api import BODY_MAX_BYTES, HEAD_MAX_BYTES
from backend.peers.event_server import Answered, EventServer
from backend.peers.scheduler import Scheduler
from backend.peers.scheduler_state import SchedulerState
from backend.peers.wire import Announce, Answer, BadPeer, HostInfo, Terms

OWN = HostInfo("one", "http://127.0.0.1:8771")


@asynccontextmanager
async def scheduler() -> AsyncIterator[tuple[Scheduler, int]]:
    made = Scheduler(SchedulerState("epoch"), clock=trio.current_time)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.serve, listener)
        yield made, listener.getsockname()[1]
        nursery.cancel_scope.cancel()


def request(method: str, target: str, body: bytes = b"") -> bytes:
    return f"{method} {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def announcement(**more: object) -> bytes:
    return request("POST", "/v1/announce", msgspec.json.encode(Announce(OWN, **more)))  # type: ignore[arg-type]


async def answer_on(stream: trio.SocketStream) -> tuple[int, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        part = await stream.receive_some()
        assert part, "hung up"
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += await stream.receive_some()
    assert len(body) == length
    return int(head.split()[1]), body


async def rest_of(stream: trio.SocketStream) -> bytes:
    data = b""
    try:
        async for part in stream:
            data += part
    except trio.BrokenResourceError:
        pass
    return data


async def test_requests_in_pieces_and_in_one_piece_are_answered_in_order() -> None:
    async with scheduler() as (_, port), await trio.open_tcp_stream("127.0.0.1", port) as stream:
        for start in range(0, len(sent := announcement()), 40):
            await stream.send_all(sent[start : start + 40])
            await trio.sleep(0.002)
        status, body = await answer_on(stream)
        assert (status, msgspec.json.decode(body, type=Answer).sequence) == (200, 1)
        last = b"GET /v1/terms HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        await stream.send_all(
            announcement() + request("GET", "/nothing") + request("PUT", "/v1/terms") + last
        )
        statuses = [part.split()[0] for part in (await rest_of(stream)).split(b"HTTP/1.1 ")[1:]]
        assert statuses == [b"200", b"404", b"405", b"200"]


async def test_a_change_of_terms_is_told_at_once_to_all_who_wait() -> None:
    async with scheduler() as (made, port):
        streams = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(20)]
        for stream in streams:
            await stream.send_all(request("GET", "/v1/terms?seen=0"))
        await streams[0].aclose()  # who has gone meanwhile harms nobody
        async with await trio.open_tcp_stream("127.0.0.1", port) as admin:
            await admin.send_all(announcement())
            await answer_on(admin)
            await admin.send_all(request("POST", "/v1/switch", b'{"peers_enabled":false}'))
            assert (await answer_on(admin))[0] == 200
        for stream in streams[1:]:
            terms = msgspec.json.decode((await answer_on(stream))[1], type=Terms)
            assert not terms.peers_enabled
            assert terms.version == made.state.terms.version > 0
            await stream.aclose()
        made.take_terms(Terms(1))  # older than what is known
        assert not made.state.terms.peers_enabled
        made.take_terms(Terms(made.state.terms.version + 1))
        assert made.state.terms.peers_enabled


async def test_hostile_clients_are_dropped_and_others_served() -> None:
    too_long = b"POST /v1/announce HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (BODY_MAX_BYTES + 1)
    elsewhere = msgspec.json.encode(Announce(HostInfo("two", "http://10.9.9.9:1")))
    cases = [
        (b"\x16\x03\x01 hello\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nA: " + b"x" * HEAD_MAX_BYTES, b"431"),
        (too_long, b"413"),
        (request("POST", "/v1/announce", b"{"), b"400"),
        (request("POST", "/v1/announce", elsewhere), b"422"),
    ]
    async with scheduler() as (made, port):
        for sent, status in cases:
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(sent)
                assert (await stream.receive_some()).split()[1] == status
        assert made.state.refused == 1
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(announcement())
            assert (await answer_on(stream))[0] == 200
        assert list(made.state.hosts) == ["one"]


async def test_slow_and_silent_clients_are_dropped(autojump_clock: object) -> None:
    async with scheduler() as (_, port):
        for begun in (b"", b"POST /v1/ann", announcement()[:-3]):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                if begun:
                    await stream.send_all(begun)
                assert await rest_of(stream) == b""


async def test_nobody_at_another_address_takes_the_id_of_a_host() -> None:
    """One could say goodbye for another host, or have those that look for it come to itself."""
    of_another = {"host": HostInfo("one", "http://127.0.0.2:1")}
    async with scheduler() as (made, port):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(announcement())
            assert (await answer_on(stream))[0] == 200
        for more in ({}, {"is_leaving": True}):
            body = msgspec.json.encode(Announce(**of_another, **more))  # type: ignore[arg-type]
            with trio.socket.socket() as other:
                await other.bind(("127.0.0.2", 0))
                await other.connect(("127.0.0.1", port))
                stream = trio.SocketStream(other)
                await stream.send_all(request("POST", "/v1/announce", body))
                status, said = await answer_on(stream)
                assert (status, b"one of that name at 127.0.0.1" in said) == (422, True)
        assert {host.info.url for host in made.state.hosts.values()} == {OWN.url}
        assert made.state.refused == 2


async def test_one_machine_with_many_ids_bans_nobody_without_certificates() -> None:
    async def tell(port: int, name: str, address: str, **more: object) -> Answer:
        stream = await trio.open_tcp_stream("127.0.0.1", port, local_address=address)
        async with stream:
            announce = Announce(HostInfo(name, f"http://{address}:8771"), **more)  # type: ignore[arg-type]
            await stream.send_all(request("POST", "/v1/announce", msgspec.json.encode(announce)))
            status, body = await answer_on(stream)
            assert status == 200
            return msgspec.json.decode(body, type=Answer)

    accusation = [BadPeer("honest", "b" * 64)]
    async with scheduler() as (_, port):
        await tell(port, "honest", "127.0.0.1")
        for name in ("one", "two", "three"):
            answer = await tell(port, name, "127.0.0.2", bad_peers=accusation)
            assert answer.banned == []
        answer = await tell(port, "four", "127.0.0.3", bad_peers=accusation)
        assert answer.banned == ["honest"]


async def test_very_many_requests_in_one_go_are_answered_one_after_the_other() -> None:
    count, data = 2000, b""
    async with (
        scheduler() as (_, port),
        await trio.open_tcp_stream("127.0.0.1", port) as stream,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(stream.send_all, request("GET", "/nothing") * count)
        with trio.fail_after(20):
            while data.count(b"HTTP/1.1 404") < count:
                part = await stream.receive_some()
                assert part, "hung up"
                data += part


async def test_a_large_last_answer_comes_whole_to_who_reads_late() -> None:
    body = bytes(8 << 20)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    server = EventServer(listener, lambda *_: Answered(200, body), connections_max=4, clock=trio.current_time)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run)
        async with await trio.open_tcp_stream(*listener.getsockname()) as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            await trio.sleep(0.3)
            answer = await rest_of(stream)
        nursery.cancel_scope.cancel()
    assert answer.partition(b"\r\n\r\n")[2] == body
