"""Fetches what will be read, before anybody reads it, behind everything that somebody waits for.

Concurrency: one task plans, and at most `SPANS_AT_ONCE` spans are on their way. The plan is a generator
over the bootstrap; there is a checkpoint after each file, because an image may have a million.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import trio

from backend.fetch import ChunkFetcher
from backend.prefetch_mode import PrefetchMode
from backend.priority import FetchClass
from rafs.bootstrap import Bootstrap
from rafs.errors import NydusError
from rafs.inode import Inode

log = logging.getLogger(__name__)

SPAN_CHUNKS = 512
SPAN_DECODED_BYTES = 16 << 20
SPANS_AT_ONCE = 2
SPANS_AMONG_PEERS = 8
"""Some pieces are with others already, some not yet: of many, some can always be had."""


@dataclass(frozen=True, slots=True)
class Span:
    """Chunks of one blob that are asked for together; a checkpoint where it is empty."""

    blob_index: int
    chunks: tuple[int, ...]


async def prefetch(bootstrap: Bootstrap, fetchers: Mapping[int, ChunkFetcher], mode: PrefetchMode) -> None:
    """Runs until everything that `mode` names was fetched; gives up, with a WARNING, at the first failure."""
    if mode is PrefetchMode.NONE:
        return
    among_peers = any(fetcher.asks_peers for fetcher in fetchers.values())
    free = trio.Semaphore(SPANS_AMONG_PEERS if among_peers else SPANS_AT_ONCE)
    try:
        async with trio.open_nursery() as nursery:
            for span in plan_prefetch(bootstrap, fetchers, mode):
                await free.acquire()
                if span.chunks:
                    nursery.start_soon(_fetch_span, fetchers[span.blob_index], span, free)
                else:
                    free.release()
    except* NydusError as group:
        log.warning("prefetch stopped, the mount goes on: %s", group.exceptions[0])
    except* Exception:
        log.exception("fault in prefetch; the mount goes on without")


async def _fetch_span(fetcher: ChunkFetcher, span: Span, free: trio.Semaphore) -> None:
    try:
        await fetcher.ensure_chunks(span.chunks, FetchClass.PREFETCH)
    finally:
        free.release()


def plan_prefetch(
    bootstrap: Bootstrap, fetchers: Mapping[int, ChunkFetcher], mode: PrefetchMode
) -> Iterator[Span]:
    """The hinted files in their order; with `ALL` then every blob from its start to its end, or, among
    hosts that give to each other, piece by piece in an order of this host's own.

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
            for chunk in fetcher.chunks_in_order():
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
