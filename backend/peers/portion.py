"""What is asked of a host in one request: ranges of a decoded file, or of the encoded blob. No I/O.

Chunks that lie apart are asked for together, each range for itself: a request costs a host about 100 us, a
range of 4 KiB in it 7 us (docs/notes/peer_server.md), and a chunk on its way alone a round trip.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from operator import itemgetter
from typing import NamedTuple

from backend.extents import BlobExtent, merge_runs
from backend.peers.multipart import RANGES_MAX

GAP_BYTES = 8 << 10
"""Unwanted decoded bytes between two chunks that cost less than a part of their own."""
SMALL_BYTES = 256 << 10
"""A run below this is not worth a request of its own."""


class ChunkSpan(NamedTuple):
    """A chunk, and its place in the decoded file."""

    number: int
    offset: int
    size: int


class Portion:
    """Ranges in order that do not touch, and the chunks that they are asked for."""

    def __init__(
        self, ranges: Sequence[tuple[int, int]], chunks: Sequence[ChunkSpan], *, is_encoded: bool = False
    ) -> None:
        self.ranges = tuple(ranges)
        self.chunks = chunks
        self.is_encoded = is_encoded
        self._places = list(accumulate((end - offset for offset, end in ranges), initial=0))

    @property
    def size_bytes(self) -> int:
        """Bytes of all ranges."""
        return self._places[-1]

    @property
    def decoded_bytes(self) -> int:
        """Bytes of the chunks."""
        return sum(chunk.size for chunk in self.chunks)

    def view(self, buffer: memoryview, offset: int, size: int) -> memoryview:
        """`size` bytes from `offset` of the file on, in a buffer that has all ranges in a row.

        Raises `ValueError` for bytes that are not in one of them.
        """
        number = range_at(self.ranges, offset, size)
        if number is None:
            raise ValueError(f"bytes {offset} to {offset + size} are in no range")
        at = self._places[number] + offset - self.ranges[number][0]
        return buffer[at : at + size]


def range_at(ranges: Sequence[tuple[int, int]], offset: int, size: int) -> int | None:
    """The number of the range, of some in order, that has all of `size` bytes from `offset` on."""
    number = bisect_right(ranges, offset, key=itemgetter(0)) - 1
    return number if number >= 0 and offset + size <= ranges[number][1] else None


def decoded_portion(chunks: Sequence[ChunkSpan]) -> Portion:
    """The ranges that have these chunks (at least one), in the order of their offsets."""
    ranges = _joined(((each.offset, each.offset + each.size) for each in chunks), GAP_BYTES)
    if len(ranges) > RANGES_MAX:
        ranges = [(ranges[0][0], ranges[-1][1])]
    return Portion(ranges, chunks)


def encoded_portion(extents: Iterable[BlobExtent], chunks: Sequence[ChunkSpan]) -> Portion | None:
    """Exactly these extents: what lies between them a host need not have. None when they are too many."""
    ranges = _joined(sorted((extent.start, extent.end) for extent in extents), 0)
    return Portion(ranges, chunks, is_encoded=True) if len(ranges) <= RANGES_MAX else None


def join_small(runs: Iterable[list[BlobExtent]], limit_bytes: int) -> list[list[BlobExtent]]:
    """Puts small runs together that one request can bring: `RANGES_MAX` of them, `limit_bytes` in all."""
    joined: list[list[BlobExtent]] = []
    parts = size_bytes = 0
    for run in runs:
        run_bytes = sum(extent.decoded_size for extent in run)
        if (
            parts
            and run_bytes <= SMALL_BYTES
            and size_bytes + run_bytes <= limit_bytes
            and parts < RANGES_MAX
        ):
            joined[-1].extend(run)
            parts += 1
            size_bytes += run_bytes
        else:
            joined.append(list(run))
            parts, size_bytes = (1, run_bytes) if run_bytes <= SMALL_BYTES else (0, 0)
    return joined


def runs_of_piece(extents: Iterable[BlobExtent], limit_bytes: int) -> list[list[BlobExtent]]:
    """Groups the extents of one piece by the request that brings them."""
    return join_small(merge_runs(extents, limit_bytes), limit_bytes)


def _joined(ranges: Iterable[tuple[int, int]], gap_bytes: int) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for offset, end in ranges:
        if joined and offset <= joined[-1][1] + gap_bytes:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((offset, end))
    return joined
