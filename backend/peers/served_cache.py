"""Cache files as an upload server sees them: another process fills them, and says what it will fill.

The server shares three descriptors with the agent: the data file, its chunk map, and the memory in which the
agent notes what is ready and not yet marked. So it sees a chunk in the moment in which it is ready, and asks
the agent only for what is not. Files with encoded bytes are the same, in parts in place of chunks.
"""

import mmap
import os
import weakref
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Self

import trio

from backend.cache import BlobDescriptors
from backend.chunkmap import ChunkMap
from backend.peers.ranges import CONTENT_TYPE
from rafs.blobmeta import BlobMeta
from rafs.decoded_map import DecodedMap
from rafs.encoded_map import EncodedMap

Fetch = Callable[[int, int], Awaitable[None]]
"""Has the agent bring something from the first byte of a range on. Raises `NotAvailable`."""


class CachedFile:
    """The file of a blob, and what of it is there. It is closed with the last request that has it."""

    def __init__(
        self,
        size_bytes: int,
        chunk_map: ChunkMap,
        parts_in: Callable[[int, int], Sequence[int]],
        start_of: Callable[[int], int],
        descriptors: BlobDescriptors,
        seal: int | None = None,
    ) -> None:
        """Takes the descriptors over, of which `chunk_map` has the second.

        `parts_in` gives the bits of the map that stand for a range, `start_of` where one of them starts.
        `seal` is a bit that has to be set before the file counts as a whole.
        """
        self.size_bytes = size_bytes
        self.descriptor, _, fresh_fd = descriptors
        self._map, self._parts_in, self._start_of, self._seal = chunk_map, parts_in, start_of, seal
        self._fresh = mmap.mmap(fresh_fd, 0, prot=mmap.PROT_READ)
        weakref.finalize(self, _close, self._map, self._fresh, (fresh_fd, self.descriptor))

    @classmethod
    def decoded(cls, size_bytes: int, meta_path: Path, descriptors: BlobDescriptors) -> Self:
        """The decoded bytes. Raises `FormatError`, `OSError`. Blocking: reads the chunk table."""
        with closing(BlobMeta.open(meta_path)) as meta:
            chunk_map = ChunkMap(descriptors[1], meta.count)
            chunks = DecodedMap(meta)
        return cls(size_bytes, chunk_map, chunks.chunks_in, chunks.start_of, descriptors)

    @classmethod
    def encoded(cls, size_bytes: int, meta_path: Path, descriptors: BlobDescriptors) -> Self:
        """The encoded bytes (`backend.encoded`). Otherwise as `decoded`."""
        with closing(BlobMeta.open(meta_path)) as meta:
            parts = EncodedMap.of_blob(meta, size_bytes)
        chunk_map = ChunkMap(descriptors[1], parts.count + 1)
        return cls(size_bytes, chunk_map, parts.parts_in, parts.start_of, descriptors, parts.count)

    def ready_until(self, offset: int, end: int) -> int:
        """See `ServedFile`. All of a file at once is not ready before its seal is."""
        if offset >= end:
            return end
        if (
            self._seal is not None
            and (offset, end) == (0, self.size_bytes)
            and not self._is_ready(self._seal)
        ):
            return offset
        for part in self._parts_in(offset, end - offset):
            if not self._is_ready(part):
                return max(offset, self._start_of(part))
        return end

    def _is_ready(self, part: int) -> bool:
        return part in self._map or bool(self._fresh[part >> 3] & 0x80 >> (part & 7))


def _close(chunk_map: ChunkMap, fresh: mmap.mmap, descriptors: tuple[int, ...]) -> None:
    chunk_map.close()
    fresh.close()
    for descriptor in descriptors:
        os.close(descriptor)


class RequestedFile:
    """A cached file for one request: what it lacks is asked of the agent, for this request's image."""

    media_type = CONTENT_TYPE

    def __init__(self, file: CachedFile, fetch: Fetch, *, only_whole: bool = False) -> None:
        """`only_whole`: nothing is on its way but what makes the whole file."""
        self._only_whole = only_whole
        self._file = file
        self._fetch = fetch
        self.descriptor = file.descriptor
        self.size_bytes = file.size_bytes

    def ready_until(self, offset: int, end: int) -> int:
        """See `ServedFile`."""
        return self._file.ready_until(offset, end)

    def is_arriving(self, offset: int, end: int) -> bool:
        """See `ServedFile`. Only the agent knows: it is asked, and says no then."""
        return not self._only_whole or (offset, end) == (0, self.size_bytes)

    async def wait_ready(self, offset: int, end: int) -> int:
        """See `ServedFile`."""
        while (ready := self._file.ready_until(offset, end)) == offset:
            await self._fetch(offset, end)
        return ready


class DocumentFile:
    """A small file that is whole, such as a manifest. It is closed with the last request that has it."""

    def __init__(self, descriptor: int, media_type: str) -> None:
        """Takes the descriptor over."""
        self.descriptor = descriptor
        self.size_bytes = os.fstat(descriptor).st_size
        self.media_type = media_type.encode()
        weakref.finalize(self, os.close, descriptor)

    def ready_until(self, offset: int, end: int) -> int:
        """See `ServedFile`."""
        return end

    def is_arriving(self, offset: int, end: int) -> bool:
        """See `ServedFile`."""
        return False

    async def wait_ready(self, offset: int, end: int) -> int:
        """See `ServedFile`."""
        await trio.lowlevel.checkpoint()
        return end
