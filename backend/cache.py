"""The cache directory: one decoded sparse file for each blob, and which of its chunks are there.

A chunk lies decoded and verified at its uncompressed offset in `blobs/<id>.blob.data`. It is *ready* from
the moment its bytes are written: this process uses it at once. It is *marked* in the chunk map, for other
processes and the next start, by a flush, after its bytes have been made durable; so whatever instant the
machine dies at, every marked chunk is whole. Flushes may be rare: what is ready is also noted in shared
memory, which a process can leave to its successor (`descriptors`), since what it has written the kernel has.

The kernel's EROFS may have the same file as a device, watched by fanotify (fuse/erofs). Then what is done
through a descriptor that was opened after the mark raises events. So an agent opens a file once, before it is
marked, and hands its descriptors on; `CachedBlob` does everything through the one it was given.

Concurrency: `store` runs in worker threads and touches the file only. Everything else that changes presence
(`add`, `flush`, `forget`) belongs to the trio thread; `flush` and `forget` hand the slow part to a thread and
hold `_flush_lock` meanwhile. Nobody may keep "chunk n is ready" across a checkpoint: chunks may be forgotten.
Another thread may look with `is_ready`, read through `descriptor`, and trust what it has read when `epoch` is
still what it was before the look.
"""

import logging
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, Self

import trio

from backend.cache_directory import lock_cache
from backend.chunkmap import ChunkMap
from backend.singleflight import Arrival
from rafs.errors import NydusError
from rafs.record import FormatError

log = logging.getLogger(__name__)

OVERFLOW_BYTES = 32 << 20
"""Decoded bytes of one blob that are kept in memory while the disk takes no more."""


class CacheUnusable(NydusError):
    """The cache directory cannot be used."""

    message = "cache {path}: {why}; use another directory (--cache-dir) or free space"
    exit_code: ClassVar[int] = 122


@dataclass(frozen=True, slots=True)
class BlobShape:
    """What the cache has to know of a blob: its name, the bytes of its decoded file, its number of chunks.

    `is_encoded`: the same of the file with its encoded bytes (backend/encoded.py), in its parts.
    """

    blob_id: str
    size_bytes: int
    chunk_count: int
    is_encoded: bool = False

    @property
    def file_name(self) -> str:
        """The name of the file in the cache directory."""
        return f"{self.blob_id}.blob" if self.is_encoded else f"{self.blob_id}.blob.data"


class PresenceHook(Protocol):
    """Hears of a chunk that is ready now, or no longer."""

    def __call__(self, chunk: int, *, is_ready: bool) -> None:
        """Free of checkpoints."""
        ...


BlobDescriptors = tuple[int, int, int]
"""Data file, chunk map, memory file of what is ready but not marked."""


