"""Chunks in order, fetched ahead: grouping, order, failures in their turn, consumers that stop early."""

from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

import pytest
import trio

from backend.contract import BlobNotFound
from rafs.blobmeta import Extent
from rafs.chunk import ChunkRef
from tools.image import OpenImage
from tools.run_stream import RUN_ENCODED_BYTES, RUNS_AHEAD, BlobSet, Run, plan_runs, run_stream

MEBIBYTE = 1 << 20


@dataclass
class FakeMeta:
    """Chunks of 1 MiB, one after the other; the numbers in `shared` lie in the extent of the one before."""

    shared: frozenset[int] = frozenset()

    def extent(self, index: int) -> Extent:
        while index in self.shared:
            index -= 1
        return Extent(index * MEBIBYTE, MEBIBYTE, MEBIBYTE, is_compressed=False)


@dataclass
class FakeReader:
    """Answers in the order that a test wants."""

    answer: Callable[[int], object] = lambda offset: None
    asked: list[int] = field(default_factory=list)
    closed: int = 0

    async def read_range(self, offset: int, length: int) -> bytes:
        self.asked.append(offset)
        reply = self.answer(offset)
        if isinstance(reply, trio.Event):
            await reply.wait()
        elif isinstance(reply, Exception):
            raise reply
        await trio.lowlevel.checkpoint()
        return bytes(length)

    async def aclose(self) -> None:
        self.closed += 1


@pytest.fixture
def reader() -> FakeReader:
    return FakeReader()


@pytest.fixture
def image(reader: FakeReader, monkeypatch: pytest.MonkeyPatch) -> OpenImage:
    """Two blobs of such chunks, both read by `reader`."""
    entries = [SimpleNamespace(blob_id=f"{n}" * 64, compressed_size=1 << 40) for n in range(2)]
    bootstrap = SimpleNamespace(blobs=entries, chunk_digests=lambda index: [])
    metadata = SimpleNamespace(blob_meta_path=lambda blob_id: None)
    store = SimpleNamespace(open_blob=lambda blob_id, size: reader)
    monkeypatch.setattr(
        "tools.run_stream.BlobMeta", SimpleNamespace(open=lambda path: FakeMeta(frozenset({3, 4})))
    )
    return cast(OpenImage, SimpleNamespace(store=store, metadata=metadata, bootstrap=bootstrap))


def refs(blob_index: int, *chunks: int) -> Iterator[ChunkRef]:
    return (ChunkRef(blob_index, chunk, 0) for chunk in chunks)


def offsets(run: Run, data: bytes) -> list[int]:
    """Work that tells the chunks of a run."""
    assert len(data) == run.length
    return list(run.chunks)


async def collect(image: OpenImage, wanted: Iterator[ChunkRef]) -> list[int]:
    async with run_stream(image, wanted, offsets) as results:
        return [result async for result in results]


async def planned(image: OpenImage, wanted: Iterator[ChunkRef]) -> list[tuple[int, int, tuple[int, ...]]]:
    async with AsyncExitStack() as stack:
        runs = list(plan_runs(BlobSet(image, stack), wanted))
    return [(run.offset // MEBIBYTE, run.length // MEBIBYTE, run.chunks) for run in runs]


async def test_neighbours_are_fetched_together(image: OpenImage) -> None:
    assert await planned(image, refs(0, 0, 1, 7, 8, 5)) == [(0, 2, (0, 1)), (7, 2, (7, 8)), (5, 1, (5,))]


async def test_chunks_of_one_extent_are_fetched_once(image: OpenImage) -> None:
    assert await planned(image, refs(0, 2, 3, 3, 4, 5)) == [(2, 1, (2, 3, 3, 4)), (5, 1, (5,))]


async def test_a_run_has_a_limit(image: OpenImage) -> None:
    limit = RUN_ENCODED_BYTES // MEBIBYTE
    runs = await planned(image, refs(0, *range(10, 10 + 2 * limit)))
    assert [length for _, length, _ in runs] == [limit, limit]


async def test_results_come_in_order_whatever_ends_first(image: OpenImage, reader: FakeReader) -> None:
    first, rest = trio.Event(), iter(range(3))

    def answer(offset: int) -> object:
        if offset == 0:
            return first
        if next(rest) == 1:
            first.set()  # the first one ends after two others
        return None

    reader.answer = answer
    assert await collect(image, refs(0, 0, 10, 20, 30)) == [0, 10, 20, 30]


async def test_a_failure_comes_in_its_turn(image: OpenImage, reader: FakeReader) -> None:
    reader.answer = lambda offset: BlobNotFound(where="here") if offset == 10 * MEBIBYTE else None
    seen = []
    with pytest.RaisesGroup(BlobNotFound):
        async with run_stream(image, refs(0, 0, 10, 20), offsets) as results:
            async for result in results:
                seen.append(result)
    assert seen == [0]
    assert reader.closed == 1


async def test_a_consumer_may_stop_early(image: OpenImage, reader: FakeReader) -> None:
    async with run_stream(image, refs(0, *range(0, 2000, 10)), offsets) as results:
        assert await anext(results) == 0
    assert len(reader.asked) <= RUNS_AHEAD + 2
    assert reader.closed == 1


async def test_each_blob_is_opened_once_and_closed(image: OpenImage, reader: FakeReader) -> None:
    def mixed() -> Iterator[ChunkRef]:
        for chunk in range(0, 40, 10):
            yield from refs(chunk // 10 % 2, chunk)

    assert await collect(image, mixed()) == [0, 10, 20, 30]
    assert reader.closed == 2


async def test_nothing_wanted(image: OpenImage, reader: FakeReader) -> None:
    assert await collect(image, refs(0)) == []
    assert reader.asked == []
