"""How an encoded blob is cut into parts that are there or not: at every start and end of an extent."""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import Self

from rafs.blobmeta import BlobMeta, ChunkInfoFlags
from rafs.record import expect

# Of the words of an entry (`ChunkInfo.unpack_v2`).
_SHARED = int(ChunkInfoFlags.BATCH | ChunkInfoFlags.ZRAN) << 56
_OFFSET = 0xFF_FFFF_FFFF
_SIZE_SHIFT = 40


class EncodedMap:
    """The parts of one encoded blob, numbered in the order of their offsets; 8 bytes each.

    An extent is one part, or several where extents overlap (gzip contexts). What lies between extents and
    behind the last one (the chunk table, the table of contents) are parts, too.
    """

    def __init__(self, cuts: Iterable[int], size_bytes: int) -> None:
        """`cuts`: where extents start and end. Raises `FormatError` for one outside of `size_bytes`."""
        starts = {0, *cuts}
        starts.discard(size_bytes)
        expect(max(starts) <= size_bytes, "extent", 0, f"within {size_bytes} bytes, ends at {max(starts)}")
        self.size_bytes = size_bytes
        self._starts = array("Q", sorted(starts))

    @classmethod
    def of_blob(cls, meta: BlobMeta, size_bytes: int) -> Self:
        """The parts of the blob with that chunk table. Raises `FormatError`.

        Reads every entry once: about 0.1 s for 100,000 chunks.
        """
        return cls(_cuts(meta), size_bytes)

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


def _cuts(meta: BlobMeta) -> set[int]:
    words = meta.entry_words()
    if words is None:
        return _cuts_at(meta, range(meta.count))
    cuts: set[int] = set()
    shared: list[int] = []
    for number, (flags, place) in enumerate(zip(words[0::3], words[1::3], strict=True)):
        if flags & _SHARED:
            shared.append(number)
        else:
            offset = place & _OFFSET
            cuts.add(offset)
            cuts.add(offset + (place >> _SIZE_SHIFT))
    return cuts | _cuts_at(meta, shared)


def _cuts_at(meta: BlobMeta, numbers: Iterable[int]) -> set[int]:
    cuts: set[int] = set()
    last = (-1, -1)
    for number in numbers:
        chunk = meta.chunk(number)
        # Members of a batch follow each other, and so do those of a gzip context.
        if chunk.is_shared and (chunk.batch_index, chunk.compressed_offset) == last:
            continue
        last = (chunk.batch_index, chunk.compressed_offset) if chunk.is_shared else (-1, -1)
        extent = meta.extent_of(chunk)
        cuts.add(extent.compressed_offset)
        cuts.add(extent.compressed_offset + extent.compressed_size)
    return cuts
