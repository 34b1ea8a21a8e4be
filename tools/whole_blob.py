"""The digest of a whole blob, taken while parts of it are read for another reason."""

import hashlib

import trio

from backend.contract import BlobReader
from backend.pieces import PIECE_BYTES


class WholeBlobDigest:
    """Hashes a blob front to back from pieces that come in any order; what is skipped is read here.

    Used by one task. `reader` stays the caller's.
    """

    def __init__(self, reader: BlobReader) -> None:
        self._reader = reader
        self._hash = hashlib.sha256()
        self._position = 0

    async def take(self, offset: int, data: bytes) -> None:
        """The blob's bytes from `offset` on. Raises what the reader raises."""
        await self._read_up_to(offset)
        fresh = memoryview(data)[self._position - offset :]
        await self._update(fresh)

    async def finish(self, size_bytes: int) -> str:
        """The digest in its text form, the blob read up to its end."""
        await self._read_up_to(size_bytes)
        return f"sha256:{self._hash.hexdigest()}"

    async def _read_up_to(self, end: int) -> None:
        while self._position < end:
            length = min(PIECE_BYTES, end - self._position)
            await self._update(await self._reader.read_range(self._position, length))

    async def _update(self, data: bytes | memoryview) -> None:
        if len(data):
            await trio.to_thread.run_sync(self._hash.update, data)
            self._position += len(data)
