"""Chunks that another blob in the cache has: copied when they are right, fetched when they are not."""

import errno
import gc
import os
import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from backend.cache import BlobShape, CachedBlob
from backend.chunk_copy import open_local_chunks
from backend.chunk_index import INDEX_NAME, blob_key
from backend.donors import DONORS_MAX, Donors
from backend.fetch import ChunkFetcher
from backend.fetch_pool import open_fetch_pool
from backend.memory_blob import MemoryBlob, MemoryBlobReader, make_memory_blob
from backend.priority import FetchClass
from backend.shelf import BlobShelf
from rafs.codec import Compressor
from rafs.digest import Digester

MIB = 1 << 20
Groups = list[bytes | Sequence[bytes]]


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def shape_of(blob: MemoryBlob) -> BlobShape:
    return BlobShape(blob.entry.blob_id, blob.entry.uncompressed_size, blob.entry.chunk_count)


class Rig:
    """A fetcher of one blob, with the index of its cache directory."""

    def __init__(self, blob: MemoryBlob, reader: MemoryBlobReader, fetcher: ChunkFetcher) -> None:
        self.blob, self.reader, self.fetcher = blob, reader, fetcher
        self.cached: CachedBlob = fetcher.cached

    def content(self, index: int) -> bytes:
        assert self.cached.is_ready(index)
        return bytes(self.cached.read(*self.fetcher.span_of(index)))

    def figures(self) -> tuple[int, int]:
        """(bytes copied, requests)"""
        return self.fetcher.statistics().bytes_copied, len(self.reader.requests)


@asynccontextmanager
async def rig(cache_dir: Path, blob: MemoryBlob, shelf: BlobShelf | None = None) -> AsyncIterator[Rig]:
    shelf = shelf or BlobShelf()
    cached = shelf.open(cache_dir, shape_of(blob))
    reader = MemoryBlobReader(blob.data)
    with open_local_chunks(cache_dir, shelf) as local:
        assert local is not None
        copier = local.copier(blob.entry, blob.meta, dict(enumerate(blob.digests)).get)
        try:
            async with open_fetch_pool() as pool:
                fetcher = ChunkFetcher(blob.entry, blob.meta, blob.digests, reader, cached, pool, copier)
                yield Rig(blob, reader, fetcher)
        finally:
            shelf.close(cache_dir, cached)


async def fill(cache_dir: Path, groups: Groups) -> MemoryBlob:
    """Another image's blob of these chunks, all of it in the cache."""
    blob = make_memory_blob(groups)
    async with rig(cache_dir, blob) as r:
        await r.fetcher.ensure(0, blob.entry.chunk_count - 1)
    return blob


def data_path(cache_dir: Path, blob: MemoryBlob) -> Path:
    return cache_dir / "blobs" / f"{blob.entry.blob_id}.blob.data"


