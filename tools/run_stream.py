"""Runs of neighbouring chunks, fetched a few ahead of their consumer and worked on in threads.

Nothing is kept: the cache belongs to mounts.

Concurrency: the nursery of `run_stream` has one task that plans and one for each fetch in flight; slots
reach the consumer in the order of the plan, whichever fetch ends first.
"""

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import trio

from backend.contract import BlobReader
from rafs.blob_table import BlobEntry
from rafs.blobmeta import BlobMeta, Extent
from rafs.chunk import ChunkDigests, ChunkRef
from rafs.errors import NydusError
from tools.image import OpenImage

RUN_ENCODED_BYTES = 4 << 20
RUN_DECODED_BYTES = 32 << 20
RUNS_AHEAD = 3

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class OpenBlob:
    """A blob that is being read."""

    entry: BlobEntry
    meta: BlobMeta
    digests: ChunkDigests
    reader: BlobReader


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring extents of one blob, fetched by one request; `chunks` in the order they were asked for."""

    blob: OpenBlob
    offset: int
    length: int
    chunks: tuple[int, ...]

    def encoded(self, data: bytes, extent: Extent) -> memoryview:
        """The bytes of `extent` in `data`, which are those of the run."""
        start = extent.compressed_offset - self.offset
        return memoryview(data)[start : start + extent.compressed_size]


@dataclass(slots=True)
class Slot(Generic[T]):
    """Where the results of a run, or its failure, will be."""

    done: trio.Event = field(default_factory=trio.Event)
    results: list[T] = field(default_factory=list)
    error: NydusError | None = None


class BlobSet:
    """The blobs of an image, each opened at its first use and closed with the stack."""

    def __init__(self, image: OpenImage, stack: AsyncExitStack) -> None:
        self._image = image
        self._stack = stack
        self._open: dict[int, OpenBlob] = {}

    def __getitem__(self, blob_index: int) -> OpenBlob:
        blob = self._open.get(blob_index)
        if blob is None:
            blob = self._open[blob_index] = self._open_blob(blob_index)
        return blob

    def _open_blob(self, blob_index: int) -> OpenBlob:
        bootstrap, metadata, store = self._image.bootstrap, self._image.metadata, self._image.store
        entry = bootstrap.blobs[blob_index]
        meta = BlobMeta.open(metadata.blob_meta_path(entry.blob_id))
        reader = store.open_blob(entry.blob_id, entry.compressed_size)
        self._stack.push_async_callback(_close, reader)
        return OpenBlob(entry, meta, bootstrap.chunk_digests(blob_index), reader)


async def _close(reader: BlobReader) -> None:
    with trio.CancelScope(shield=True):
        await reader.aclose()


class ResultIterator(Generic[T]):
    """Takes results out of the slots, in order."""

    def __init__(self, slots: trio.MemoryReceiveChannel[Slot[T]]) -> None:
        self._slots = slots
        self._ready: deque[T] = deque()

    def __aiter__(self) -> "ResultIterator[T]":
        return self

    async def __anext__(self) -> T:
        while not self._ready:
            try:
                slot = await self._slots.receive()
            except trio.EndOfChannel:
                raise StopAsyncIteration from None
            await slot.done.wait()
            if slot.error is not None:
                raise slot.error
            self._ready.extend(slot.results)
        return self._ready.popleft()


@asynccontextmanager
async def run_stream(
    image: OpenImage, refs: Iterable[ChunkRef], work: Callable[[Run, bytes], list[T]]
) -> AsyncIterator[ResultIterator[T]]:
    """Iterates over what `work` makes of each run that `refs` fall into, in the order of `refs`.

    `work` runs in a thread with the encoded bytes of the run. The iterator raises the `NydusError`s of
    `work` and of the blobs' readers in their turn.
    """
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        sender, receiver = trio.open_memory_channel[Slot[T]](RUNS_AHEAD)
        runs = plan_runs(BlobSet(image, stack), refs)
        nursery.start_soon(_fetch_all, runs, work, sender, nursery)
        async with receiver:
            yield ResultIterator(receiver)
        nursery.cancel_scope.cancel()


def plan_runs(blobs: BlobSet, refs: Iterable[ChunkRef]) -> Iterator[Run]:
    """Groups chunks whose extents follow each other in the same blob."""
    blob: OpenBlob | None = None
    start = end = decoded = 0
    last: Extent | None = None
    chunks: list[int] = []
    for ref in refs:
        owner = blobs[ref.blob_index]
        extent = owner.meta.extent(ref.chunk_index)
        same = owner is blob and extent == last
        follows = owner is blob and extent.compressed_offset == end
        fits = end - start < RUN_ENCODED_BYTES and decoded < RUN_DECODED_BYTES
        if blob is not None and not (same or (follows and fits)):
            yield Run(blob, start, end - start, tuple(chunks))
            blob, chunks = None, []
        if blob is None:
            blob, start, end, decoded = owner, extent.compressed_offset, extent.compressed_offset, 0
        if not same:
            decoded += extent.uncompressed_size
        end = max(end, extent.compressed_offset + extent.compressed_size)
        last = extent
        chunks.append(ref.chunk_index)
    if blob is not None:
        yield Run(blob, start, end - start, tuple(chunks))


async def _fetch_all(
    runs: Iterator[Run],
    work: Callable[[Run, bytes], list[T]],
    sender: trio.MemorySendChannel[Slot[T]],
    nursery: trio.Nursery,
) -> None:
    async with sender:
        try:
            for run in runs:
                slot: Slot[T] = Slot()
                await sender.send(slot)
                nursery.start_soon(_fetch, run, work, slot)
        except trio.BrokenResourceError:
            return  # the consumer has seen enough
        except NydusError as error:
            # The plan itself met a broken record; the consumer hears of it in its turn.
            slot = Slot(error=error)
            slot.done.set()
            await sender.send(slot)


async def _fetch(run: Run, work: Callable[[Run, bytes], list[T]], slot: Slot[T]) -> None:
    try:
        data = await run.blob.reader.read_range(run.offset, run.length)
        slot.results = await trio.to_thread.run_sync(work, run, data)
    except NydusError as error:
        slot.error = error
    finally:
        slot.done.set()
