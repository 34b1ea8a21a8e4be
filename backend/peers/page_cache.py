"""Reads files without stopping the loop for a disk: what is in the page cache at once, the rest in a thread.

A page that is not in memory costs a millisecond and more, for every client of the loop. A read of one byte
with RWF_NOWAIT says in half a microsecond whether a page is there.

Concurrency: a probe may be outdated when the bytes are read; then the loop waits for the disk, once.
"""

import errno
import os

import trio

from backend.peers.server_counters import ServerCounters

PROBE_STEP_BYTES = 128 << 10  # the kernel's readahead brings in this much at a time: read_ahead_kb
READ_IN_BYTES = 1 << 20


def is_cached(descriptor: int, offset: int, end: int) -> bool:
    """Whether [offset, end) is in memory, as far as one page in 128 KiB tells."""
    byte = bytearray(1)
    try:
        for position in range(offset, end, PROBE_STEP_BYTES):
            os.preadv(descriptor, (byte,), position, os.RWF_NOWAIT)
    except OSError as error:
        return _is_memory(error)
    return True


def read_cached(descriptor: int, buffer: memoryview, offset: int) -> bool:
    """Fills `buffer` if all of it is in memory, and says whether it was."""
    try:
        return os.preadv(descriptor, (buffer,), offset, os.RWF_NOWAIT) == len(buffer)
    except OSError as error:
        if _is_memory(error):
            return os.preadv(descriptor, (buffer,), offset) == len(buffer)
        return False


def _is_memory(error: OSError) -> bool:
    """Which of its two errors a read with RWF_NOWAIT had; raises all others.

    A page that is not in memory is EAGAIN. File systems that cannot say (tmpfs) are taken for memory.
    """
    if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
        raise error
    return error.errno == errno.EOPNOTSUPP


class PageCache:
    """Brings files into memory in threads of its own."""

    def __init__(self, threads: int, counters: ServerCounters) -> None:
        self._limiter = trio.CapacityLimiter(threads)
        self._counters = counters

    async def read_in(self, descriptor: int, offset: int, end: int) -> None:
        """Has the kernel read [offset, end), 1 MiB at most of it. A checkpoint."""
        self._counters.cold_reads += 1
        await trio.to_thread.run_sync(
            _read_in, descriptor, offset, min(end, offset + READ_IN_BYTES), limiter=self._limiter
        )

    async def fill(self, descriptor: int, buffer: memoryview, offset: int) -> None:
        """Reads into `buffer`, in a thread unless it is in memory. Raises `EOFError` where the file ends."""
        if not read_cached(descriptor, buffer, offset):
            await self.read(descriptor, buffer, offset)

    async def read(self, descriptor: int, buffer: memoryview, offset: int) -> None:
        """Reads into `buffer` in a thread. Raises `EOFError` where the file ends. A checkpoint."""
        self._counters.cold_reads += 1
        await trio.to_thread.run_sync(_fill, descriptor, buffer, offset, limiter=self._limiter)


def _read_in(descriptor: int, offset: int, end: int) -> None:
    os.posix_fadvise(descriptor, offset, end - offset, os.POSIX_FADV_WILLNEED)
    for position in range(offset, end, PROBE_STEP_BYTES):
        os.pread(descriptor, 1, position)
    os.pread(descriptor, 1, end - 1)


def _fill(descriptor: int, buffer: memoryview, offset: int) -> None:
    while buffer:
        count = os.preadv(descriptor, (buffer,), offset)
        if count == 0:
            raise EOFError
        buffer, offset = buffer[count:], offset + count
