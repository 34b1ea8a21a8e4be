"""Decoded cache files as an upload server sees them: another process fills them, and says what it will fill.

The server shares three descriptors with the agent: the data file, its chunk map, and the memory in which the
agent notes what is ready and not yet marked. So it sees a chunk in the moment in which it is ready, and asks
the agent only for what is not.
"""

import mmap
import os
import weakref
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

from backend.cache import BlobDescriptors
from backend.chunkmap import ChunkMap
from rafs.blobmeta import BlobMeta
from rafs.decoded_map import DecodedMap

Fetch = Callable[[int, int], Awaitable[None]]
"""Has the agent bring something from the first byte of a range on. Raises `NotAvailable`."""


class CachedFile:
    """The decoded file of a blob. It is closed with the last request that has it."""

    def __init__(self, size_bytes: int, meta_path: Path, descriptors: BlobDescriptors) -> None:
        """Takes the descriptors over. Raises `FormatError`, `OSError`. Blocking: reads the chunk table."""
        self.size_bytes = size_bytes
        self.descriptor, map_fd, fresh_fd = descriptors
        with closing(BlobMeta.open(meta_path)) as meta:
            self._map = ChunkMap(map_fd, meta.count)
            self._chunks = DecodedMap(meta)
        self._fresh = mmap.mmap(fresh_fd, 0, prot=mmap.PROT_READ)
        weakref.finalize(self, _close, self._map, self._fresh, (fresh_fd, self.descriptor))

    def ready_until(self, offset: int, end: int) -> int:
        """See `ServedFile`."""
        if offset >= end:
            return end
        for chunk in self._chunks.chunks_in(offset, end - offset):
            if not self._is_ready(chunk):
                return max(offset, self._chunks.start_of(chunk))
        return end

    def _is_ready(self, chunk: int) -> bool:
        return chunk in self._map or bool(self._fresh[chunk >> 3] & 0x80 >> (chunk & 7))


def _close(chunk_map: ChunkMap, fresh: mmap.mmap, descriptors: tuple[int, ...]) -> None:
    chunk_map.close()
    fresh.close()
    for descriptor in descriptors:
        os.close(descriptor)


class RequestedFile:
    """A cached file for one request: what it lacks is asked of the agent, for this request's image."""

    def __init__(self, file: CachedFile, fetch: Fetch) -> None:
        self._file = file
        self._fetch = fetch
        self.descriptor = file.descriptor
        self.size_bytes = file.size_bytes

    def ready_until(self, offset: int, end: int) -> int:
        """See `ServedFile`."""
        return self._file.ready_until(offset, end)

    def is_arriving(self, offset: int, end: int) -> bool:
        """See `ServedFile`. Only the agent knows: it is asked, and says no then."""
        return True

    async def wait_ready(self, offset: int, end: int) -> int:
        """See `ServedFile`."""
        while (ready := self._file.ready_until(offset, end)) == offset:
            await self._fetch(offset, end)
        return ready
