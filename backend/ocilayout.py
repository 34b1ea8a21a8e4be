"""Images in an OCI layout on disk: `oci-layout`, `index.json`, `blobs/sha256/<hex>` (OCI image-layout.md).

Concurrency: blobs are immutable and appear by a rename. `index.json` is read, changed and replaced under an
flock on the layout's directory, so that two processes that publish different tags both succeed.
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from backend.contract import BlobNotFound, BlobReader
from backend.disk_store import OciDiskStore
from backend.fileblob import FileBlobReader, has_content, link_blob, store_blob
from backend.layout_index import (
    EMPTY_INDEX,
    INDEX_NAME,
    MARKER,
    MARKER_NAME,
    LayoutBroken,
    blob_name,
    check_marker,
    named_entry,
    new_entry,
    parse_index,
    with_entry,
)
from backend.manifest import MANIFEST_SIZE_MAX_BYTES, Descriptor
from backend.ocidigest import check_digest, digest_of
from backend.publishing import reporting_writes, staging_directory, write_atomically
from backend.raw_index import RawIndex
from backend.reference import LayoutReference
from backend.store import (
    ImageFiles,
    OpenOrigin,
    PublishProgress,
    PublishResult,
    StoredManifest,
)


class LayoutStore(OciDiskStore[LayoutReference]):
    """An `OciStore` over one layout."""

    def __init__(self, reference: LayoutReference, open_origin: OpenOrigin) -> None:
        super().__init__(reference, open_origin)
        self._directory = reference.directory

    async def publish(self, image: ImageFiles, progress: PublishProgress) -> PublishResult:
        """See `ImageStore`; `index.json` is replaced last, entries with other tags stay."""
        await trio.to_thread.run_sync(self._prepare)
        return await super().publish(image, progress)

    async def get_manifest(self, digest: str | None = None) -> StoredManifest:
        """See `OciStore`."""
        return await trio.to_thread.run_sync(self._read_manifest, digest)

    async def put_manifest(self, media_type: str, data: bytes, *, as_reference: bool) -> str:
        """See `OciStore`."""
        await trio.to_thread.run_sync(self._prepare)
        return await trio.to_thread.run_sync(self._write_manifest, media_type, data, as_reference)

    def open_content(self, digest: str, size_bytes: int | None) -> BlobReader:
        """See `OciStore`."""
        return FileBlobReader(self._blob_path(digest), self._limiter)

    async def has_blob(self, digest: str, size_bytes: int) -> bool:
        """See `BlobTarget`; all of the file is read, since a damaged one must not be published again."""
        return await trio.to_thread.run_sync(has_content, self._blob_path(digest), digest, size_bytes)

    async def put_file(
        self, descriptor: Descriptor, path: Path, on_bytes: Callable[[int], None], *, may_link: bool = False
    ) -> None:
        """See `BlobTarget`."""
        await trio.to_thread.run_sync(self._prepare)
        final = self._blob_path(descriptor.digest)
        if may_link and await link_blob(path, final, self._directory):
            on_bytes(descriptor.size_bytes)
            return
        await super().put_file(descriptor, path, on_bytes)

    async def put_stream(
        self, descriptor: Descriptor, reader: BlobReader, on_bytes: Callable[[int], None]
    ) -> None:
        """See `BlobTarget`."""
        await trio.to_thread.run_sync(self._prepare)
        await store_blob(reader, descriptor, self._blob_path(descriptor.digest), self._directory, on_bytes)

    def _blob_path(self, digest: str) -> Path:
        return self._directory / blob_name(digest)

    def _prepare(self) -> None:
        """Makes the directory a layout, unless it is one or something else already."""
        with reporting_writes(self._directory):
            blobs = self._directory / "blobs" / "sha256"
            if (self._directory / MARKER_NAME).exists():
                blobs.mkdir(parents=True, exist_ok=True)
                return
            if (self._directory / INDEX_NAME).exists():
                raise LayoutBroken(where=self._reference, why=f"has {INDEX_NAME} but no {MARKER_NAME} file")
            blobs.mkdir(parents=True, exist_ok=True)
            with staging_directory(self._directory) as staging:
                write_atomically(self._directory / MARKER_NAME, MARKER, staging)

    def _read_manifest(self, digest: str | None) -> StoredManifest:
        self._check_marker()
        media_type = ""
        if digest is None:
            entry = named_entry(self._read_index(), self._reference.tag, self._reference)
            digest, media_type = entry.digest, entry.media_type
        data = self._read_file(self._blob_path(digest))
        check_digest(data, digest, f"{self._reference}, manifest")
        return StoredManifest(media_type, digest, data)

    def _check_marker(self) -> None:
        if not self._directory.is_dir():
            raise BlobNotFound(where=self._reference)
        if not (self._directory / MARKER_NAME).is_file():
            raise LayoutBroken(where=self._reference, why=f"not an OCI layout: no {MARKER_NAME} file in it")
        check_marker(self._read_file(self._directory / MARKER_NAME), self._reference)

    def _read_index(self) -> RawIndex:
        path = self._directory / INDEX_NAME
        return parse_index(self._read_file(path), self._reference) if path.exists() else EMPTY_INDEX

    def _read_file(self, path: Path) -> bytes:
        try:
            if path.stat().st_size > MANIFEST_SIZE_MAX_BYTES:
                why = f"{path.name} is larger than {MANIFEST_SIZE_MAX_BYTES} bytes"
                raise LayoutBroken(where=self._reference, why=why)
            return path.read_bytes()
        except OSError as error:
            why = f"{path.relative_to(self._directory)}: {error.strerror}"
            raise LayoutBroken(where=self._reference, why=why) from error

    def _write_manifest(self, media_type: str, data: bytes, as_reference: bool) -> str:
        digest = digest_of(data)
        with staging_directory(self._directory) as staging:
            if not has_content(self._blob_path(digest), digest, len(data)):
                write_atomically(self._blob_path(digest), data, staging)
            if as_reference:
                entry = new_entry(media_type, data, self._reference.tag)
                with self._locked():
                    index = with_entry(self._read_index(), entry, self._reference)
                    write_atomically(self._directory / INDEX_NAME, index, staging)
        return digest

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with reporting_writes(self._directory):
            lock = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)
