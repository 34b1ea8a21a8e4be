"""The open cache files of a process: each blob once, however many mounts use it.

Concurrency: `open` may run in a worker thread, one call at a time for a whole shelf (a lock sees to it);
`close` belongs to the trio thread.
"""

import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from backend.cache import BlobCache, BlobDescriptors, BlobShape, CachedBlob
from rafs.record import FormatError

log = logging.getLogger(__name__)


class BlobShelf:
    """Hands out `CachedBlob`s by cache directory and blob, and closes each with its last user."""

    def __init__(self, held: Mapping[str, BlobDescriptors] | None = None) -> None:
        """`held`: what an earlier process has left, by `key`; taken over."""
        self._held = dict(held or {})
        self._open: dict[str, tuple[CachedBlob, int]] = {}
        self._lock = threading.Lock()

    @staticmethod
    def key(cache_dir: Path, shape: BlobShape) -> str:
        """What names a cache file. Images that disagree on a blob's shape do not share it."""
        kind = ".encoded" if shape.is_encoded else ""
        return f"{cache_dir}/{shape.blob_id}{kind}/{shape.size_bytes}-{shape.chunk_count}"

    def open(self, cache_dir: Path, shape: BlobShape) -> CachedBlob:
        """The cache file of a blob; `close` it as often as it was opened. Blocking.

        Raises `CacheUnusable`.
        """
        key = self.key(cache_dir, shape)
        with self._lock:
            known = self._open.get(key)
            cached = known[0] if known else self._adopt(key, shape) or BlobCache(cache_dir).open(shape)
            self._open[key] = (cached, known[1] + 1 if known else 1)
        return cached

    def duplicate(self, cache_dir: Path, blob_id: str) -> int | None:
        """A descriptor of the data file of a blob that is open here, for the caller to close; else None."""
        prefix = f"{cache_dir}/{blob_id}/"
        with self._lock:
            for key, (cached, _) in self._open.items():
                if key.startswith(prefix):
                    return os.dup(cached.descriptor)
            for key, (descriptor, *_) in self._held.items():
                if key.startswith(prefix):
                    return os.dup(descriptor)
        return None

    def close(self, cache_dir: Path, cached: CachedBlob) -> None:
        """Gives back what `open` gave."""
        key = self.key(cache_dir, cached.shape)
        _, users = self._open.pop(key)
        if users > 1:
            self._open[key] = (cached, users - 1)
        else:
            cached.close()

    def _adopt(self, key: str, shape: BlobShape) -> CachedBlob | None:
        held = self._held.pop(key, None)
        if held is None:
            return None
        try:
            if os.fstat(held[0]).st_size != shape.size_bytes:
                raise FormatError("cache file", 0, f"{shape.size_bytes} bytes")
            return CachedBlob.adopt(shape, held)
        except (FormatError, OSError) as error:
            log.error("cache file of blob %s: %s; it was changed from outside", shape.blob_id[:12], error)
            raise
