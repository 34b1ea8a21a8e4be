"""Takes chunks that a blob lacks out of the cache files of other blobs, where the same chunks lie decoded.

The index only hints where a chunk may be. It counts after the donor's presence bit was seen, its bytes were
copied to where nobody else writes, and the digest of the copy was compared. A donor may be evicted, punched
or damaged at any moment between; then the copy has a wrong digest and never becomes ready.

Concurrency: `is_promising` is for the trio thread, everything else blocks and runs in worker threads.
"""

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from backend.cache import CachedBlob
from backend.chunk_index import INDEX_NAME, ChunkIndex, ChunkPlace, blob_key
from backend.clone import reflink
from backend.decode import ChunkOutcome, GoodChunk, store_chunks
from backend.donors import Donor, Donors
from backend.shelf import BlobShelf
from rafs.blob_table import BlobEntry
from rafs.blobmeta import BlobMeta
from rafs.record import BLOCK_SIZE, round_up

log = logging.getLogger(__name__)

RUN_BYTES = 4 << 20
"""Bytes that are read from a donor at once."""
REFLINK_BYTES = 64 << 10
"""Shorter runs are copied: sharing them costs more than writing them, and splits the file's extents."""

SAMPLE_CHUNKS = 64
"""So many chunks of a blob tell whether the index knows it."""


@dataclass(frozen=True, slots=True)
class ChunkSource:
    """Chunk `index`, `size_bytes` long, for `target_offset`; it is chunk `number` of `donor`, at `offset`."""

    index: int
    target_offset: int
    size_bytes: int
    donor: Donor
    number: int
    offset: int


