"""Encoded bytes that are kept: which ones, when the blob counts as whole, and what goes wrong."""

import errno
import os
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from backend.cache import BlobCache, BlobShape
from backend.encoded import EncodedBlob, encoded_shape
from backend.fetch import ChunkFetcher
from backend.fetch_pool import open_fetch_pool
from backend.keep_mode import KeepEncoded
from backend.memory_blob import MemoryBlob, MemoryBlobReader, make_memory_blob
from backend.peers.served_cache import CachedFile
from rafs.digest import Digester
from rafs.encoded_map import EncodedMap
from rafs.record import FormatError

KIB = 1 << 10
TAIL = b"what is no chunk" * 40


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size // 2) * 2


def make_blob() -> MemoryBlob:
    """Two chunks alone, a batch of three, and a tail that no chunk is in."""
    chunks: list[bytes | Sequence[bytes]] = [
        noise(300 * KIB, 1),
        noise(300 * KIB, 2),
        [noise(KIB, 3), noise(KIB, 4), noise(KIB, 5)],
    ]
    blob = make_memory_blob(chunks)
    data = blob.data + TAIL
    entry = replace(blob.entry, blob_id=Digester.SHA256.digest(data).hex())
    return MemoryBlob(data, entry, blob.meta, blob.digests)


class Rig:
    """A fetcher that keeps encoded bytes."""

    def __init__(self, blob: MemoryBlob, reader: MemoryBlobReader, fetcher: ChunkFetcher) -> None:
        self.blob, self.reader, self.fetcher = blob, reader, fetcher
        assert fetcher.origin.encoded is not None
        self.encoded: EncodedBlob = fetcher.origin.encoded
        self.tail = (len(blob.data) - len(TAIL), len(blob.data))

    async def complete(self) -> bool:
        return await self.encoded.complete(self.fetcher.origin.read)

    def file(self) -> bytes:
        return os.pread(self.encoded.cached.descriptor, len(self.blob.data), 0)


@asynccontextmanager
async def rig(tmp_path: Path, blob: MemoryBlob | None = None) -> AsyncIterator[Rig]:
    blob = blob or make_blob()
    cache = BlobCache(tmp_path)
    cached = cache.open(BlobShape(blob.entry.blob_id, blob.entry.uncompressed_size, blob.entry.chunk_count))
    parts = EncodedMap.of_blob(blob.meta, len(blob.data))
    kept = cache.open(encoded_shape(blob.entry.blob_id, parts))
    reader = MemoryBlobReader(blob.data)
    try:
        async with open_fetch_pool() as pool:
            fetcher = ChunkFetcher(blob.entry, blob.meta, blob.digests, reader, cached, pool)
            fetcher.origin.encoded = EncodedBlob(kept, parts)
            pool.register(kept)
            yield Rig(blob, reader, fetcher)
    finally:
        cached.close()
        kept.close()


