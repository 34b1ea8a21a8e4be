"""An archive file that is open: its members are read by offset, straight out of the file.

Concurrency: the index is made once, by the first task that needs it; the others wait for it. What was opened
stays readable when the file loses its name to a new one.
"""

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from backend.contract import BackendError, BlobNotFound, ShortRead
from backend.fileblob import READERS_MAX, FileBlobReader
from backend.manifest import MANIFEST_SIZE_MAX_BYTES
from backend.tar_index import ArchiveBroken, Member, TarIndex, index_tar

Locate = Callable[[], Awaitable[Member]]


class ArchiveFile:
    """The members of one archive. `where` is what errors name it by."""

    def __init__(self, path: Path, where: str) -> None:
        self._where = where
        self._file = FileBlobReader(path, trio.CapacityLimiter(READERS_MAX))
        self._lock = trio.Lock()
        self._index: TarIndex | None = None

    async def index(self) -> TarIndex:
        """Where the members are. Raises `BlobNotFound` for a missing file, `ArchiveBroken`."""
        async with self._lock:
            if self._index is None:
                self._index = await self._file.use(lambda descriptor: index_tar(descriptor, self._where))
            return self._index

    async def find(self, name: str) -> Member:
        """A member. Raises `BlobNotFound` and as `index` does."""
        member = (await self.index()).find(name)
        if member is None:
            raise BlobNotFound(where=f"{self._where}, {name}")
        return member

    async def read_document(self, name: str) -> bytes | None:
        """All of a small member; None where there is none. Raises `ArchiveBroken` for a large one."""
        member = (await self.index()).find(name)
        if member is None:
            return None
        if member.size_bytes > MANIFEST_SIZE_MAX_BYTES:
            why = f"{name} has {member.size_bytes} bytes, more than {MANIFEST_SIZE_MAX_BYTES}"
            raise ArchiveBroken(where=self._where, why=why)
        return await self.read(member, 0, member.size_bytes)

    async def read(self, member: Member, offset: int, length: int) -> bytes:
        """Bytes of a member, which must have them."""
        return await self._file.read_range(member.offset + offset, length)

    async def digest(self, member: Member, step_bytes: int = 4 << 20) -> str:
        """The digest of a member, all of which is read."""
        content = hashlib.sha256()
        for offset in range(0, member.size_bytes, step_bytes):
            piece = await self.read(member, offset, min(step_bytes, member.size_bytes - offset))
            await trio.to_thread.run_sync(content.update, piece)
        return f"sha256:{content.hexdigest()}"

    async def aclose(self) -> None:
        """Closes the file; readers of its members fail from then on."""
        await self._file.aclose()


class MemberReader:
    """A `BlobReader` over one member, which is looked for when it is first read."""

    def __init__(self, archive: ArchiveFile, locate: Locate, label: str) -> None:
        self._archive = archive
        self._locate = locate
        self._label = label
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<MemberReader {self._label}{' closed' if self._is_closed else ''}>"

    async def size(self) -> int:
        """Length of the member in bytes."""
        return (await self._member()).size_bytes

    async def read_range(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from byte `offset` of the member."""
        if offset < 0 or length < 0:
            raise ValueError(f"negative range: offset {offset}, length {length}")
        member = await self._member()
        available = max(0, member.size_bytes - offset)
        if length > available:
            raise ShortRead(where=self._label, offset=offset, length=length, got=available)
        return await self._archive.read(member, offset, length)

    async def aclose(self) -> None:
        """The archive stays open for others."""
        await trio.lowlevel.checkpoint()
        self._is_closed = True

    async def _member(self) -> Member:
        if self._is_closed:
            raise BackendError(where=self._label, why="the reader is closed")
        return await self._locate()