def overwrite(path: Path, offset: int, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    os.pwrite(descriptor, data, offset)
    os.close(descriptor)


@pytest.mark.parametrize("fetch_class", [FetchClass.ON_DEMAND, FetchClass.PREFETCH])
async def test_what_another_blob_has_is_not_fetched(tmp_path: Path, fetch_class: FetchClass) -> None:
    chunks = [noise(MIB, 1), noise(5000, 2), b"tail"]
    await fill(tmp_path, [noise(9000, 9), *chunks])
    async with rig(tmp_path, make_memory_blob([*reversed(chunks)])) as r:
        await r.fetcher.ensure(0, 2, fetch_class)
        assert [r.content(i) for i in range(3)] == [*reversed(chunks)]
        assert r.figures() == (MIB + 5004, 0)
        assert r.fetcher.statistics().chunks_stored == 3


async def test_only_the_changed_chunks_are_fetched(tmp_path: Path) -> None:
    chunks: Groups = [noise(MIB, number) for number in range(8)]
    await fill(tmp_path, chunks)
    changed = [*chunks]
    changed[3] = noise(MIB, 99)
    async with rig(tmp_path, make_memory_blob(changed, Compressor.NONE)) as r:
        await r.fetcher.ensure(0, 7)
        assert [r.content(i) for i in range(8)] == changed
        assert r.reader.requests == [(3 * MIB, MIB)]
        assert r.fetcher.statistics().bytes_copied == 7 * MIB


async def test_neighbours_of_a_copied_chunk_are_left_alone(tmp_path: Path) -> None:
    """A miss that costs no request needs no neighbours that make it worth one."""
    await fill(tmp_path, [noise(5000, 1)])
    async with rig(tmp_path, make_memory_blob([noise(5000, 1), noise(5000, 2)])) as r:
        await r.fetcher.ensure(0, 0)
        assert r.figures() == (5000, 0)
        assert not r.cached.is_ready(1)


async def test_a_batch_is_copied_whole_or_fetched_whole(tmp_path: Path) -> None:
    small = [bytes([number]) * 100 * number for number in range(1, 7)]
    await fill(tmp_path, [small])
    groups: Groups = [small[:3], [small[3], b"new", small[4]]]
    async with rig(tmp_path, make_memory_blob(groups)) as r:
        await r.fetcher.ensure(0, 5)
        assert [r.content(i) for i in range(6)] == [*small[:3], small[3], b"new", small[4]]
        assert r.figures() == (600, 1)


@pytest.mark.logs_warning
async def test_a_chunk_whose_bytes_changed_on_the_disk_is_fetched_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chunks: Groups = [noise(MIB, 1), noise(MIB, 2)]
    donor = await fill(tmp_path, [*chunks])
    overwrite(data_path(tmp_path, donor), MIB + 4711, b"damage")
    async with rig(tmp_path, make_memory_blob([*chunks, b"other"])) as r:
        await r.fetcher.ensure(0, 1)
        assert [r.content(0), r.content(1)] == chunks
        assert r.figures() == (MIB, 1)
    assert f"cache of blob {donor.entry.blob_id[:12]}: chunk 1 is damaged on the disk" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.logs_warning
async def test_a_punched_chunk_never_becomes_zeros(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chunks: Groups = [noise(MIB, number) for number in range(3)]
    donor = await fill(tmp_path, [*chunks])
    subprocess.run(
        ["fallocate", "--punch-hole", "--offset=0", f"--length={2 * MIB}", data_path(tmp_path, donor)],
        check=True,
    )
    async with rig(tmp_path, make_memory_blob([*chunks, b"other"])) as r:
        await r.fetcher.ensure(0, 2)
        assert [r.content(i) for i in range(3)] == chunks
    assert "is damaged on the disk" in caplog.text


async def test_what_the_donor_has_forgotten_is_fetched(tmp_path: Path) -> None:
    chunks: Groups = [noise(MIB, 1), noise(MIB, 2)]
    donor = await fill(tmp_path, [*chunks])
    shelf = BlobShelf()
    cached = shelf.open(tmp_path, shape_of(donor))
    await cached.forget([0])
    overwrite(data_path(tmp_path, donor), 0, bytes(MIB))
    async with rig(tmp_path, make_memory_blob([*chunks, b"other"]), shelf) as r:
        await r.fetcher.ensure(0, 1)
        assert [r.content(0), r.content(1)] == chunks
        assert r.figures() == (MIB, 1)
    shelf.close(tmp_path, cached)


async def test_what_is_forgotten_while_it_is_copied_is_no_damage(tmp_path: Path) -> None:
    donor = await fill(tmp_path, [noise(MIB, 1)])
    blob = make_memory_blob([noise(MIB, 1), b"other"])
    shelf = BlobShelf()
    cached = shelf.open(tmp_path, shape_of(donor))
    async with rig(tmp_path, blob, shelf) as r, trio.open_nursery() as nursery:
        nursery.start_soon(r.fetcher.ensure, 0, 0)
        # As an eviction between the look at the bit and the copy.
        cached._map.remove([0])
        overwrite(data_path(tmp_path, donor), 0, bytes(MIB))
    shelf.close(tmp_path, cached)


@pytest.mark.parametrize("lost", [".blob.data", ".blob.data.chunk_map"])
async def test_a_donor_that_is_gone_is_a_miss(tmp_path: Path, lost: str) -> None:
    donor = await fill(tmp_path, [noise(MIB, 1)])
    (tmp_path / "blobs" / f"{donor.entry.blob_id}{lost}").unlink()
    async with rig(tmp_path, make_memory_blob([noise(MIB, 1), b"other"])) as r:
        await r.fetcher.ensure(0, 0)
        assert r.content(0) == noise(MIB, 1)
        assert r.figures()[0] == 0


@pytest.mark.logs_warning
@pytest.mark.parametrize("size", [0, 100, 4096, 4097])
async def test_a_donor_whose_map_or_file_is_damaged_is_a_miss(tmp_path: Path, size: int) -> None:
    for name, chunks in (("map", [noise(MIB, 1), b"x"]), ("data", [noise(MIB, 2), b"y"])):
        donor = await fill(tmp_path / name, [*chunks])
        path = data_path(tmp_path / name, donor)
        os.truncate(path if name == "data" else f"{path}.chunk_map", size)
        async with rig(tmp_path / name, make_memory_blob([chunks[0], b"other"])) as r:
            with trio.fail_after(10):
                await r.fetcher.ensure(0, 0)
            assert r.content(0) == chunks[0]


async def test_noise_in_the_index_is_a_miss(tmp_path: Path) -> None:
    chunks: Groups = [noise(MIB, 1), noise(5000, 2)]
    await fill(tmp_path, [*chunks])
    index = tmp_path / INDEX_NAME
    blob = make_memory_blob([*chunks, b"other"])
    async with rig(tmp_path, blob) as r:
        overwrite(index, 4096, noise(index.stat().st_size - 4096, 3))
        await r.fetcher.ensure(0, 1)
        assert [r.content(0), r.content(1)] == chunks
        assert r.figures()[0] == 0


async def test_an_index_that_was_lost_is_told_again(tmp_path: Path) -> None:
    chunks: Groups = [noise(5000, number) for number in range(9)]
    donor = await fill(tmp_path, [*chunks])
    (tmp_path / INDEX_NAME).unlink()
    async with rig(tmp_path, make_memory_blob([*chunks, b"other"])) as r:
        with open_local_chunks(tmp_path, BlobShelf()) as local:
            assert local is not None
            copier = local.copier(donor.entry, donor.meta, dict(enumerate(donor.digests)).get)
            cached = BlobShelf().open(tmp_path, shape_of(donor))
            copier.restore(cached)
            cached.close()
        await r.fetcher.ensure(0, 8)
        assert r.figures() == (45_000, 0)


@pytest.mark.logs_warning
async def test_a_directory_that_takes_no_index_serves_without(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).mkdir()
    with open_local_chunks(tmp_path, BlobShelf()) as local:
        assert local is None


async def test_digesters_do_not_mix(tmp_path: Path) -> None:
    """Two images whose algorithms differ share nothing, even where one's digest were the other's."""
    await fill(tmp_path, [noise(5000, 1)])
    blob = make_memory_blob([noise(5000, 1), b"other"])
    sha = tuple(Digester.SHA256.digest(chunk) for chunk in (noise(5000, 1), b"other"))
    async with rig(
        tmp_path, replace(blob, digests=sha, entry=replace(blob.entry, digester=Digester.SHA256))
    ) as r:
        await r.fetcher.ensure(0, 0)
        assert r.content(0) == noise(5000, 1)
        assert r.figures()[0] == 0


@pytest.mark.logs_warning
async def test_a_full_disk_is_answered_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await fill(tmp_path, [noise(5000, 1)])

    def refuse(self: CachedBlob, offset: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with rig(tmp_path, make_memory_blob([noise(5000, 1), b"other"])) as r:
        monkeypatch.setattr(CachedBlob, "store", refuse)
        assert await r.fetcher.ensure(0, 0) == {0: noise(5000, 1)}
        assert len(r.reader.requests) == 0
    assert caplog.text.count("No space left on device") == 1


async def test_readers_share_a_copy_and_a_cancelled_one_does_not_kill_it(tmp_path: Path) -> None:
    await fill(tmp_path, [noise(MIB, 1)])
    async with rig(tmp_path, make_memory_blob([noise(MIB, 1), b"other"])) as r:
        with trio.move_on_after(0):
            await r.fetcher.ensure(0, 0)
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(r.fetcher.ensure, 0, 0)
        assert r.content(0) == noise(MIB, 1)
        assert r.figures() == (MIB, 0)


async def test_a_pool_that_closes_lands_every_copy(tmp_path: Path) -> None:
    await fill(tmp_path, [noise(MIB, number) for number in range(9)])
    async with rig(tmp_path, make_memory_blob([noise(MIB, number) for number in range(10)])) as r:
        with trio.move_on_after(0):
            await r.fetcher.ensure(0, 8)
    assert len(r.fetcher._flights) == 0


@pytest.mark.logs_warning
async def test_a_fault_of_ours_is_logged_and_the_chunk_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await fill(tmp_path, [noise(MIB, 1)])
    async with rig(tmp_path, make_memory_blob([noise(MIB, 1), b"other"])) as r:
        monkeypatch.setattr("backend.chunk_copy._runs", None)
        await r.fetcher.ensure(0, 0)
        assert r.content(0) == noise(MIB, 1)
    assert "copying to blob" in caplog.text


async def test_chunks_are_copied_where_sharing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on file systems without unnamed files."""
    await fill(tmp_path, [noise(MIB, 1)])

    def refuse(*_: int) -> bool:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("backend.chunk_copy.reflink", refuse)
    async with rig(tmp_path, make_memory_blob([noise(MIB, 1), b"other"])) as r:
        await r.fetcher.ensure(0, 0)
        assert r.content(0) == noise(MIB, 1)
        assert r.figures() == (MIB, 0)


async def test_open_donors_are_bounded(tmp_path: Path) -> None:
    blobs = [await fill(tmp_path, [noise(100, number)]) for number in range(DONORS_MAX + 3)]
    donors = Donors(tmp_path, BlobShelf())
    donors.refresh()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    assert all(donors.get(blob_key(blob.entry.blob_id)) for blob in blobs)
    assert len(os.listdir("/proc/self/fd")) - before == 3 * DONORS_MAX
    donors.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture(params=["xfs", "btrfs"])
def sharing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system that shares blocks."""
    kind = str(request.param)
    if shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"not installed: mkfs.{kind}")
    if kind not in Path("/proc/filesystems").read_text():
        pytest.skip(f"the kernel has no {kind}")
    disk, mountpoint = tmp_path / "disk", tmp_path / "sharing"
    mountpoint.mkdir()
    disk.touch()
    os.truncate(disk, 400 * MIB)
    subprocess.run([f"mkfs.{kind}", "-q", disk], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", disk, mountpoint], check=True)
    yield mountpoint
    subprocess.run(["umount", mountpoint], check=True)


def used_bytes(path: Path) -> int:
    subprocess.run(["sync", "-f", path], check=True)
    found = os.statvfs(path)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


@pytest.mark.needs_root
async def test_blocks_are_shared_where_the_file_system_can(sharing: Path) -> None:
    cache = sharing / "cache"
    chunks: Groups = [noise(MIB, number) for number in range(16)]
    chunks += [noise(70_000, 50), [bytes([number]) * 3000 for number in range(60, 90)], b"end"]
    blob = make_memory_blob([b"other", *chunks])
    await fill(cache, [*chunks])
    used = used_bytes(sharing)
    async with rig(cache, blob) as r:
        await r.fetcher.ensure(1, blob.entry.chunk_count - 1)
        flat = [part for chunk in chunks for part in ([chunk] if isinstance(chunk, bytes) else chunk)]
        assert [r.content(i) for i in range(1, blob.entry.chunk_count)] == flat
        assert r.figures() == (sum(map(len, flat)), 0)
    assert used_bytes(sharing) - used < 2 * MIB


@pytest.mark.needs_root
@pytest.mark.logs_warning
async def test_shared_blocks_are_verified(sharing: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = sharing / "cache"
    chunks: Groups = [noise(MIB, number) for number in range(4)]
    donor = await fill(cache, [*chunks, noise(70_000, 7)])
    overwrite(data_path(cache, donor), 2 * MIB, b"damage")
    overwrite(data_path(cache, donor), 4 * MIB + 70_000, b"behind the chunk")
    async with rig(cache, make_memory_blob([noise(70_000, 7), *chunks])) as r:
        await r.fetcher.ensure(0, 4)
        assert [r.content(i) for i in range(5)] == [noise(70_000, 7), *chunks]
        assert bytes(r.cached.read(70_000, 4096 - 70_000 % 4096)) == bytes(4096 - 70_000 % 4096)
        assert r.figures()[1] == 1
    assert "chunk 2 is damaged on the disk" in caplog.text
