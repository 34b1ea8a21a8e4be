"""The `BlobReader` contract over a registry that answers by itself, that redirects, and without ranges."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from backend.contract import BlobReader
from backend.credentials import NoCredentials
from backend.ocidigest import digest_of
from backend.reference import RegistryReference
from backend.registry import RegistryClient, RegistryOptions
from tests.contract.blob_reader_suite import MissingBlobContract
from tests.contract.fault_server import Asked, FaultServer, Reply, fault_server, ranged

OPTIONS = RegistryOptions(plain_http=True, credentials=NoCredentials())


@asynccontextmanager
async def opened(server: FaultServer, digest: str, size_bytes: int | None) -> AsyncIterator[BlobReader]:
    async with RegistryClient(RegistryReference(server.host, "a/b"), OPTIONS) as client:
        yield client.open_blob(digest, size_bytes)


class RegistryReaderContract(MissingBlobContract):
    @asynccontextmanager
    async def open_absent(self, tmp_path: Path) -> AsyncIterator[BlobReader]:
        digest = digest_of(b"absent")
        async with fault_server(lambda asked: Reply(404)) as server, opened(server, digest, None) as reader:
            yield reader


class TestRegistryReader(RegistryReaderContract):
    @asynccontextmanager
    async def open_reader(self, content: bytes, tmp_path: Path) -> AsyncIterator[BlobReader]:
        digest = digest_of(content)

        def answer(asked: Asked) -> Reply:
            return ranged(asked, content) if asked.path == f"/v2/a/b/blobs/{digest}" else Reply(404)

        async with fault_server(answer) as server, opened(server, digest, None) as reader:
            yield reader


class TestRedirectedReader(RegistryReaderContract):
    @asynccontextmanager
    async def open_reader(self, content: bytes, tmp_path: Path) -> AsyncIterator[BlobReader]:
        async with fault_server(lambda asked: ranged(asked, content)) as storage:
            digest = digest_of(content)
            redirect = Reply(307, (("Location", f"{storage.url}/bucket/object?signature=x"),))
            async with (
                fault_server(lambda asked: redirect) as server,
                opened(server, digest, len(content)) as reader,
            ):
                yield reader


class TestReaderWithoutRanges(RegistryReaderContract):
    @asynccontextmanager
    async def open_reader(self, content: bytes, tmp_path: Path) -> AsyncIterator[BlobReader]:
        def answer(asked: Asked) -> Reply:
            return Reply(length=len(content)) if asked.method == "HEAD" else Reply(body=content)

        async with fault_server(answer) as server, opened(server, digest_of(content), None) as reader:
            yield reader
