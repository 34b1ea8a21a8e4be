"""The fetch pipeline over a blob in memory: what is asked for, what is stored, and what failures do."""

import errno
import os
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing

from backend.cache import BlobCache, BlobShape, CachedBlob
from backend.contract import BackendError
from backend.decode import BlobUnsupported, ChunkInvalid
from backend.fetch import ChunkFetcher
from backend.fetch_pool import FetchOptions, open_fetch_pool
from backend.memory_blob import MemoryBlob, MemoryBlobReader, make_memory_blob
from backend.origin_stage import FetchFailed
from backend.priority import FetchClass
from rafs.blob_table import BlobFeatures
from rafs.codec import Compressor

MIB = 1 << 20


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def big_blob(count: int, size: int = MIB) -> MemoryBlob:
    return make_memory_blob([noise(size, i) for i in range(count)], Compressor.NONE)


class Rig:
    """One fetcher on a memory blob."""

    def __init__(self, blob: MemoryBlob, reader: MemoryBlobReader, fetcher: ChunkFetcher) -> None:
        self.blob, self.reader, self.fetcher = blob, reader, fetcher
        self.cached: CachedBlob = fetcher.cached

    def content(self, index: int) -> bytes:
        chunk = self.blob.meta.chunk(index)
        assert self.cached.is_ready(index)
        return bytes(self.cached.view(chunk.uncompressed_offset, chunk.uncompressed_size))


class InPlaceMemoryReader(MemoryBlobReader):
    """Keeps the `InPlaceReader` contract too, as a file of this machine does."""

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = await self.read_range(offset, len(buffer))


@asynccontextmanager
async def rig(
    tmp_path: Path,
    blob: MemoryBlob,
    options: FetchOptions | None = None,
    make_reader: Callable[[bytes], MemoryBlobReader] = MemoryBlobReader,
) -> AsyncIterator[Rig]:
    shape = BlobShape(blob.entry.blob_id, blob.entry.uncompressed_size, blob.entry.chunk_count)
    cached = BlobCache(tmp_path).open(shape)
    reader = make_reader(blob.data)
    try:
        async with open_fetch_pool(options) as pool:
            yield Rig(blob, reader, ChunkFetcher(blob.entry, blob.meta, blob.digests, reader, cached, pool))
    finally:
        cached.close()


@pytest.mark.parametrize("codec", list(Compressor))
async def test_chunks_arrive_decoded_and_verified(tmp_path: Path, codec: Compressor) -> None:
    chunks = [b"first " * 1000, noise(5000, 1), b"last"]
    async with rig(tmp_path, make_memory_blob(chunks, codec)) as r:
        assert await r.fetcher.ensure(0, 2) == {}
        assert [r.content(i) for i in range(3)] == chunks
        assert r.reader.requests == [(0, len(r.blob.data))]
        assert r.fetcher.statistics().chunks_stored == 3
        assert await r.fetcher.ensure(0, 2) == {}
        assert len(r.reader.requests) == 1


async def test_batch_chunks_come_and_are_stored_together(tmp_path: Path) -> None:
    groups: list[bytes | Sequence[bytes]] = [
        noise(300_000, 0),
        [b"a" * 10, b"b" * 5000, b"c"],
        noise(300_000, 1),
    ]
    async with rig(tmp_path, make_memory_blob(groups)) as r:
        await r.fetcher.ensure(2, 2)
        assert [r.content(i) for i in (1, 2, 3)] == [b"a" * 10, b"b" * 5000, b"c"]
        assert len(r.reader.requests) == 1
        assert not r.cached.is_ready(0)