class CachedBlob:
    """The decoded file of one blob. Made by `BlobCache.open`."""

    def __init__(
        self, shape: BlobShape, file_descriptor: int, chunk_map: ChunkMap, fresh_fd: int | None = None
    ) -> None:
        """Takes over `file_descriptor`, `chunk_map` and the memory file of what is ready but not marked."""
        self.shape = shape
        self.epoch = 0
        """Grows whenever chunks are forgotten."""
        self.on_complete: list[Callable[[], None]] = []
        """Called in the trio thread when the last chunk has become ready."""
        self.on_presence: list[PresenceHook] = []
        """Called in the trio thread when a chunk becomes ready here, or is forgotten."""
        self.arriving: dict[int, Arrival] = {}
        """Extents that some image's fetcher is bringing, by their first chunk."""
        self._fd = file_descriptor
        self._map = chunk_map
        self._fresh_fd = os.memfd_create("nydus-py-fresh", os.MFD_CLOEXEC) if fresh_fd is None else fresh_fd
        os.ftruncate(self._fresh_fd, max(1, -(-shape.chunk_count // 8)))
        self._fresh = mmap.mmap(self._fresh_fd, 0)
        self._mapping: mmap.mmap | None = None
        self._view = memoryview(b"")
        # Ready, not yet marked: chunk -> bytes written (0 when another process has written them).
        self._unmarked: dict[int, int] = dict.fromkeys(self._noted_fresh(), 0)
        self._unmarked_bytes = 0
        self._absent = shape.chunk_count - self.ready_count()
        self._overflow: OrderedDict[int, bytes] = OrderedDict()
        self._overflow_bytes = 0
        self._disk_full_told = False
        self._flush_lock = trio.Lock()
        self._store_lock = threading.Lock()
        self._closed = False

    def is_ready(self, index: int) -> bool:
        """Whether the decoded bytes of chunk `index` are in the file now."""
        return index in self._map or index in self._unmarked

    def is_complete(self) -> bool:
        """Whether every chunk is ready, as far as this process has heard."""
        return self._absent <= 0

    @property
    def descriptor(self) -> int:
        """The data file; not to be closed, nor to be read where chunks are not ready."""
        return self._fd

    @property
    def descriptors(self) -> tuple[int, int, int]:
        """Data file, chunk map and what is ready but not marked, for a successor (`adopt`)."""
        return self._fd, self._map.descriptor, self._fresh_fd

    @classmethod
    def adopt(cls, shape: BlobShape, descriptors: BlobDescriptors) -> Self:
        """Takes over the descriptors of another process's `CachedBlob`. Raises `FormatError`, `OSError`."""
        data_fd, map_fd, fresh_fd = descriptors
        return cls(shape, data_fd, ChunkMap(map_fd, shape.chunk_count), fresh_fd)

    def read(self, offset: int, size: int) -> memoryview:
        """A copy of bytes of the decoded file; raises `CacheUnusable` when somebody has shortened it."""
        data = os.pread(self._fd, size, offset)
        if len(data) != size:
            raise CacheUnusable(path=self.shape.blob_id[:12], why="its file was shortened from outside")
        return memoryview(data)

    def view(self, offset: int, size: int) -> memoryview:
        """Bytes of the decoded file, not copied. They mean something only where chunks are ready."""
        if self._mapping is None:
            try:
                self._mapping = mmap.mmap(self._fd, self.shape.size_bytes, prot=mmap.PROT_READ)
            except OSError:
                # An agent watches the file and does not let others map all of it (fuse/erofs/events.py).
                return self.read(offset, size)
            self._view = memoryview(self._mapping)
        return self._view[offset : offset + size]

    def store(self, offset: int, parts: Sequence[memoryview]) -> None:
        """Writes decoded bytes, at most 1,024 parts of them, from `offset` on; raises `OSError`.

        Blocking: for worker threads.
        """
        remaining = list(parts)
        # The kernel lets one writer in at a time, and others spin meanwhile; here they sleep.
        with self._store_lock:
            while remaining:
                written = os.pwritev(self._fd, remaining, offset)
                offset += written
                remaining = _behind(remaining, written)

    def add(self, index: int, size_bytes: int) -> None:
        """Makes a chunk that `store` has written ready; the next flush marks it."""
        was_ready = self.is_ready(index)
        self._unmarked[index] = size_bytes
        self._unmarked_bytes += size_bytes
        self._fresh[index >> 3] |= 0x80 >> (index & 7)
        self._drop_overflow(index)
        if not was_ready:
            self._absent -= 1
            self._tell_presence(index, is_ready=True)
            self._tell_if_complete()

    def add_unstored(self, index: int, data: bytes, error: OSError) -> None:
        """Keeps the newest chunks that the disk had no room for; says so once."""
        if not self._disk_full_told:
            self._disk_full_told = True
            log.warning(
                "cache of blob %s: %s; reads go on from memory and the source, free space in the cache",
                self.shape.blob_id[:12],
                error.strerror,
            )
        self._drop_overflow(index)
        self._overflow[index] = data
        self._overflow_bytes += len(data)
        while self._overflow_bytes > OVERFLOW_BYTES:
            _, dropped = self._overflow.popitem(last=False)
            self._overflow_bytes -= len(dropped)

    def unstored(self, index: int) -> bytes | None:
        """The bytes of a chunk that is in memory only."""
        return self._overflow.get(index)

    @property
    def unmarked_bytes(self) -> int:
        """Decoded bytes that a flush would mark."""
        return self._unmarked_bytes

    def usage_bytes(self) -> int:
        """Disk space that the decoded file takes."""
        return os.fstat(self._fd).st_blocks * 512

    def ready_count(self) -> int:
        """Number of ready chunks."""
        return self._map.count() + sum(1 for index in self._unmarked if index not in self._map)

    async def flush(self) -> Collection[int]:
        """Makes what was added durable, then marks it; the chunks that are marked now.

        Chunks whose bytes the disk lost are forgotten.
        """
        async with self._flush_lock:
            batch = dict(self._unmarked)
            if not batch:
                return ()
            try:
                await trio.to_thread.run_sync(self._make_durable, batch.keys())
            except OSError as error:
                log.warning(
                    "cache of blob %s: %s; its latest chunks will be fetched again",
                    self.shape.blob_id[:12],
                    error.strerror,
                )
            for index, size in batch.items():
                if self._unmarked.pop(index, None) is not None:
                    self._unmarked_bytes -= size
                    self._forget_fresh(index)
                    if index not in self._map:
                        self._tell_presence(index, is_ready=False)
            # Other processes may have marked chunks too, and a failed flush has lost some.
            self._absent = self.shape.chunk_count - self.ready_count()
            self._tell_if_complete()
            return [index for index in batch if index in self._map]

    async def forget(self, indexes: Collection[int]) -> None:
        """Makes chunks absent, in this process and in others. Their bytes stay in the file, unused."""
        async with self._flush_lock:
            self.epoch += 1
            for index in indexes:
                if self.is_ready(index):
                    self._tell_presence(index, is_ready=False)
                self._unmarked_bytes -= self._unmarked.pop(index, 0)
                self._forget_fresh(index)
                self._drop_overflow(index)
            await trio.to_thread.run_sync(self._map.remove, indexes)
            self._absent = self.shape.chunk_count - self.ready_count()

    def close(self) -> None:
        """Gives the files back; what is not flushed will be fetched again. Views must be gone. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._view.release()
        if self._mapping is not None:
            with suppress(BufferError):  # somebody's traceback holds a view: the mapping goes with it
                self._mapping.close()
        self._map.close()
        self._fresh.close()
        os.close(self._fresh_fd)
        os.close(self._fd)

    def _tell_presence(self, index: int, *, is_ready: bool) -> None:
        for told in self.on_presence:
            told(index, is_ready=is_ready)

    def _tell_if_complete(self) -> None:
        if self._absent <= 0:
            for told in self.on_complete:
                told()

    def _noted_fresh(self) -> Iterator[int]:
        """Chunks that are noted in the shared memory as ready."""
        for place, byte in enumerate(self._fresh[:]):
            if byte:
                yield from (place * 8 + bit for bit in range(8) if byte & 0x80 >> bit)

    def _forget_fresh(self, index: int) -> None:
        self._fresh[index >> 3] &= ~(0x80 >> (index & 7)) & 0xFF

    def _make_durable(self, indexes: Collection[int]) -> None:
        os.fdatasync(self._fd)
        self._map.add(indexes)

    def _drop_overflow(self, index: int) -> None:
        dropped = self._overflow.pop(index, None)
        if dropped is not None:
            self._overflow_bytes -= len(dropped)


def _behind(parts: list[memoryview], size: int) -> list[memoryview]:
    """What of `parts` is left behind their first `size` bytes."""
    for place, part in enumerate(parts):
        if size < len(part):
            return [part[size:], *parts[place + 1 :]]
        size -= len(part)
    return []


class BlobCache:
    """A cache directory. Any number of processes and mounts may use it at once."""

    def __init__(self, directory: Path) -> None:
        """Makes `directory`/blobs; raises `CacheUnusable`."""
        self.directory = directory / "blobs"
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise CacheUnusable(path=directory, why=error.strerror) from error

    def open(self, shape: BlobShape) -> CachedBlob:
        """The decoded file of a blob, made when it is not there. Blocking.

        A file of a wrong size and a chunk map that is none, or belongs to another file, are replaced with a
        WARNING; processes that still use the replaced ones keep a consistent pair. Raises `CacheUnusable`.
        """
        data_path = self.directory / shape.file_name
        try:
            with lock_cache(self.directory):
                return self._open(shape, data_path, data_path.with_name(data_path.name + ".chunk_map"))
        except OSError as error:
            raise CacheUnusable(path=data_path, why=error.strerror) from error

    def usage_bytes(self) -> int:
        """Disk space that all files of the cache take."""
        return sum(path.stat().st_blocks * 512 for path in self.directory.iterdir())

    def _open(self, shape: BlobShape, data_path: Path, map_path: Path) -> CachedBlob:
        fd = _open_data(data_path, shape.size_bytes)
        if fd is None:
            # A map without its data file tells of chunks that are gone: it must go first.
            map_path.unlink(missing_ok=True)
            fd = _create_data(data_path, shape.size_bytes)
        try:
            chunk_map = _open_map(map_path, shape.chunk_count, fd)
            chunk_map = chunk_map or ChunkMap.create(map_path, shape.chunk_count)
            return CachedBlob(shape, fd, chunk_map)
        except BaseException:
            os.close(fd)
            raise


def _open_data(path: Path, size_bytes: int) -> int | None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    found = os.fstat(fd).st_size
    if found == size_bytes:
        return fd
    os.close(fd)
    log.warning("%s has %d bytes instead of %d: it is thrown away", path, found, size_bytes)
    return None


def _create_data(path: Path, size_bytes: int) -> int:
    # Never in place: others may have the old file mapped, and a shortened mapping kills them.
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size_bytes)
        os.rename(fresh, path)
    except BaseException:
        os.close(fd)
        fresh.unlink(missing_ok=True)
        raise
    return fd


def _open_map(path: Path, chunk_count: int, data_fd: int) -> ChunkMap | None:
    try:
        chunk_map = ChunkMap.open(path, chunk_count)
    except FileNotFoundError:
        return None
    except FormatError as error:
        log.warning("%s: %s: it is made anew", path, error)
        return None
    if os.fstat(data_fd).st_blocks == 0 and chunk_map.count():
        log.warning("%s marks chunks of a data file that is empty: it is made anew", path)
        chunk_map.close()
        return None
    return chunk_map
