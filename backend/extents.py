"""Which bytes of an encoded blob to ask for, given the chunks that are missing. No I/O."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rafs.blobmeta import BlobMeta, Extent
from rafs.record import expect

WIDEN_BYTES = 256 << 10
"""A request is dominated by its latency below about this size, so a smaller miss takes neighbours along."""
WIDEN_DECODED_BYTES = 4 << 20
RUN_BYTES = 8 << 20
RUN_DECODED_BYTES = 32 << 20
GAP_BYTES = 64 << 10
"""Unwanted bytes between two extents that cost less than a request of their own."""
WALK_EXTENTS = 1024
"""Extents that one plan looks at: a bound on the time that the loop is held up (about 5 ms)."""
EXTENT_BYTES_MAX = 64 << 20
"""No extent may need more memory; the largest chunk has 16 MiB."""


@dataclass(frozen=True, slots=True)
class BlobExtent:
    """An extent and the chunks in it. Offsets and sizes in bytes of the encoded blob."""

    chunks: range
    start: int
    size: int
    decoded_size: int
    is_compressed: bool

    @property
    def end(self) -> int:
        """Offset of the first byte behind it."""
        return self.start + self.size


class ExtentIndex:
    """The extents of one blob, by chunk number."""

    def __init__(self, meta: BlobMeta) -> None:
        self._meta = meta
        # Finding the chunks of a batch means walking over them; a batch is asked for many times. Other
        # tools leave members of a batch apart from each other: each group counts as an extent of its own.
        # A gzip context is the same to a fetch. Contexts overlap in the blob, by up to a chunk; decoded,
        # chunks lie apart from each other on blocks of their own, as everywhere.
        self._batches: dict[int, BlobExtent] = {}

    @property
    def chunk_count(self) -> int:
        """Number of chunks of the blob."""
        return self._meta.count

    def of(self, index: int) -> BlobExtent:
        """The extent that holds chunk `index`; raises `FormatError` for one that is not there."""
        chunk = self._meta.chunk(index)
        if not chunk.is_shared:
            alone = range(index, index + 1)
            size, decoded = chunk.compressed_size, chunk.uncompressed_size
            return BlobExtent(alone, chunk.compressed_offset, size, decoded, chunk.is_compressed)
        known = self._batches.get(chunk.batch_index)
        if known is None or index not in known.chunks:
            known = _extent(self._meta.batch_range(index), self._meta.extent(index))
            self._batches[chunk.batch_index] = known
        return known

    def following(self, index: int) -> Iterator[BlobExtent]:
        """Extents from chunk `index` on, at most `WALK_EXTENTS`."""
        for _ in range(WALK_EXTENTS):
            if index >= self.chunk_count:
                return
            extent = self.of(index)
            yield extent
            index = extent.chunks.stop

    def preceding(self, index: int) -> Iterator[BlobExtent]:
        """Extents before chunk `index`, the nearest first, at most `WALK_EXTENTS`."""
        for _ in range(WALK_EXTENTS):
            if index <= 0:
                return
            extent = self.of(index - 1)
            yield extent
            index = extent.chunks.start


def _extent(chunks: range, extent: Extent) -> BlobExtent:
    size, decoded = extent.compressed_size, extent.uncompressed_size
    largest = max(size, decoded)
    expect(
        largest <= EXTENT_BYTES_MAX,
        "batch",
        0,
        f"at most {EXTENT_BYTES_MAX} bytes to decode, found {largest}",
    )
    return BlobExtent(chunks, extent.compressed_offset, size, decoded, extent.is_compressed)


def widen(
    extents: ExtentIndex, wanted: Sequence[BlobExtent], is_absent: Callable[[BlobExtent], bool]
) -> list[BlobExtent]:
    """Neighbours to fetch with the extents `wanted`, so that the request gets worth its latency.

    Absent ones that touch the run: first those behind it, because files are read in the order in which they
    were laid out, then those before it.
    """
    budget = WIDEN_BYTES - sum(extent.size for extent in wanted)
    decoded_budget = WIDEN_DECODED_BYTES - sum(extent.decoded_size for extent in wanted)
    first = min(wanted, key=lambda extent: extent.start)
    last = max(wanted, key=lambda extent: extent.start)
    taken: list[BlobExtent] = []
    end, start = last.end, first.start
    for extent in extents.following(last.chunks.stop):
        fits = extent.size <= budget and extent.decoded_size <= decoded_budget
        if extent.start != end or not fits or not is_absent(extent):
            break
        end = extent.end
        budget -= extent.size
        decoded_budget -= extent.decoded_size
        taken.append(extent)
    for extent in extents.preceding(first.chunks.start):
        fits = extent.size <= budget and extent.decoded_size <= decoded_budget
        if extent.end != start or not fits or not is_absent(extent):
            break
        start = extent.start
        budget -= extent.size
        decoded_budget -= extent.decoded_size
        taken.append(extent)
    return taken


def merge_runs(extents: Iterable[BlobExtent], limit_bytes: int = RUN_BYTES) -> list[list[BlobExtent]]:
    """Groups extents into runs that are each fetched by one request, in the order of the blob.

    A run is at most `limit_bytes` long, unless one extent alone is longer, and decodes to a bounded size.
    """
    runs: list[list[BlobExtent]] = []
    decoded = 0
    for extent in sorted(extents, key=lambda extent: extent.start):
        decoded += extent.decoded_size
        if runs:
            run = runs[-1]
            near = extent.start - run[-1].end <= GAP_BYTES
            if near and extent.end - run[0].start <= limit_bytes and decoded <= RUN_DECODED_BYTES:
                run.append(extent)
                continue
        decoded = extent.decoded_size
        runs.append([extent])
    return runs
