"""How an encoded blob is cut into parts that are there or not: at every start and end of an extent."""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import Self

from rafs.blobmeta import BlobMeta
from rafs.record import expect


class EncodedMap:
    """The parts of one encoded blob, numbered in the order of their offsets; 8 bytes each.

    An extent is one part, or several where extents overlap (gzip contexts). What lies between extents and
    behind the last one (the chunk table, the table of contents) are parts, too.
    """

    def __init__(self, spans: Iterable[tuple[int, int]], size_bytes: int) -> None:
        """`spans`: start and end of each extent. Raises `FormatError` for one outside of `size_bytes`."""
        cuts = {0}
        for start, end in spans:
            expect(0 <= start <= end <= size_bytes, "extent", 0, f"within {size_bytes} bytes, ends at {end}")
            cuts.add(start)
            cuts.add(end)
        cuts.discard(size_bytes)
        self.size_bytes = size_bytes
        self._starts = array("Q", sorted(cuts))

    @classmethod
    def of_blob(cls, meta: BlobMeta, size_bytes: int) -> Self:
        """The parts of the blob with that chunk table. Reads every entry once. Raises `FormatError`."""
        return cls(_spans(meta), size_bytes)

    @property
    def count(self) -> int:
        """Number of parts."""
        return len(self._starts)

    def start_of(self, part: int) -> int:
        """Where a part starts, in bytes; the size of the blob for the number behind the last one."""
        return self._starts[part] if part < len(self._starts) else self.size_bytes

    def size_of(self, part: int) -> int:
        """Bytes of a part."""
        return self.start_of(part + 1) - self.start_of(part)

    def parts_in(self, offset: int, size: int) -> range:
        """Numbers of the parts with bytes in `size` (at least 1) bytes from `offset` on."""
        return range(bisect_right(self._starts, offset) - 1, bisect_left(self._starts, offset + size))


def _spans(meta: BlobMeta) -> Iterable[tuple[int, int]]:
    last = (-1, -1)
    for index in range(meta.count):
        chunk = meta.chunk(index)
        if chunk.is_shared:
            # Members of a batch follow each other, and so do those of a gzip context.
            if (chunk.batch_index, chunk.compressed_offset) == last:
                continue
            last = (chunk.batch_index, chunk.compressed_offset)
            extent = meta.extent_of(chunk)
            yield extent.compressed_offset, extent.compressed_offset + extent.compressed_size
        else:
            yield chunk.compressed_offset, chunk.compressed_offset + chunk.compressed_size
