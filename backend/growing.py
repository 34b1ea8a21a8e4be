"""A file that another process still writes, read from its beginning while it grows.

Concurrency: `advance` and `finish` are called in the trio thread, by who hears from the writer; `read` waits
in any number of tasks.
"""

from pathlib import Path

import trio

from backend.upload import ContentIdentity, FileSource


class GrowingFile:
    """An `UploadSource` over a file to which bytes are only appended."""

    def __init__(self, path: Path) -> None:
        self._file = FileSource(path)
        self._available = 0
        self._identity: ContentIdentity | None = None
        self._changed = trio.Event()

    def advance(self, size_bytes: int) -> None:
        """So many bytes are in the file."""
        if size_bytes > self._available:
            self._available = size_bytes
            self._wake()

    def finish(self, identity: ContentIdentity) -> None:
        """Nothing more comes."""
        self._identity = identity
        self._available = identity.size_bytes
        self._wake()

    async def wait_for(self, size_bytes: int) -> bool:
        """Waits until there are so many bytes; False when the file has ended with fewer."""
        while self._available < size_bytes and self._identity is None:
            await self._changed.wait()
        return self._available >= size_bytes

    async def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from byte `offset`; fewer only at the end."""
        await self.wait_for(offset + length)
        return await self._file.read_range(offset, max(0, min(length, self._available - offset)))

    async def identity(self) -> ContentIdentity:
        """What the file is, when it is complete."""
        while self._identity is None:
            await self._changed.wait()
        return self._identity

    def is_end(self, offset: int) -> bool:
        """Whether it is known that there is nothing from byte `offset` on."""
        return self._identity is not None and offset >= self._identity.size_bytes

    def _wake(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()
