"""The `BlobReader` contract over the test double: what passes with it must not fail with a real source."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from backend.contract import BlobReader
from backend.memory_blob import MemoryBlobReader
from tests.contract.blob_reader_suite import BlobReaderContract


class TestMemoryReader(BlobReaderContract):
    @asynccontextmanager
    async def open_reader(self, content: bytes, tmp_path: Path) -> AsyncIterator[BlobReader]:
        reader = MemoryBlobReader(content)
        yield reader
        await reader.aclose()