class ChunkCopier:
    """Finds and copies chunks for one blob."""

    def __init__(
        self,
        blob: BlobEntry,
        meta: BlobMeta,
        digest_of: Callable[[int], bytes | None],
        index: ChunkIndex,
        donors: Donors,
    ) -> None:
        """Use `LocalChunks.copier`."""
        self._blob = blob
        self._meta = meta
        self._digest_of = digest_of
        self._index = index
        self._donors = donors
        self._key = blob_key(blob.blob_id)
        self._shares_blocks = True

    def is_promising(self, chunks: Iterable[int]) -> bool:
        """Whether the first of `chunks` can be copied. A few microseconds, for the hot path."""
        chunk = next(iter(chunks), None)
        place = None if chunk is None else self._place(chunk)
        if place is None:
            return False
        self._donors.refresh()
        donor = self._donors.get(place.blob_key)
        return donor is not None and donor.has(place.chunk)

    def find(self, chunks: Iterable[int]) -> list[ChunkSource]:
        """Where all of `chunks` can be copied from; empty when one of them cannot. About 10 us each."""
        self._donors.refresh()
        sources: list[ChunkSource] = []
        for chunk in chunks:
            place = self._place(chunk)
            donor = None if place is None else self._donors.get(place.blob_key)
            if place is None or donor is None or not donor.has(place.chunk):
                return []
            info = self._meta.chunk(chunk)
            offset, size = info.uncompressed_offset, info.uncompressed_size
            sources.append(ChunkSource(chunk, offset, size, donor, place.chunk, place.offset))
        return sources

    def copy(self, sources: Iterable[ChunkSource], cached: CachedBlob) -> dict[int, ChunkOutcome]:
        """Copies chunks into `cached` and verifies them; what became of each, by number. Blocking.

        Raises nothing for wrong bytes or a disk that fails.
        """
        outcomes: list[ChunkOutcome] = []
        for run in _runs(sources):
            try:
                outcomes += self._share(run, cached) or self._copy_run(run, cached)
            except OSError as error:
                log.debug("blob %s: %s", run[0].donor.blob_id[:12], error)
                outcomes += [ChunkOutcome(source.index, 0, fault=str(error)) for source in run]
        return {outcome.index: outcome for outcome in outcomes}

    def note_marked(self, chunks: Collection[int]) -> None:
        """Tells the index of chunks of this blob that are marked now. Blocking: for a worker thread."""
        wanted = set(chunks)
        self._index.add(
            (
                (digest, ChunkPlace(self._key, chunk, block * BLOCK_SIZE))
                for chunk, block in enumerate(self._meta.start_blocks())
                if chunk in wanted and (digest := self._digest_of(chunk)) is not None
            ),
            self._blob.digester,
        )

    def restore(self, cached: CachedBlob) -> None:
        """Tells an index that has lost most of a sample again what `cached` has. Blocking, as above."""
        count = cached.shape.chunk_count
        sample = [i for i in range(0, count, max(1, count // SAMPLE_CHUNKS)) if cached.is_ready(i)]
        known = [digest for i in sample if (digest := self._digest_of(i)) is not None]
        found = sum(self._index.find(digest, self._blob.digester) is not None for digest in known)
        if 2 * found < len(known):
            self.note_marked([i for i in range(count) if cached.is_ready(i)])

    def _place(self, chunk: int) -> ChunkPlace | None:
        digest = self._digest_of(chunk)
        return None if digest is None else self._index.find(digest, self._blob.digester)

    def _copy_run(self, run: Sequence[ChunkSource], cached: CachedBlob) -> list[ChunkOutcome]:
        start = run[0].offset
        data = run[0].donor.read(start, run[-1].offset + run[-1].size_bytes - start)
        outcomes: list[ChunkOutcome] = []
        good: list[GoodChunk] = []
        for source in run:
            at = source.offset - start
            chunk = data[at : at + source.size_bytes]
            if self._is_right(source, chunk):
                good.append(GoodChunk(source.index, source.target_offset, chunk, outcomes))
            else:
                outcomes.append(ChunkOutcome(source.index, 0, fault="the copy is wrong"))
        good.sort(key=lambda chunk: chunk.offset)
        store_chunks(good, cached.store)
        return outcomes

    def _share(self, run: Sequence[ChunkSource], cached: CachedBlob) -> list[ChunkOutcome]:
        """The run by sharing its blocks; empty when it has to be copied."""
        start, target, donor = run[0].offset, run[0].target_offset, run[0].donor.descriptor
        length = round_up(run[-1].offset + run[-1].size_bytes - start, BLOCK_SIZE)
        is_straight = all(s.target_offset - s.offset == target - start for s in run)
        fits = target + length <= cached.shape.size_bytes and start + length <= os.fstat(donor).st_size
        if not (self._shares_blocks and is_straight and fits and length >= REFLINK_BYTES):
            return []
        try:
            is_shared = self._share_verified(run, length, cached.descriptor)
        except OSError as error:
            log.info("blob %s: chunks are copied, not shared: %s", self._blob.blob_id[:12], error)
            self._shares_blocks = is_shared = False
        return [ChunkOutcome(source.index, source.size_bytes) for source in run] if is_shared else []

    def _share_verified(self, run: Sequence[ChunkSource], length: int, target: int) -> bool:
        """By way of a file of our own: what was verified must not change before it is in the target.

        Another process may have made the same chunk ready there meanwhile. Raises `OSError`.
        """
        own = os.open(self._donors.directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            if not reflink(run[0].donor.descriptor, run[0].offset, length, own, 0):
                self._shares_blocks = False
                return False
            whole = self._is_whole(run, memoryview(os.pread(own, length, 0)))
            return whole and reflink(own, 0, length, target, run[0].target_offset)
        finally:
            os.close(own)

    def _is_whole(self, run: Sequence[ChunkSource], data: memoryview) -> bool:
        """Whether all chunks of a run are right, and zero what lies behind each in its last block."""
        for source in run:
            at = source.offset - run[0].offset
            end = at + source.size_bytes
            if any(data[end : round_up(end, BLOCK_SIZE)]) or not self._is_right(source, data[at:end]):
                return False
        return True

    def _is_right(self, source: ChunkSource, data: memoryview) -> bool:
        if self._blob.digester.digest(data) == self._digest_of(source.index):
            return True
        source.donor.distrust(source.number)
        return False


def _runs(sources: Iterable[ChunkSource]) -> list[list[ChunkSource]]:
    """Groups chunks that follow each other in a donor: each group is read at once."""
    runs: list[list[ChunkSource]] = []
    for source in sorted(sources, key=lambda source: (source.donor.blob_id, source.offset)):
        if runs:
            first, last = runs[-1][0], runs[-1][-1]
            follows = source.offset == round_up(last.offset + last.size_bytes, BLOCK_SIZE)
            short = source.offset + source.size_bytes - first.offset <= RUN_BYTES
            if source.donor is first.donor and follows and short:
                runs[-1].append(source)
                continue
        runs.append([source])
    return runs


class LocalChunks:
    """What a process knows of the chunks in a cache directory: the index, and the files they are in."""

    def __init__(self, index: ChunkIndex, donors: Donors) -> None:
        """Use `open_local_chunks`."""
        self._index = index
        self._donors = donors

    def copier(
        self, blob: BlobEntry, meta: BlobMeta, digest_of: Callable[[int], bytes | None]
    ) -> ChunkCopier:
        """A copier for `blob`; `digest_of` gives a chunk's digest, None where the image does not name it."""
        return ChunkCopier(blob, meta, digest_of, self._index, self._donors)


@contextmanager
def open_local_chunks(cache_dir: Path, shelf: BlobShelf) -> Iterator[LocalChunks | None]:
    """Opens the index of a cache directory. None, with a WARNING, where the disk does not let us have one.

    `shelf` has the cache files that this process has open. Blocking. Raises `CacheUnusable`.
    """
    donors = Donors(cache_dir, shelf)
    try:
        index = ChunkIndex.open(cache_dir / INDEX_NAME)
    except OSError as error:
        log.warning("%s: %s; chunks of other images are fetched", cache_dir / INDEX_NAME, error.strerror)
        yield None
        return
    try:
        yield LocalChunks(index, donors)
    finally:
        donors.close()
        index.close()