async def test_chunks_that_the_image_does_not_name_are_left_alone(tmp_path: Path) -> None:
    """A dictionary image's batch, of which this image uses one chunk: the others are no fault."""
    batch: list[bytes | Sequence[bytes]] = [[b"used" * 100, b"foreign" * 100]]
    blob = make_memory_blob(batch)
    async with rig(tmp_path, replace(blob, digests=blob.digests[:1])) as r:
        assert await r.fetcher.ensure(0, 0) == {}
        assert r.content(0) == b"used" * 100
        assert not r.cached.is_ready(1)
        assert len(r.reader.requests) == 1
        assert r.fetcher.statistics().errors == 0


async def test_flush_at_the_end_marks_everything(tmp_path: Path) -> None:
    blob = big_blob(2)
    async with rig(tmp_path, blob) as r:
        await r.fetcher.ensure(0, 1)
    async with rig(tmp_path, blob) as r:
        assert r.cached.ready_count() == 2


async def test_flusher_marks_after_its_interval(tmp_path: Path, autojump_clock: object) -> None:
    blob = big_blob(1)
    async with rig(tmp_path, blob) as r:
        await r.fetcher.ensure(0, 0)
        await trio.sleep(FetchOptions().flush_interval_s + 1)  # of the mock clock
        await trio.testing.wait_all_tasks_blocked()
        while r.cached.unmarked_bytes:  # the flush is in a real thread
            await trio.lowlevel.checkpoint()
        other = BlobCache(tmp_path).open(r.cached.shape)
        assert other.is_ready(0)
        other.close()


async def test_flusher_does_not_wait_when_there_is_much(tmp_path: Path) -> None:
    async with rig(tmp_path, big_blob(1), FetchOptions(flush_interval_s=1e6, flush_bytes=MIB)) as r:
        await r.fetcher.ensure(0, 0)
        while r.cached.unmarked_bytes:
            await trio.lowlevel.checkpoint()


async def test_readers_of_one_chunk_share_one_request(tmp_path: Path) -> None:
    async with rig(tmp_path, big_blob(1)) as r:
        r.reader.hold()
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(r.fetcher.ensure, 0, 0)
            await r.reader.wait_requests(1)
            await trio.testing.wait_all_tasks_blocked()
            r.reader.release()
        assert len(r.reader.requests) == 1
        statistics = r.fetcher.statistics()
        assert (statistics.misses, statistics.waits) == (1, 4)


async def test_cancelled_reader_does_not_kill_the_fetch(tmp_path: Path) -> None:
    async with rig(tmp_path, big_blob(1)) as r:
        r.reader.hold()
        with trio.CancelScope() as first:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(r.fetcher.ensure, 0, 0)
                await r.reader.wait_requests(1)
                first.cancel()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.fetcher.ensure, 0, 0)
            await trio.testing.wait_all_tasks_blocked()
            r.reader.release()
        assert r.cached.is_ready(0)
        assert len(r.reader.requests) == 1


async def test_small_miss_takes_neighbours_along(tmp_path: Path) -> None:
    async with rig(tmp_path, make_memory_blob([noise(16384, i) for i in range(100)])) as r:
        await r.fetcher.ensure(50, 50)
        ready = [i for i in range(100) if r.cached.is_ready(i)]
        assert ready[0] == 50
        assert 200_000 < r.fetcher.statistics().bytes_fetched <= 256 << 10
        assert len(r.reader.requests) == 1
        await r.fetcher.ensure(99, 99)
        assert r.cached.is_ready(90)


async def test_small_miss_in_a_large_file_moves_one_chunk(tmp_path: Path) -> None:
    async with rig(tmp_path, big_blob(64)) as r:
        await r.fetcher.ensure(30, 30)
        await trio.testing.wait_all_tasks_blocked()
        assert r.fetcher.statistics().bytes_fetched == MIB


