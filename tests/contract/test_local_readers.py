"""The `BlobReader` contract over local files: bare, in a directory image, in a layout, in an archive."""

import errno
import io
import os
import tarfile
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import trio

from backend.contract import BackendError, BlobReader, InPlaceReader, ShortRead
from backend.fileblob import RWF_DONTCACHE, FileBlobReader
from backend.ocidigest import digest_of
from backend.reference import DirReference, LayoutReference, OciArchiveReference, Reference
from backend.store import open_store
from tests.contract.blob_reader_suite import MissingBlobContract

ABSENT_ID = "0" * 64


class TestFileReader(MissingBlobContract):
    @asynccontextmanager
    async def open_reader(self, content: bytes, tmp_path: Path) -> AsyncIterator[BlobReader]:
        (tmp_path / "blob").write_bytes(content)
        reader = FileBlobReader(tmp_path / "blob", trio.CapacityLimiter(4))
        yield reader
        await reader.aclose()

    @asynccontextmanager
    async def open_absent(self, tmp_path: Path) -> AsyncIterator[BlobReader]:
        reader = FileBlobReader(tmp_path / "absent", trio.CapacityLimiter(4))
        yield reader
        await reader.aclose()


async def in_place_reader(tmp_path: Path, content: bytes) -> FileBlobReader:
    (tmp_path / "blob").write_bytes(content)
    reader = FileBlobReader(tmp_path / "blob", trio.CapacityLimiter(4))
    assert isinstance(reader, InPlaceReader)
    return reader


async def test_bytes_can_be_put_in_place(tmp_path: Path) -> None:
    content = bytes(range(256)) * 100
    reader = await in_place_reader(tmp_path, content)
    buffer = bytearray(b"\xff" * 1000)
    await reader.read_into(77, memoryview(buffer)[100:900])
    assert buffer == b"\xff" * 100 + content[77:877] + b"\xff" * 100
    with pytest.raises(ShortRead):
        await reader.read_into(len(content) - 10, memoryview(bytearray(11)))
    with pytest.raises(ValueError, match="negative"):
        await reader.read_into(-1, memoryview(bytearray(11)))
    await reader.aclose()
    with pytest.raises(BackendError):
        await reader.read_into(0, memoryview(buffer))


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
async def test_file_systems_that_must_cache_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    reader = await in_place_reader(tmp_path, b"content")
    preadv, flags_seen = os.preadv, []

    def refusing(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        flags_seen.append(flags)
        if flags:
            raise OSError(number, os.strerror(number))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refusing)
    for _ in range(2):
        buffer = bytearray(4)
        await reader.read_into(3, memoryview(buffer))
        assert buffer == b"tent"
    assert flags_seen == [RWF_DONTCACHE, 0, 0]
    await reader.aclose()


class _StoredBlob(MissingBlobContract):
    """A blob of an image store on disk; `blobs` is where the store keeps them below its directory."""

    blobs: str

    def reference(self, directory: Path) -> Reference:
        raise NotImplementedError

    def open_reader(self, content: bytes, tmp_path: Path) -> AbstractAsyncContextManager[BlobReader]:
        blob_id = digest_of(content).removeprefix("sha256:")
        blob = tmp_path / self.blobs / blob_id
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        return self._opened(tmp_path, blob_id, len(content))

    @asynccontextmanager
    async def open_absent(self, tmp_path: Path) -> AsyncIterator[BlobReader]:
        async with self._opened(tmp_path, ABSENT_ID, 10) as reader:
            yield reader

    @asynccontextmanager
    async def _opened(self, directory: Path, blob_id: str, size_bytes: int) -> AsyncIterator[BlobReader]:
        async with open_store(self.reference(directory)) as store:
            reader = store.open_blob(blob_id, size_bytes)
            yield reader
            await reader.aclose()


class TestDirReader(_StoredBlob):
    blobs = "blobs"

    def reference(self, directory: Path) -> Reference:
        return DirReference(directory)


class TestLayoutReader(_StoredBlob):
    blobs = "blobs/sha256"

    def reference(self, directory: Path) -> Reference:
        return LayoutReference(directory, "v1")


class TestArchiveReader(MissingBlobContract):
    def open_reader(self, content: bytes, tmp_path: Path) -> AbstractAsyncContextManager[BlobReader]:
        blob_id = digest_of(content).removeprefix("sha256:")
        return self._opened(tmp_path / "a.tar", content, blob_id)

    def open_absent(self, tmp_path: Path) -> AbstractAsyncContextManager[BlobReader]:
        return self._opened(tmp_path / "a.tar", b"another", ABSENT_ID)

    @asynccontextmanager
    async def _opened(self, path: Path, content: bytes, blob_id: str) -> AsyncIterator[BlobReader]:
        name = f"blobs/sha256/{digest_of(content).removeprefix('sha256:')}"
        with tarfile.open(path, "w") as archive:
            for member, data in (("before", b"x" * 700), (name, content), ("behind", b"y" * 700)):
                entry = tarfile.TarInfo(member)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
        async with open_store(OciArchiveReference(path)) as store:
            reader = store.open_blob(blob_id, len(content))
            yield reader
            await reader.aclose()


del _StoredBlob  # it is no suite by itself
