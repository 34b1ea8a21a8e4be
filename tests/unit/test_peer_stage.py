"""Chunks from other hosts in the fetch pipeline: who is asked, what is verified, and what failures do."""

import errno
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import trio
import trio.testing

from backend.cache import BlobCache, BlobShape, CachedBlob
from backend.fetch import ChunkFetcher
from backend.fetch_pool import open_fetch_pool
from backend.memory_blob import MemoryBlob, MemoryBlobReader, make_memory_blob
from backend.peers.client import PeerClient, PeerFailed, PeerRequest, Verdict
from backend.peers.hub import PeerHub
from backend.peers.limit_settings import LimitSettings
from backend.peers.piece import PieceSet
from backend.peers.wire import Answer, HolderChange, HostInfo, MemberChange
from backend.priority import FetchClass, Ticket
from rafs.codec import Compressor

MIB = 1 << 20
OWN = HostInfo("own", "http://10.0.0.1:1")
OTHER = HostInfo("other", "http://10.0.0.2:1")
THIRD = HostInfo("third", "http://10.0.0.3:1")
Give = Callable[[str, PeerRequest, memoryview], Awaitable[None]]


class FakeClient:
    """Gives what a test says."""

    def __init__(self, give: Give) -> None:
        self.asked: list[tuple[str, int]] = []
        self._give = give

    async def fetch(
        self, url: str, request: PeerRequest, buffer: memoryview, intake: object = None
    ) -> list[tuple[int, int]]:
        """As in `PeerClient`."""
        self.asked.append((url, request.offset // MIB))
        await self._give(url, request, buffer)
        return list(request.ranges)


class Rig:
    """One fetcher, another host that has everything, and an origin."""

    def __init__(
        self, blob: MemoryBlob, reader: MemoryBlobReader, fetcher: ChunkFetcher, hub: PeerHub
    ) -> None:
        self.blob, self.reader, self.fetcher, self.hub = blob, reader, fetcher, hub
        self.cached: CachedBlob = fetcher.cached

    def check(self, *chunks: int) -> None:
        """These chunks are in the cache, and right."""
        for index in chunks:
            assert self.cached.is_ready(index)
            assert bytes(self.cached.view(index * MIB, MIB)) == content(index)


def content(index: int) -> bytes:
    return random.Random(index).randbytes(MIB)


@asynccontextmanager
async def rig(
    tmp_path: Path, give: Give, count: int = 4, chunks: Sequence[bytes] = ()
) -> AsyncIterator[tuple[Rig, FakeClient]]:
    """A blob of `count` MiB, or of these chunks."""
    blob = make_memory_blob(list(chunks) or [content(index) for index in range(count)], Compressor.NONE)
    count = -(-blob.entry.uncompressed_size // MIB)
    shape = BlobShape(blob.entry.blob_id, blob.entry.uncompressed_size, blob.entry.chunk_count)
    cached = BlobCache(tmp_path).open(shape)
    reader, client = MemoryBlobReader(blob.data), FakeClient(give)
    hub = PeerHub(OWN, cast("PeerClient", client))
    try:
        async with open_fetch_pool() as pool:
            fetcher = ChunkFetcher(blob.entry, blob.meta, blob.digests, reader, cached, pool)
            async with hub.registered("image", tmp_path / "meta", fetcher) as access:
                have = PieceSet(count)
                have.update(range(count))
                holder = HolderChange(blob.entry.blob_id, OTHER.id, count, bytes(have))
                members = MemberChange(1, full=True, joined=[OWN, OTHER])
                hub.swarm.take(Answer("e", 1, 1.0, members, [holder]))
                fetcher.use_peers(access)
                yield Rig(blob, reader, fetcher, hub), client
    finally:
        cached.close()


async def gives(url: str, request: PeerRequest, buffer: memoryview) -> None:
    await trio.lowlevel.checkpoint()
    places = [place for offset, end in request.ranges for place in range(offset, end, MIB)]
    for number, place in enumerate(places):
        buffer[number * MIB : (number + 1) * MIB] = content(place // MIB)


async def test_another_host_gives_and_the_origin_is_not_asked(tmp_path: Path) -> None:
    async with rig(tmp_path, gives) as (r, client):
        await r.fetcher.ensure(0, 3)
        r.check(0, 1, 2, 3)
        assert {url for url, _ in client.asked} == {OTHER.url}
        assert r.reader.requests == []
        assert r.fetcher.statistics().bytes_from_peers == 4 * MIB
        assert r.hub.counters.origin_bytes == 0


async def test_a_prefetch_ends_although_a_piece_never_becomes_whole(tmp_path: Path) -> None:
    fetched: list[int] = []

    async def fetch_all_but_one(chunks: Sequence[int]) -> None:
        fetched.extend(chunks)
        await r.fetcher.ensure_chunks([chunk for chunk in chunks if chunk != 2], FetchClass.PREFETCH)

    async with rig(tmp_path, gives, 6) as (r, _):
        stage = r.fetcher._peers
        assert stage is not None
        with trio.fail_after(10):  # an image need not name all chunks of its blobs, and a disk may be full
            await stage.spread(fetch_all_but_one)
        assert sorted(fetched) == list(range(6))
        r.check(0, 1, 3, 4, 5)


async def test_what_a_host_gives_in_part_is_taken_and_the_rest_brought_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(tmp_path, gives, 6) as (r, client):
        await r.fetcher.ensure(1, 1)
        await r.fetcher.ensure(3, 3)
        whole = client.fetch

        async def in_part(*arguments: Any) -> list[tuple[int, int]]:
            return (await whole(*arguments))[:-1]

        monkeypatch.setattr(client, "fetch", in_part)
        portions = r.fetcher._peers
        assert portions is not None
        flights = [
            r.fetcher._flights.start(r.fetcher._extents.of(n), Ticket(FetchClass.PREFETCH)) for n in (0, 2, 4)
        ]
        left = await portions.bring(flights, Ticket(FetchClass.PREFETCH))
        r.check(0, 1, 2, 3)
        assert [flight.extent.chunks.start for flight in left] == [4]
        for flight in left:
            r.fetcher._settle(flight, [])


async def test_scattered_chunks_are_asked_for_with_one_request(tmp_path: Path) -> None:
    chunks = [random.Random(index).randbytes(4096) for index in range(200)]
    asked: list[PeerRequest] = []

    async def give(url: str, request: PeerRequest, buffer: memoryview) -> None:
        await trio.lowlevel.checkpoint()
        asked.append(request)
        at = 0
        for offset, end in request.ranges:
            for place in range(offset, end, 4096):
                buffer[at : at + 4096] = chunks[place // 4096]
                at += 4096

    async with rig(tmp_path, give, chunks=chunks) as (r, _):
        await r.fetcher.ensure_chunks(range(0, 200, 10), FetchClass.PREFETCH)
        assert [len(request.ranges) for request in asked] == [20]
        for index in range(0, 200, 10):
            assert bytes(r.cached.view(index * 4096, 4096)) == chunks[index]
        assert r.fetcher.statistics().bytes_from_peers == 20 * 4096


@pytest.mark.logs_warning
async def test_wrong_bytes_never_reach_the_cache(tmp_path: Path) -> None:
    async def lies(url: str, request: PeerRequest, buffer: memoryview) -> None:
        await gives(url, request, buffer)
        buffer[5] ^= 1

    async with rig(tmp_path, lies) as (r, client):
        await r.fetcher.ensure(0, 3)
        r.check(0, 1, 2, 3)
        assert r.hub.counters.wrong_bytes > 0
        assert not r.hub.swarm.health_of(OTHER.id).is_usable(trio.current_time())
        assert r.hub.bad_peers[0].host_id == OTHER.id
        asked = len(client.asked)
        await r.fetcher.ensure(0, 3)
        assert len(client.asked) == asked


@pytest.mark.parametrize("verdict", [Verdict.DEAD, Verdict.FAULTY])
async def test_a_host_that_fails_is_not_waited_for(tmp_path: Path, verdict: Verdict) -> None:
    async def fails(url: str, request: PeerRequest, buffer: memoryview) -> None:
        await trio.lowlevel.checkpoint()
        raise PeerFailed(url, verdict)

    async with rig(tmp_path, fails) as (r, _):
        with trio.fail_after(2):
            await r.fetcher.ensure(0, 3)
        r.check(0, 1, 2, 3)
        assert r.hub.counters.dead_peers > 0


async def test_encoded_bytes_are_asked_for_first_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backend.peers.encoded_choice.AUTO_SHARE", 2.0)
    asked: list[PeerRequest] = []

    async def give(url: str, request: PeerRequest, buffer: memoryview) -> None:
        await trio.lowlevel.checkpoint()
        asked.append(request)
        data = b"".join(r.blob.data[offset:end] for offset, end in request.ranges)
        buffer[:] = data

    async with rig(tmp_path, give) as (r, _):
        r.hub.swarm.members[OTHER.id] = msgspec.structs.replace(OTHER, keeps_encoded=True)
        await r.fetcher.ensure(0, 3)
        r.check(0, 1, 2, 3)
        assert all(request.is_encoded for request in asked)
        counters = r.hub.counters
        assert counters.peer_encoded_bytes == counters.peer_encoded_worth == counters.peer_bytes == 4 * MIB
        assert counters.peer_plain_bytes == 0


@pytest.mark.parametrize(
    "failure",
    [
        PeerFailed("url", Verdict.ABSENT),
        PeerFailed("url", Verdict.DEAD, "hung up", has_begun=True),
    ],
)
async def test_what_a_host_has_not_encoded_it_is_asked_for_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: PeerFailed
) -> None:
    """A host that broke off its answer, because it had the rest decoded only, was taken for dead."""
    monkeypatch.setattr("backend.peers.encoded_choice.AUTO_SHARE", 2.0)
    kinds: list[bool] = []

    async def give(url: str, request: PeerRequest, buffer: memoryview) -> None:
        kinds.append(request.is_encoded)
        if request.is_encoded:
            await trio.lowlevel.checkpoint()
            raise failure
        await gives(url, request, buffer)

    async with rig(tmp_path, give) as (r, _):
        r.hub.swarm.members[OTHER.id] = msgspec.structs.replace(OTHER, keeps_encoded=True)
        await r.fetcher.ensure(0, 0)
        await r.fetcher.ensure(3, 3)
        r.check(0, 3)
        assert kinds[:2] == [True, False]
        assert not any(kinds[2:])
        assert r.hub.counters.dead_peers == 0
        assert r.reader.requests == []


async def test_a_host_that_is_paused_is_left_alone_and_not_dead(tmp_path: Path) -> None:
    async def is_paused(url: str, request: PeerRequest, buffer: memoryview) -> None:
        await trio.lowlevel.checkpoint()
        raise PeerFailed(url, Verdict.PAUSED)

    async with rig(tmp_path, is_paused) as (r, client):
        with trio.fail_after(2):
            await r.fetcher.ensure(0, 0)
            r.check(0)
            await r.fetcher.ensure(3, 3)
        assert len(client.asked) == 1
        assert r.hub.counters.dead_peers == 0
        assert r.hub.swarm.holder_count(r.blob.entry.blob_id, 3) == 1  # it has it, all the same


async def test_nothing_is_asked_for_while_receiving_is_paused(tmp_path: Path) -> None:
    async with rig(tmp_path, gives) as (r, client):
        limits = r.fetcher._pool.limits
        limits.change(LimitSettings(host_down_bps=0))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.fetcher.ensure, 0, 3)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert (client.asked, r.reader.requests) == ([], [])
            limits.change(LimitSettings())
        r.check(0, 1, 2, 3)
        assert r.reader.requests == []


async def test_a_reader_that_joins_a_prefetch_costs_no_place(tmp_path: Path) -> None:
    """Its request was counted as one that nobody waits for, and never given back."""
    began, go_on = trio.Event(), trio.Event()

    async def waits(url: str, request: PeerRequest, buffer: memoryview) -> None:
        began.set()
        await go_on.wait()
        await gives(url, request, buffer)

    async with rig(tmp_path, waits) as (r, _), trio.open_nursery() as nursery:
        nursery.start_soon(r.fetcher.ensure, 0, 3, FetchClass.PREFETCH)
        await began.wait()
        nursery.start_soon(r.fetcher.ensure, 0, 3)
        await trio.testing.wait_all_tasks_blocked()
        go_on.set()
        await r.fetcher.ensure(0, 3)
        r.check(0, 1, 2, 3)
        assert r.hub.queue.asked == 0
        assert r.hub.swarm.health_of(OTHER.id).requests == 0


async def test_a_reader_hurries_what_another_image_is_bringing(tmp_path: Path) -> None:
    """It waited for a prefetch of the same blob as if nobody did."""
    began, go_on = trio.Event(), trio.Event()

    async def waits(url: str, request: PeerRequest, buffer: memoryview) -> None:
        began.set()
        await go_on.wait()
        await gives(url, request, buffer)

    async with rig(tmp_path, waits) as (r, _), open_fetch_pool() as pool, trio.open_nursery() as nursery:
        blob = r.blob
        second = ChunkFetcher(
            blob.entry, blob.meta, blob.digests, MemoryBlobReader(blob.data), r.cached, pool
        )
        nursery.start_soon(r.fetcher.ensure, 0, 0, FetchClass.PREFETCH)
        await began.wait()
        nursery.start_soon(second.ensure, 0, 0)
        await trio.testing.wait_all_tasks_blocked()
        (flight,) = r.fetcher._flights
        assert flight.ticket.fetch_class is FetchClass.ON_DEMAND
        go_on.set()
        await second.ensure(0, 0)
        r.check(0)


@pytest.mark.logs_warning
async def test_a_full_disk_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: CachedBlob, offset: int, parts: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(CachedBlob, "store", full)
    async with rig(tmp_path, gives, count=1) as (r, _):
        assert await r.fetcher.ensure(0, 0) == {0: content(0)}
        assert not r.cached.is_ready(0)


async def test_a_fetch_that_is_given_up_leaves_nothing_behind(tmp_path: Path) -> None:
    async def never(url: str, request: PeerRequest, buffer: memoryview) -> None:
        await trio.sleep_forever()

    async with rig(tmp_path, never) as (r, _):
        with trio.move_on_after(0.05):
            await r.fetcher.ensure(0, 3)
    assert r.cached.arriving == {}
    assert r.hub.queue.asked == 0


@pytest.mark.parametrize("second_wins", [True, False])
async def test_a_slow_host_is_hedged_and_the_first_answer_wins(tmp_path: Path, second_wins: bool) -> None:
    second_asked = trio.Event()
    asked_at: list[float] = []
    given_up: list[str] = []

    async def give(url: str, request: PeerRequest, buffer: memoryview) -> None:
        asked_at.append(trio.current_time())
        is_second = len(asked_at) == 2
        if is_second:
            second_asked.set()
        if is_second == second_wins:
            await second_asked.wait()
            await gives(url, request, buffer)
            return
        buffer[: MIB // 2] = bytes(MIB // 2)
        try:
            await trio.sleep_forever()
        finally:
            buffer[:] = bytes(len(buffer))  # what had arrived when it was given up
            given_up.append(url)

    async with rig(tmp_path, give) as (r, client):
        swarm, blob_id = r.hub.swarm, r.blob.entry.blob_id
        have = PieceSet(4)
        have.update(range(4))
        members = MemberChange(2, full=True, joined=[OWN, OTHER, THIRD])
        holders = [HolderChange(blob_id, host.id, 4, bytes(have)) for host in (OTHER, THIRD)]
        swarm.take(Answer("e", 2, 1.0, members, holders))
        for _ in range(20):
            swarm.hedge.note(0.2)
        after_s = swarm.hedge.after_s()
        with trio.fail_after(10):
            assert await r.fetcher.ensure(0, 0) is not None
        r.check(0)
        urls = [url for url, _ in client.asked]
        assert sorted(urls) == [OTHER.url, THIRD.url]
        assert asked_at[1] - asked_at[0] >= after_s
        assert given_up == [urls[0 if second_wins else 1]]
        assert r.reader.requests == []
        assert (r.hub.counters.hedges, r.hub.counters.dead_peers, r.hub.counters.wrong_bytes) == (1, 0, 0)
        assert r.hub.counters.peer_bytes == MIB
        assert [swarm.health_of(host.id).in_flight for host in (OTHER, THIRD)] == [0, 0]
        assert r.hub.queue.asked == 0
    assert r.cached.arriving == {}
