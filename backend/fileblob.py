"""A blob that is a local file: read by ranges, written once its digest is proven.

Concurrency: counters belong to the trio thread, the descriptor to the worker threads; it is opened by the
first read and closed when the reader is closed and the last read has returned.
"""

import errno
import hashlib
import os
import stat
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar, TypeVar

import trio

from backend.contract import BackendError, BlobNotFound, BlobReader, ShortRead
from backend.manifest import Descriptor
from backend.ocidigest import DigestMismatch
from backend.pieces import pump
from backend.publishing import publish_file, reporting_writes, staging_directory

Result = TypeVar("Result")

_HASH_STEP_BYTES = 4 << 20
RWF_DONTCACHE = 0x80
"""Of preadv2(2), Linux 6.14: pages that the read brings into memory leave it again."""
_NO_SUCH_FLAG = frozenset({errno.EOPNOTSUPP, errno.EINVAL})
READERS_MAX = 16
"""Threads that read local blobs of one store at the same time."""


class NotABlobFile(BackendError):
    """Something that is no regular file stands where a blob should be."""

    message = "{where}: not a regular file; a blob was expected there"
    exit_code: ClassVar[int] = 115


class FileBlobReader:
    """A `BlobReader` over a local file. The file stays readable when its name goes away during use."""

    def __init__(self, path: Path, limiter: trio.CapacityLimiter) -> None:
        self._path = path
        self._limiter = limiter
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._active = 0
        self._is_closed = False
        self._read_flags = RWF_DONTCACHE

    def __repr__(self) -> str:
        return f"<FileBlobReader {self._path}{' closed' if self._is_closed else ''}>"

    async def size(self) -> int:
        """Length of the file in bytes."""
        return await self.use(lambda descriptor: os.fstat(descriptor).st_size)

    async def read_range(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from byte `offset`."""
        if offset < 0 or length < 0:
            raise ValueError(f"negative range: offset {offset}, length {length}")
        return await self.use(lambda descriptor: self._read(descriptor, offset, length))

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` from byte `offset` on, and leaves nothing in the page cache that was not there.

        What is fetched this way goes to the cache, so that nobody reads it here again.
        """
        if offset < 0:
            raise ValueError(f"negative range: offset {offset}")
        await self.use(lambda descriptor: self._read_into(descriptor, offset, buffer))

    async def aclose(self) -> None:
        """Closes the file once running reads have returned."""
        await trio.lowlevel.checkpoint()
        self._is_closed = True
        self._close_if_idle()

    async def use(self, work: Callable[[int], Result]) -> Result:
        """What `work` makes of the open descriptor, in a thread. Raises `BackendError`s for an `OSError`."""
        if self._is_closed:
            raise BackendError(where=self._path, why="the reader is closed")
        self._active += 1
        try:
            return await trio.to_thread.run_sync(lambda: work(self._open()), limiter=self._limiter)
        except FileNotFoundError as error:
            raise BlobNotFound(where=self._path) from error
        except OSError as error:
            raise BackendError(where=self._path, why=error.strerror or str(error)) from error
        finally:
            self._active -= 1
            self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._is_closed and not self._active and self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        with self._lock:
            if self._descriptor is None:
                # Non-blocking, because opening a FIFO without a writer would never return.
                descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    os.close(descriptor)
                    raise NotABlobFile(where=self._path)
                self._descriptor = descriptor
            return self._descriptor

    def _read_into(self, descriptor: int, offset: int, buffer: memoryview) -> None:
        self._expect_length(descriptor, offset, len(buffer))
        done = 0
        while done < len(buffer):
            got = self._preadv(descriptor, buffer[done:], offset + done)
            if not got:
                raise ShortRead(where=self._path, offset=offset, length=len(buffer), got=done)
            done += got

    def _preadv(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        try:
            return os.preadv(descriptor, [buffer], offset, self._read_flags)
        except OSError as error:
            if error.errno not in _NO_SUCH_FLAG or not self._read_flags:
                raise
            self._read_flags = 0
            return os.preadv(descriptor, [buffer], offset)

    def _expect_length(self, descriptor: int, offset: int, length: int) -> None:
        available = max(0, os.fstat(descriptor).st_size - offset)
        if length > available:
            raise ShortRead(where=self._path, offset=offset, length=length, got=available)

    def _read(self, descriptor: int, offset: int, length: int) -> bytes:
        # Asked first, since a read allocates all of `length` whatever there is to read.
        self._expect_length(descriptor, offset, length)
        data = os.pread(descriptor, length, offset)
        while len(data) < length:
            more = os.pread(descriptor, length - len(data), offset + len(data))
            if not more:
                raise ShortRead(where=self._path, offset=offset, length=length, got=len(data))
            data += more
        return data


@asynccontextmanager
async def open_file_blob(path: Path, limiter: trio.CapacityLimiter) -> AsyncIterator[FileBlobReader]:
    """A reader that is closed with the context."""
    reader = FileBlobReader(path, limiter)
    try:
        yield reader
    finally:
        with trio.CancelScope(shield=True):
            await reader.aclose()


def has_content(path: Path, digest: str, size_bytes: int) -> bool:
    """Whether `path` is a regular file of that size and digest. To be called in a thread of trio's.

    A file that cannot be read counts as one that is not there: it is to be replaced. Cancellation ends it.
    """
    content = hashlib.sha256()
    try:
        if not path.is_file() or path.stat().st_size != size_bytes:
            return False
        with path.open("rb", buffering=0) as file:
            while piece := file.read(_HASH_STEP_BYTES):
                content.update(piece)
                trio.from_thread.check_cancelled()
    except OSError:
        return False
    return f"sha256:{content.hexdigest()}" == digest


async def store_blob(
    reader: BlobReader,
    descriptor: Descriptor,
    final: Path,
    staging_parent: Path,
    on_bytes: Callable[[int], None],
) -> None:
    """Copies a blob to `final`, which appears whole and with the right digest or not at all.

    Raises `DigestMismatch`, `CannotWrite` and what the reader raises.
    """
    with staging_directory(staging_parent) as staging:
        writer = _VerifiedFile(staging / descriptor.hex)

        async def take(piece: bytes) -> None:
            await trio.to_thread.run_sync(writer.write, piece)
            on_bytes(len(piece))

        try:
            await pump(reader, descriptor.size_bytes, take)
        finally:
            writer.close()
        writer.check(descriptor.digest, where=str(final))
        await trio.to_thread.run_sync(publish_file, staging / descriptor.hex, final)


async def link_blob(path: Path, final: Path, staging_parent: Path) -> bool:
    """Makes `path` itself the blob `final`; False where the file system cannot link them."""
    with staging_directory(staging_parent) as staging:
        staged = staging / final.name
        try:
            os.link(path, staged)
        except OSError:
            return False
        await trio.to_thread.run_sync(publish_file, staged, final)
        return True


class _VerifiedFile:
    """A new file whose bytes are hashed while they are written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hash = hashlib.sha256()
        with reporting_writes(path):
            self._output = path.open("xb", buffering=0)

    def write(self, piece: bytes) -> None:
        self._hash.update(piece)
        with reporting_writes(self._path):
            view = memoryview(piece)
            while view:
                view = view[self._output.write(view) :]

    def close(self) -> None:
        self._output.close()

    def check(self, expected: str, where: str) -> None:
        got = f"sha256:{self._hash.hexdigest()}"
        if got != expected:
            raise DigestMismatch(where=where, expected=expected, got=got)
