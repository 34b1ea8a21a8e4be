"""Writes a tar file member by member, under a name of its own until it is complete.

Concurrency: members are appended one at a time, the others wait; a member that fails is cut off again, so the
next one follows the last that was whole.
"""

import hashlib
import os
import tarfile
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import trio

from backend.contract import BlobReader
from backend.manifest import Descriptor
from backend.ocidigest import DigestMismatch
from backend.pieces import pump
from backend.publishing import publish_file, reporting_writes, staging_directory
from backend.tar_index import TAR_BLOCK_BYTES

_STAGED_NAME = "archive"
_USTAR_SIZE_MAX_BYTES = 8**11 - 1


def tar_header(name: str, kind: bytes, mode: int, size_bytes: int) -> bytes:
    """The header of a member that depends on nothing else: no time, no owner. GNU's for 8 GiB and more."""
    entry = tarfile.TarInfo(name.rstrip("/"))
    entry.type, entry.mode, entry.size = kind, mode, size_bytes
    is_small = size_bytes <= _USTAR_SIZE_MAX_BYTES
    return entry.tobuf(tarfile.USTAR_FORMAT if is_small else tarfile.GNU_FORMAT)


class TarMember:
    """A member that is being written: its content first, its header when name and size are known."""

    def __init__(self, writer: "TarWriter") -> None:
        self._writer = writer
        self._content = hashlib.sha256()
        self._size_bytes = 0

    @property
    def digest(self) -> str:
        """Of what was written so far."""
        return f"sha256:{self._content.hexdigest()}"

    def write(self, data: bytes) -> None:
        """Appends content. Blocks. Raises `CannotWrite`."""
        self._content.update(data)
        self._size_bytes += len(data)
        self._writer.append(data)

    def seal(self, name: str) -> None:
        """Makes what was written the regular file `name`; nothing, where there is one already. Blocks."""
        self._writer.seal(name, self._size_bytes)


class TarWriter:
    """A new tar file for `final`, which has that name with `finish`; `close` comes always.

    What is added after `finish` goes into the next such file.
    """

    def __init__(self, final: Path) -> None:
        self._final = final
        self._stack = ExitStack()
        self._lock = trio.Lock()
        self._descriptor = -1
        self._staged = Path()
        self._end = 0
        self._sealed_end = 0
        self._names: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    async def add(self, name: str, data: bytes) -> None:
        """Appends a small file. Raises `CannotWrite`."""
        async with self.member() as member:
            await trio.to_thread.run_sync(member.write, data)
            await trio.to_thread.run_sync(member.seal, name)

    async def add_blob(
        self, name: str, descriptor: Descriptor, reader: BlobReader, on_bytes: Callable[[int], None]
    ) -> None:
        """Appends a blob that is read piece by piece. `on_bytes` gets increments.

        Raises `DigestMismatch`, `CannotWrite` and what the reader raises; then it is not in the file.
        """
        async with self.member() as member:

            async def take(piece: bytes) -> None:
                await trio.to_thread.run_sync(member.write, piece)
                on_bytes(len(piece))

            await pump(reader, descriptor.size_bytes, take)
            if member.digest != descriptor.digest:
                raise DigestMismatch(where=self._final, expected=descriptor.digest, got=member.digest)
            await trio.to_thread.run_sync(member.seal, name)

    @asynccontextmanager
    async def member(self) -> AsyncIterator[TarMember]:
        """The next member; it is in the file once it is sealed."""
        async with self._lock:
            self._end = self._sealed_end + TAR_BLOCK_BYTES
            try:
                yield TarMember(self)
            finally:
                self._end = self._sealed_end

    def append(self, data: bytes) -> None:
        """Content of the open member. Blocks. Raises `CannotWrite`."""
        self._write(data, self._end)
        self._end += len(data)

    def seal(self, name: str, size_bytes: int) -> None:
        """Gives the open member its header. Blocks. Raises `CannotWrite`."""
        if name in self._names:
            return
        self.append(bytes(-size_bytes % TAR_BLOCK_BYTES))
        self._write(tar_header(name, tarfile.REGTYPE, 0o644, size_bytes), self._sealed_end)
        self._sealed_end = self._end
        self._names.add(name)

    async def finish(self) -> None:
        """Gives the file its name, replacing what had it; durable on return. Raises `CannotWrite`."""
        async with self._lock:
            await trio.to_thread.run_sync(self._publish)
            self.close()

    def close(self) -> None:
        """Forgets and removes what was not finished."""
        self._names.clear()
        self._end = self._sealed_end = 0
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._stack.close()

    def _write(self, data: bytes, offset: int) -> None:
        with reporting_writes(self._final):
            view = memoryview(data)
            while view:
                written = os.pwrite(self._open(), view, offset)
                offset += written
                view = view[written:]

    def _open(self) -> int:
        if self._descriptor < 0:
            self._staged = self._stack.enter_context(staging_directory(self._final.parent)) / _STAGED_NAME
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._descriptor = os.open(self._staged, flags, 0o666)
        return self._descriptor

    def _publish(self) -> None:
        with reporting_writes(self._final):
            # Away with what a member that failed has left behind the last whole one; zeros mark the end.
            os.ftruncate(self._open(), self._sealed_end)
            os.ftruncate(self._open(), self._sealed_end + 2 * TAR_BLOCK_BYTES)
        publish_file(self._staged, self._final)