async def test_small_gaps_are_swallowed_and_runs_limited(tmp_path: Path) -> None:
    chunks = [noise(MIB, 0), noise(20_000, 1), noise(MIB, 2), noise(200_000, 3), noise(MIB, 4)]
    async with rig(tmp_path, make_memory_blob(chunks, Compressor.NONE)) as r:
        await r.fetcher.ensure_chunks([0, 2, 4])
        assert sorted(r.reader.requests) == [(0, 2 * MIB + 20_000), (2 * MIB + 220_000, MIB)]
        assert not r.cached.is_ready(1)
    async with rig(tmp_path / "runs", big_blob(20)) as r:
        await r.fetcher.ensure_chunks(range(20), FetchClass.PREFETCH)
        assert [length for _, length in sorted(r.reader.requests)] == [8 * MIB, 8 * MIB, 4 * MIB]


async def test_sequential_reader_finds_its_chunks_ready(tmp_path: Path) -> None:
    async with rig(tmp_path, big_blob(64, 256 << 10)) as r:
        misses = []
        for chunk in range(64):
            if not r.cached.is_ready(chunk):
                misses.append(chunk)
                await r.fetcher.ensure(chunk, chunk)
            r.fetcher.touch(chunk, chunk)
            await trio.testing.wait_all_tasks_blocked()
            while len(r.fetcher._flights):
                await trio.lowlevel.checkpoint()
        assert misses == [0, 1]
        assert len(r.reader.requests) < 30


async def test_readahead_of_well_compressed_data_is_bounded_too(tmp_path: Path) -> None:
    zeros = [bytes(MIB - i) for i in range(64)]
    async with rig(tmp_path, make_memory_blob(zeros)) as r:
        await r.fetcher.ensure(0, 0)
        first = [i for i in range(64) if r.cached.is_ready(i)][-1]
        await r.fetcher.ensure(first + 1, first + 1)
        await trio.testing.wait_all_tasks_blocked()
        while len(r.fetcher._flights):
            await trio.lowlevel.checkpoint()
        assert r.cached.ready_count() <= 2 * (first + 1) + 5


async def test_random_reader_gets_no_readahead(tmp_path: Path) -> None:
    async with rig(tmp_path, big_blob(64, 256 << 10)) as r:
        for chunk in (5, 20, 3, 40, 60, 11):
            await r.fetcher.ensure(chunk, chunk)
        assert r.cached.ready_count() == 6


