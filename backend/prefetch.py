"""Fetches what will be read, before anybody reads it, behind everything that somebody waits for.

First what the image names. The rest in the order of the blob, or, among hosts that give to each other, as
it suits them all (`PiecePicker`).

Concurrency: one task plans, and at most `SPANS_AT_ONCE` spans are on their way, or `BLOBS_AT_ONCE` blobs. The
plan is a generator over the bootstrap; there is a checkpoint after each file, because an image may have a
million.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import trio

from backend.fetch import ChunkFetcher
from backend.pieces import first_failure
from backend.prefetch_mode import PrefetchMode
from backend.priority import FetchClass
from rafs.bootstrap import Bootstrap
from rafs.errors import NydusError
from rafs.inode import Inode

log = logging.getLogger(__name__)

SPAN_CHUNKS = 512
SPAN_DECODED_BYTES = 16 << 20
SPANS_AT_ONCE = 2
BLOBS_AT_ONCE = 4
"""Among hosts that give to each other: one blob has its end while another one begins."""


@dataclass(frozen=True, slots=True)
class Span:
    """Chunks of one blob that are asked for together; a checkpoint where it is empty."""

    blob_index: int
    chunks: tuple[int, ...]


async def prefetch(bootstrap: Bootstrap, fetchers: Mapping[int, ChunkFetcher], mode: PrefetchMode) -> None:
    """Runs until everything that `mode` names was fetched; gives up, with a WARNING, at the first failure."""
    if mode is PrefetchMode.NONE:
        return
    free = trio.Semaphore(SPANS_AT_ONCE)
    try:
        async with trio.open_nursery() as nursery:
            for span in _plan(bootstrap, fetchers, mode):
                await free.acquire()
                if span.chunks:
                    nursery.start_soon(_fetch_span, fetchers[span.blob_index], span, free)
                else:
                    free.release()
        if mode is PrefetchMode.ALL:
            blobs = trio.Semaphore(BLOBS_AT_ONCE)
            async with trio.open_nursery() as nursery:
                for fetcher in fetchers.values():
                    if not fetcher.is_shared:
                        continue
                    await blobs.acquire()
                    nursery.start_soon(_fetch_all, fetcher, blobs)
    except* NydusError as group:
        log.warning("prefetch stopped, the mount goes on: %s", first_failure(group))
    except* Exception:
        log.exception("fault in prefetch; the mount goes on without")


async def _fetch_span(fetcher: ChunkFetcher, span: Span, free: trio.Semaphore) -> None:
    try:
        await fetcher.ensure_chunks(span.chunks, FetchClass.PREFETCH)
    finally:
        free.release()


async def _fetch_all(fetcher: ChunkFetcher, free: trio.Semaphore) -> None:
    try:
        await fetcher.ensure_all()
    finally:
        free.release()


def _plan(bootstrap: Bootstrap, fetchers: Mapping[int, ChunkFetcher], mode: PrefetchMode) -> Iterator[Span]:
    """The hinted files in their order; with `ALL` then every blob that nobody shares, from start to end.

    Chunks that are ready are left out. Empty spans stand between, so that the caller can let others run.
    """
    batch: list[int] = []
    current = decoded = 0
    for count, (blob_index, chunk) in enumerate(_chunks(bootstrap, fetchers, mode)):
        full = len(batch) >= SPAN_CHUNKS or decoded >= SPAN_DECODED_BYTES
        if full or blob_index != current or (count % SPAN_CHUNKS == 0 and not batch):
            yield Span(current, tuple(batch))
            batch, current, decoded = [], blob_index, 0
        if not fetchers[blob_index].cached.is_ready(chunk):
            batch.append(chunk)
            decoded += fetchers[blob_index].decoded_size(chunk)
    yield Span(current, tuple(batch))


def _chunks(
    bootstrap: Bootstrap, fetchers: Mapping[int, ChunkFetcher], mode: PrefetchMode
) -> Iterator[tuple[int, int]]:
    """(blob index, chunk number), as they are wanted."""
    for nid in bootstrap.prefetch_nids:
        for inode in _files_under(bootstrap, bootstrap.inode(nid)):
            for ref in bootstrap.chunk_refs(inode):
                yield ref.blob_index, ref.chunk_index
    if mode is PrefetchMode.ALL:
        for blob_index, fetcher in fetchers.items():
            if not fetcher.is_shared:
                for chunk in range(fetcher.chunk_count):
                    yield blob_index, chunk


def _files_under(bootstrap: Bootstrap, start: Inode) -> Iterator[Inode]:
    """Regular files at and below an inode; a directory that is reached twice is entered once."""
    pending, entered = [start], set[int]()
    while pending:
        inode = pending.pop()
        if inode.is_file:
            yield inode
        elif inode.is_dir and inode.nid not in entered:
            entered.add(inode.nid)
            entries = [entry for entry in bootstrap.readdir(inode) if entry.name not in (b".", b"..")]
            pending.extend(bootstrap.inode(entry.nid) for entry in reversed(entries))
