"""Cache files of other blobs, opened to take chunks out of them.

Concurrency: any thread may ask, one at a time (a lock sees to it). A `Donor` is closed when the last that
holds it lets it go, so no reader loses its descriptor.
"""

import logging
import os
import threading
import weakref
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from backend.cache import BlobCache
from backend.chunk_index import blob_key
from backend.chunkmap import ChunkMap, ChunkMapHeader
from backend.shelf import BlobShelf
from rafs.record import FormatError

log = logging.getLogger(__name__)

DONORS_MAX = 64
"""Blobs that one mount takes from at a time, three descriptors each; the least recently used is let go."""


class Donor:
    """One cache file that chunks are taken from, as far as its chunk map marks them."""

    def __init__(self, blob_id: str, descriptor: int, chunk_map: ChunkMap) -> None:
        """Takes over `descriptor` and `chunk_map`."""
        self.blob_id = blob_id
        self.descriptor = descriptor
        self.is_trusted = True
        self._map = chunk_map
        weakref.finalize(self, _close, descriptor, chunk_map)

    def has(self, chunk: int) -> bool:
        """Whether chunk number `chunk` is marked at this moment."""
        return chunk < self._map.chunk_count and chunk in self._map

    def read(self, offset: int, size: int) -> memoryview:
        """Bytes of the decoded file, fewer where it ends; raises `OSError`. Blocking."""
        return memoryview(os.pread(self.descriptor, size, offset))

    def distrust(self, chunk: int) -> None:
        """Chunk `chunk` was marked and had other bytes: nothing is taken from here any more."""
        if self.is_trusted and self.has(chunk):  # else it was forgotten meanwhile, which is no fault
            self.is_trusted = False
            log.warning(
                "cache of blob %s: chunk %d is damaged on the disk; chunks of other images are fetched "
                "instead of copied from it; remove its files while nothing is mounted",
                self.blob_id[:12],
                chunk,
            )


class Donors:
    """The donors of a cache directory by the key of their blob, opened when they are first asked for."""

    def __init__(self, cache_dir: Path, shelf: BlobShelf) -> None:
        """`shelf` has the files that this process has open already."""
        self._cache_dir = cache_dir
        self.directory = BlobCache(cache_dir).directory
        self._shelf = shelf
        self._open: OrderedDict[int, Donor | None] = OrderedDict()
        self._names: dict[int, str] = {}
        self._seen_ns = 0
        self._lock = threading.Lock()

    def get(self, key: int) -> Donor | None:
        """The donor with that key; None when it is not there or cannot be used."""
        with self._lock:
            if key not in self._open:
                self._open[key] = self._find(key)
                if len(self._open) > DONORS_MAX:
                    self._open.popitem(last=False)
            self._open.move_to_end(key)
            donor = self._open[key]
        return donor if donor is not None and donor.is_trusted else None

    def close(self) -> None:
        """Lets all donors go."""
        self._open.clear()

    def refresh(self) -> None:
        """Looks again which files there are, if any came or went: a system call when none did.

        Donors are opened anew then, so that files that were removed do not keep their disk space.
        """
        with self._lock, suppress(OSError):  # a directory that cannot be read has no files that could be
            changed_ns = os.stat(self.directory).st_mtime_ns
            if changed_ns != self._seen_ns:
                ids = [name.removesuffix(".blob.data") for name in os.listdir(self.directory)]
                self._names = {blob_key(blob_id): blob_id for blob_id in ids}
                self._open.clear()
                self._seen_ns = changed_ns

    def _find(self, key: int) -> Donor | None:
        blob_id = self._names.get(key)
        if blob_id is None:
            return None
        path = self.directory / f"{blob_id}.blob.data"
        try:
            chunk_map = _open_map(path.with_name(path.name + ".chunk_map"))
            # One that EROFS mounts is watched: only what was opened before can be read without an event.
            descriptor = self._shelf.duplicate(self._cache_dir, blob_id)
            if descriptor is None:
                try:
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except BaseException:
                    chunk_map.close()
                    raise
        except (FormatError, OSError) as error:
            log.debug("no chunks are copied from blob %s: %s", blob_id[:12], error)
            return None
        return Donor(blob_id, descriptor, chunk_map)


def _open_map(path: Path) -> ChunkMap:
    """A chunk map of a blob whose number of chunks is not known: a bound that its size gives is enough."""
    bytes_of_bits = path.stat().st_size - ChunkMapHeader.SIZE
    if bytes_of_bits <= 0:
        raise FormatError("chunk map", 0, "a bit")
    return ChunkMap.open(path, bytes_of_bits * 8)


def _close(descriptor: int, chunk_map: ChunkMap) -> None:
    chunk_map.close()
    os.close(descriptor)
