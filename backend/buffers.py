"""Memory that fetches read into, used again and again.

Fresh memory costs a page fault for every 4 KiB, about as much as what is then done with the bytes.
"""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

HUGE_PAGE_BYTES = 2 << 20
SIZE_MIN_BYTES = 256 << 10
KEPT_MAX_BYTES = 16 << 20
"""Of idle memory: enough for the runs of one readahead window."""


class BufferPool:
    """Lends buffers; keeps what comes back, up to `kept_max_bytes`. For one thread."""

    def __init__(self, kept_max_bytes: int = KEPT_MAX_BYTES) -> None:
        self._kept_max_bytes = kept_max_bytes
        self._kept: dict[int, list[mmap.mmap]] = {}
        self.kept_bytes = 0

    @contextmanager
    def lent(self, size_bytes: int) -> Iterator[memoryview]:
        """A buffer of `size_bytes`, with whatever was in it before, for the time of a with block.

        Whoever was given a part of it must have let go of it at the end of the block.
        """
        room = max(SIZE_MIN_BYTES, 1 << max(0, size_bytes - 1).bit_length())
        memory = self._take(room)
        try:
            yield memoryview(memory)[:size_bytes]
        finally:
            if self.kept_bytes + room <= self._kept_max_bytes:
                self._kept.setdefault(room, []).append(memory)
                self.kept_bytes += room

    def _take(self, room: int) -> mmap.mmap:
        kept = self._kept.get(room)
        if kept:
            self.kept_bytes -= room
            return kept.pop()
        memory = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if room >= HUGE_PAGE_BYTES:
            memory.madvise(mmap.MADV_HUGEPAGE)
        return memory
