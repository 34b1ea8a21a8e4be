"""Writes a tar file member by member, under a name of its own until it is complete.

Concurrency: members are appended one at a time, the others wait; a member that fails is cut off again, so the
next one follows the last that was whole.
"""

import hashlib
import os
import tarfile
from collections.abc import Callable
from contextlib import ExitStack
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
        self._names: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    async def add(self, name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> None:
        """Appends a small file, or a directory. Raises `CannotWrite`."""
        mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
        async with self._lock:
            if name not in self._names:
                member = tar_header(name, kind, mode, len(data)) + data + bytes(-len(data) % TAR_BLOCK_BYTES)
                await trio.to_thread.run_sync(self._append, member)
                self._names.add(name)

    async def add_blob(
        self, name: str, descriptor: Descriptor, reader: BlobReader, on_bytes: Callable[[int], None]
    ) -> None:
        """Appends a blob that is read piece by piece. `on_bytes` gets increments.

        Raises `DigestMismatch`, `CannotWrite` and what the reader raises; then it is not in the file.
        """
        content = hashlib.sha256()

        async def take(piece: bytes) -> None:
            await trio.to_thread.run_sync(content.update, piece)
            await trio.to_thread.run_sync(self._append, piece)
            on_bytes(len(piece))

        async with self._lock:
            if name in self._names:
                return
            start, size_bytes = self._end, descriptor.size_bytes
            try:
                header = tar_header(name, tarfile.REGTYPE, 0o644, size_bytes)
                await trio.to_thread.run_sync(self._append, header)
                await pump(reader, size_bytes, take)
                await trio.to_thread.run_sync(self._append, bytes(-size_bytes % TAR_BLOCK_BYTES))
                got = f"sha256:{content.hexdigest()}"
                if got != descriptor.digest:
                    raise DigestMismatch(where=self._final, expected=descriptor.digest, got=got)
            except BaseException:
                self._end = start
                raise
            self._names.add(name)

    async def finish(self) -> None:
        """Gives the file its name, replacing what had it; durable on return. Raises `CannotWrite`."""
        async with self._lock:
            await trio.to_thread.run_sync(self._append, bytes(2 * TAR_BLOCK_BYTES))
            await trio.to_thread.run_sync(self._publish)
            self.close()

    def close(self) -> None:
        """Forgets and removes what was not finished."""
        self._names.clear()
        self._end = 0
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._stack.close()

    def _append(self, data: bytes) -> None:
        with reporting_writes(self._final):
            if self._descriptor < 0:
                self._staged = self._stack.enter_context(staging_directory(self._final.parent)) / _STAGED_NAME
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self._descriptor = os.open(self._staged, flags, 0o666)
            view = memoryview(data)
            while view:
                written = os.pwrite(self._descriptor, view, self._end)
                self._end += written
                view = view[written:]

    def _publish(self) -> None:
        with reporting_writes(self._final):
            # What a failed last member has left behind the end.
            os.ftruncate(self._descriptor, self._end)
        publish_file(self._staged, self._final)
