"""One device of EROFS mounts: the cache file of a blob, and who can fetch what it lacks."""

import errno
import os
from collections.abc import Callable, Sequence
from typing import ClassVar

import trio

from backend.cache import CachedBlob
from backend.fetch import ChunkFetcher
from fuse.filesystem import FETCH_ATTEMPTS
from rafs.errors import NydusError


class NotStored(NydusError):
    """Chunks were fetched and verified, and the disk would not take them: the kernel cannot read them."""

    message = "blob {blob_id}: its cache file takes no more; free space in the cache"
    exit_code: ClassVar[int] = 82
    errno: ClassVar[int] = errno.ENOSPC


class DeviceShortened(NydusError):
    """Somebody cut the cache file while it was a device of a mount."""

    message = "blob {blob_id}: its cache file was shortened from outside; unmount, and mount again"
    exit_code: ClassVar[int] = 83


class BlobDevice:
    """A cache file that is a device of at least one EROFS mount.

    Every mount brings a fetcher of its own: their images may name different chunks of the blob, and have
    different sources.
    """

    def __init__(self, cached: CachedBlob, release: Callable[[], None]) -> None:
        """`release` stops the watch when nothing is lacking any more."""
        self.cached = cached
        self.release = release
        self.fetchers: tuple[ChunkFetcher, ...] = ()
        self.is_watched = True

    @property
    def size_bytes(self) -> int:
        """What the file must be long."""
        return self.cached.shape.size_bytes

    def missing(self, offset: int, size: int) -> Sequence[int]:
        """Numbers of the chunks under a range that are not ready."""
        is_ready = self.cached.is_ready
        chunks = self.fetchers[0].decoded_map.chunks_in(offset, size)
        return [number for number in chunks if not is_ready(number)]

    def read_ready(self, offset: int, size: int, token: trio.lowlevel.TrioToken) -> bool:
        """Whether the kernel may read that range now; if so, it counts as read, and readahead is told.

        For any thread; `token` is that of the trio thread.
        """
        fetchers = self.fetchers
        if not fetchers:
            return False
        chunks = fetchers[0].decoded_map.chunks_in(offset, size)
        if not all(map(self.cached.is_ready, chunks)):
            return False
        if chunks:
            fetchers[0].note_hit(chunks[0], chunks[-1], token)
        return True

    async def fill(self, offset: int, size: int) -> None:
        """Makes the file whole from `offset` on for `size` bytes; whole chunks, and what readahead adds.

        Raises what the fetchers raise, the last one's, when all have failed, `NotStored`, `DeviceShortened`.
        """
        failure: NydusError | None = None
        for _ in range(FETCH_ATTEMPTS):
            wanted = self.missing(offset, size)
            if not wanted:
                self._require_length()
                return
            failure = await self._fetch(wanted)
            if failure is not None and not isinstance(failure, NotStored):
                break
        raise failure or NotStored(blob_id=self.cached.shape.blob_id[:12])

    def _require_length(self) -> None:
        if os.fstat(self.cached.descriptor).st_size < self.size_bytes:
            raise DeviceShortened(blob_id=self.cached.shape.blob_id[:12])

    async def _fetch(self, wanted: Sequence[int]) -> NydusError | None:
        """Asks the fetchers in turn; the error of the last one when none has helped."""
        failure: NydusError | None = None
        able = [fetcher for fetcher in self.fetchers if all(map(fetcher.can_verify, wanted))]
        for fetcher in able or self.fetchers:
            fetcher.touch(wanted[0], wanted[-1])
            try:
                unstored = await fetcher.ensure_chunks(wanted)
            except NydusError as error:
                failure = error
            else:
                return NotStored(blob_id=self.cached.shape.blob_id[:12]) if unstored else None
        await trio.lowlevel.checkpoint()
        return failure