async def test_what_was_fetched_is_kept_and_the_rest_brought_when_the_whole_is_wanted(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        await r.fetcher.ensure(0, 4)
        assert r.encoded.lacking() == [r.tail]
        assert r.encoded.cached.ready_count() < r.encoded.parts.count
        assert await r.complete()
        assert r.encoded.is_whole
        assert r.file() == r.blob.data
        assert r.reader.requests[-1] == (r.tail[0], len(TAIL))
        assert await r.complete()
    async with rig(tmp_path, r.blob) as again:
        assert again.encoded.is_whole
        assert again.reader.requests == []


@pytest.mark.logs_warning
async def test_a_blob_with_another_digest_is_thrown_away(tmp_path: Path) -> None:
    blob = make_blob()
    async with rig(tmp_path, blob) as r:
        await r.fetcher.ensure(0, 4)
        r.reader.script = lambda number, offset, data: bytes(len(data))
        assert not await r.complete()
        assert not r.encoded.is_whole
        assert r.encoded.lacking() == [(0, len(blob.data))]
        assert r.encoded.cached.usage_bytes() == 0
        assert not await r.complete()


async def test_wrong_bytes_are_not_kept(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        wrong = r.blob.data[10]
        r.reader.script = lambda number, offset, data: (
            data[:10] + bytes([wrong ^ 1]) + data[11:] if number == 0 and offset == 0 else data
        )
        await r.fetcher.ensure(0, 4)  # asked for twice, and right the second time
        assert await r.complete()
        assert r.file() == r.blob.data


@pytest.mark.logs_warning
async def test_a_full_disk_ends_the_keeping_and_not_the_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(tmp_path) as r:

        def full(offset: int, parts: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(r.encoded.cached, "store", full)
        await r.fetcher.ensure(0, 4)
        assert r.fetcher.cached.is_complete()
        assert r.encoded.lacking() == [(0, len(r.blob.data))]
        assert not await r.complete()


@pytest.mark.logs_warning
async def test_a_disk_that_is_full_for_the_rest_gets_its_space_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(tmp_path) as r:
        await r.fetcher.ensure(0, 4)
        assert r.encoded.cached.usage_bytes() > 0

        def full(offset: int, parts: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(r.encoded.cached, "store", full)
        assert not await r.complete()
        assert r.encoded.cached.usage_bytes() == 0


@pytest.mark.logs_warning
async def test_encoded_bytes_give_way_when_decoded_ones_find_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(tmp_path) as r:
        await r.fetcher.ensure(0, 0)
        assert r.encoded.cached.usage_bytes() > 0

        def full(offset: int, parts: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(r.fetcher.cached, "store", full)
        await r.fetcher.ensure(1, 1)
        assert r.encoded.cached.usage_bytes() == 0
        assert r.encoded.lacking() == [(0, len(r.blob.data))]


async def test_a_blob_of_which_much_is_lacking_is_not_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backend.encoded.COMPLETED_BYTES_MIN", 1000)
    async with rig(tmp_path) as r:
        assert not await r.complete()
        assert r.reader.requests == []


async def test_a_server_sees_what_is_kept_and_the_whole_only_with_its_digest(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        meta_path = tmp_path / "meta"
        meta_path.write_bytes(bytes(r.blob.meta._data))
        descriptors = [os.dup(number) for number in r.encoded.cached.descriptors]
        served = CachedFile.encoded(len(r.blob.data), meta_path, tuple(descriptors))  # type: ignore[arg-type]
        size, (start, _) = len(r.blob.data), r.tail
        assert served.ready_until(0, 100) == 0
        await r.fetcher.ensure(0, 4)
        assert served.ready_until(0, start) == start
        assert served.ready_until(5, size) == start
        assert served.ready_until(0, size) == 0
        await r.complete()
        assert served.ready_until(0, size) == size
        await r.encoded.drop()
        assert served.ready_until(0, 100) == served.ready_until(0, size) == 0


async def test_two_who_want_the_whole_have_the_rest_brought_once(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        await r.fetcher.ensure(0, 4)
        asked = len(r.reader.requests)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.complete)
            nursery.start_soon(r.complete)
        assert len(r.reader.requests) == asked + 1


def test_parts_are_cut_at_every_start_and_end() -> None:
    parts = EncodedMap([0, 10, 5, 20, 30, 40], 50)
    assert [parts.start_of(part) for part in range(parts.count)] == [0, 5, 10, 20, 30, 40]
    assert [parts.size_of(part) for part in range(parts.count)] == [5, 5, 10, 10, 10, 10]
    assert list(parts.parts_in(5, 5)) == [1]
    assert list(parts.parts_in(4, 2)) == [0, 1]
    assert list(parts.parts_in(49, 1)) == [5]
    assert list(parts.parts_in(0, 50)) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(FormatError):
        EncodedMap([0, 51], 50)


@pytest.mark.parametrize(
    ("mode", "encoded", "kept"),
    [("auto", 66, True), ("auto", 67, False), ("always", 100, True), ("never", 1, False)],
)
def test_which_blobs_are_kept(mode: str, encoded: int, *, kept: bool) -> None:
    assert KeepEncoded(mode).keeps(encoded, 100) is kept