async def test_small_chunks_that_lie_side_by_side_are_one_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100,000 small files would be 100,000 system calls. What lies between two chunks becomes zero."""
    chunks = [noise(5000 + number, number) for number in range(40)]
    pwritev, writes = os.pwritev, []

    def counted(fd: int, parts: Sequence[memoryview], offset: int) -> int:
        writes.append(offset)
        return pwritev(fd, parts, offset)

    async with rig(tmp_path, make_memory_blob(chunks, Compressor.NONE)) as r:
        os.pwrite(r.cached.descriptor, b"\xff" * 40 * 8192, 0)
        monkeypatch.setattr(os, "pwritev", counted)
        await r.fetcher.ensure(0, 39)
        assert writes == [0]
        assert [r.content(number) for number in range(40)] == chunks
        assert bytes(r.cached.read(5000, 8192 - 5000)) == bytes(8192 - 5000)


async def test_bytes_of_a_local_file_are_verified_and_asked_for_again(tmp_path: Path) -> None:
    """While its bytes are in use a run keeps its slot: the second request must not wait for that."""
    async with rig(tmp_path, big_blob(3), FetchOptions(1, 0), InPlaceMemoryReader) as r:
        r.reader.script = lambda number, offset, data: data if number else b"x" + data[1:]
        with trio.fail_after(10):
            await r.fetcher.ensure(0, 2)
        assert [r.content(number) for number in range(3)] == [noise(MIB, number) for number in range(3)]
        assert len(r.reader.requests) == 2
        assert r.fetcher.statistics().bytes_fetched == 4 * MIB


async def _until_ready(r: Rig, count: int) -> None:
    """A read returns when its own chunk is there; the rest of its window lands later."""
    with trio.fail_after(60):
        while r.cached.ready_count() < count:  # noqa: ASYNC110  # nobody tells
            await trio.sleep(0.01)


async def test_a_window_of_very_many_chunks_is_fetched_to_its_end(tmp_path: Path) -> None:
    """One look at the index covers 1,024 extents, and 1 MiB has more of these."""
    blob = make_memory_blob([noise(1000, number) for number in range(1600)], Compressor.NONE)
    async with rig(tmp_path, blob, make_reader=InPlaceMemoryReader) as r:
        await r.fetcher.ensure(0, 0)
        first_window = 256 * 1024 // 1000
        await _until_ready(r, first_window)
        await r.fetcher.ensure(first_window, first_window)
        await _until_ready(r, 2 * first_window + MIB // 1000)
        assert r.cached.ready_count() < 1600


async def test_a_large_window_does_not_stand_before_what_somebody_waits_for(tmp_path: Path) -> None:
    """Neither in the queue for the source nor in the one for the decoders."""
    async with rig(tmp_path, big_blob(60), FetchOptions(8, 4, decode_threads=1), InPlaceMemoryReader) as r:
        r.reader.hold()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.fetcher.ensure, 0, 49, FetchClass.READAHEAD)
            await r.reader.wait_requests(4)
            nursery.start_soon(r.fetcher.ensure, 59, 59)
            await r.reader.wait_requests(5)
            r.reader.release()
            await r.fetcher.ensure(59, 59)
            assert r.cached.ready_count() < 50


class SilentToken:
    """Notes who would have been woken."""

    def __init__(self) -> None:
        self.woken: list[object] = []

    def run_sync_soon(self, work: object, *chunks: object) -> None:
        self.woken.append(chunks)


async def test_only_hits_with_a_marker_wake_the_loop(tmp_path: Path) -> None:
    async with rig(tmp_path, big_blob(12)) as r:
        for number in range(2):
            await r.fetcher.ensure(number, number)
        (marked,) = r.fetcher.readahead.markers
        token = SilentToken()
        for number in range(marked + 1):
            r.fetcher.note_hit(number, number, cast(trio.lowlevel.TrioToken, token))
        assert token.woken == [(marked, marked)]
        assert r.fetcher.hits == marked + 1


async def test_wrong_bytes_are_asked_for_again(tmp_path: Path) -> None:
    async with rig(tmp_path, big_blob(3)) as r:
        r.reader.script = lambda number, offset, data: bytes(len(data)) if number == 0 else data
        await r.fetcher.ensure(1, 1)
        assert r.content(1) == noise(MIB, 1)
        assert len(r.reader.requests) == 2


async def test_wrong_bytes_twice_fail_that_chunk_only(tmp_path: Path) -> None:
    chunks = [noise(1000, i) for i in range(3)]

    def damage(number: int, offset: int, data: bytes) -> bytes:
        spoiled = bytearray(data)
        if offset <= 1500 < offset + len(data):
            spoiled[1500 - offset] ^= 1
        return bytes(spoiled)

    async with rig(tmp_path, make_memory_blob(chunks, Compressor.NONE)) as r:
        r.reader.script = damage
        with pytest.raises(ChunkInvalid, match="chunk 1 is not what the image names") as caught:
            await r.fetcher.ensure(0, 2)
        assert caught.value.errno == errno.EIO
        assert [r.cached.is_ready(i) for i in range(3)] == [True, False, True]
        assert r.fetcher.statistics().errors == 2
        with pytest.raises(ChunkInvalid):
            await r.fetcher.ensure(1, 1)
        await r.fetcher.ensure(0, 0)
        r.reader.script = lambda number, offset, data: data
        await r.fetcher.ensure(1, 1)
        assert r.content(1) == chunks[1]


async def test_undecodable_bytes_are_a_chunk_error(tmp_path: Path) -> None:
    async with rig(tmp_path, make_memory_blob([b"text" * 1000])) as r:
        r.reader.script = lambda number, offset, data: bytes(len(data))
        with pytest.raises(ChunkInvalid, match="does not decode"):
            await r.fetcher.ensure(0, 0)


async def test_source_error_reaches_every_waiter_and_is_not_remembered(tmp_path: Path) -> None:
    def fail(number: int, offset: int, data: bytes) -> bytes:
        if number == 0:
            raise BackendError(where="memory", why="gone")
        return data

    async with rig(tmp_path, big_blob(1)) as r:
        r.reader.script = fail
        with pytest.raises(BackendError, match="gone"):
            await r.fetcher.ensure(0, 0)
        await r.fetcher.ensure(0, 0)
        assert r.content(0) == noise(MIB, 0)


async def test_a_fault_of_ours_fails_the_read_and_leaves_the_mount(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(number: int, offset: int, data: bytes) -> bytes:
        raise ZeroDivisionError

    async with rig(tmp_path, big_blob(1)) as r:
        r.reader.script = fail
        with pytest.raises(FetchFailed):
            await r.fetcher.ensure(0, 0)
    assert "ZeroDivisionError" in caplog.text
    caplog.clear()


async def test_waiter_is_told_when_the_pool_goes_away(tmp_path: Path) -> None:
    outcome: list[BaseException] = []

    async def wait(fetcher: ChunkFetcher) -> None:
        try:
            await fetcher.ensure(0, 0)
        except FetchFailed as error:
            outcome.append(error)

    async with trio.open_nursery() as nursery, rig(tmp_path, big_blob(1)) as r:
        r.reader.hold()
        nursery.start_soon(wait, r.fetcher)
        await r.reader.wait_requests(1)
    assert len(outcome) == 1


@pytest.mark.logs_warning
async def test_full_disk_answers_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, parts: object, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with rig(tmp_path, big_blob(1)) as r:
        monkeypatch.setattr(os, "pwritev", full)
        for _ in range(2):
            assert await r.fetcher.ensure(0, 0) == {0: noise(MIB, 0)}
        assert not r.cached.is_ready(0)
        assert len(r.reader.requests) == 1
        monkeypatch.undo()
    async with rig(tmp_path, big_blob(1)) as r:
        assert r.cached.ready_count() == 0


async def test_on_demand_overtakes_prefetch(tmp_path: Path) -> None:
    async with rig(tmp_path, big_blob(40), FetchOptions(connections=2, reserved=1)) as r:
        r.reader.hold()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.fetcher.ensure_chunks, range(24), FetchClass.PREFETCH)
            await r.reader.wait_requests(1)
            nursery.start_soon(r.fetcher.ensure, 39, 39)
            await r.reader.wait_requests(2)
            assert r.reader.requests[1] == (39 * MIB, MIB)
            # A waiter lends its urgency to a prefetch that is queued behind others.
            last = 0 if r.reader.requests[0][0] else 16
            nursery.start_soon(r.fetcher.ensure, last, last)
            await trio.testing.wait_all_tasks_blocked()
            r.reader.release()
        assert r.reader.requests[2] == (last * MIB, 8 * MIB)


async def test_forgotten_chunk_is_fetched_again(tmp_path: Path) -> None:
    async with rig(tmp_path, make_memory_blob([[b"one" * 100, b"two" * 100], b"x"])) as r:
        await r.fetcher.ensure(0, 2)
        await r.cached.forget([1])
        await r.fetcher.ensure(0, 1)
        assert r.content(1) == b"two" * 100
        assert len(r.reader.requests) == 2


async def test_blob_that_cannot_be_decoded_is_refused(tmp_path: Path) -> None:
    blob = big_blob(1)
    entry = replace(blob.entry, features=blob.entry.features | BlobFeatures.ENCRYPTED)
    with pytest.raises(BlobUnsupported, match="encrypted"):
        async with rig(tmp_path, replace(blob, entry=entry)):
            pass
