"""Images in a bare directory, as nydus-image leaves them: `image.boot` and `blobs/<blob id>`."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import trio

from backend.blobtail import table_blob_id
from backend.bootstrap_layer import BOOTSTRAP_NAME, BOOTSTRAP_SIZE_MAX_BYTES
from backend.contract import BackendError, BlobNotFound, BlobReader
from backend.fileblob import READERS_MAX, FileBlobReader, has_content, link_blob, open_file_blob, store_blob
from backend.manifest import Descriptor
from backend.metadata import fetch_missing_tables, metadata_at, settle_metadata
from backend.ocidigest import require_digest
from backend.publish import Transfer
from backend.publishing import publish_file, reporting_writes, staging_directory
from backend.reference import DirReference, Reference
from backend.store import BlobFile, ImageFiles, ImageMetadata, OpenOrigin, PublishProgress, PublishResult
from rafs.bootstrap import Bootstrap

BLOBS_NAME = "blobs"
_STEP_BYTES = 1 << 20


class NotAnImageDirectory(BackendError):
    """A directory without a bootstrap, or with one that cannot be read."""

    message = "{where}: no image in this directory: {why}"
    exit_code: ClassVar[int] = 116


class DirStore:
    """An `ImageStore` over a bare directory. There is no manifest: the digest is that of the bootstrap."""

    def __init__(self, reference: DirReference, open_origin: OpenOrigin) -> None:
        self._reference = reference
        self._directory = reference.directory
        self._open_origin = open_origin
        self._limiter = trio.CapacityLimiter(READERS_MAX)

    def __repr__(self) -> str:
        return f"<DirStore {self._directory}>"

    @property
    def reference(self) -> Reference:
        """What names the image."""
        return self._reference

    async def fetch_metadata(self, images_dir: Path) -> ImageMetadata:
        """Copies the bootstrap and reads the chunk tables from the blobs' tails; see `ImageStore`."""
        with staging_directory(images_dir) as staging:
            unpacked = staging / "image"
            with reporting_writes(unpacked):
                unpacked.mkdir()
            source = self._directory / BOOTSTRAP_NAME
            digest = await trio.to_thread.run_sync(_copy_bootstrap, source, unpacked / BOOTSTRAP_NAME)
            existing = await trio.to_thread.run_sync(metadata_at, images_dir, digest)
            if existing:
                return existing
            await fetch_missing_tables(
                unpacked,
                lambda blob_id: self.open_blob(blob_id, 0),
                str(self._reference),
            )
            return await settle_metadata(unpacked, images_dir, digest)

    def open_blob(self, blob_id: str, size_bytes: int) -> BlobReader:
        """A reader of `blobs/<blob id>`."""
        return FileBlobReader(self._blob_path(f"sha256:{blob_id}"), self._limiter)

    async def publish(self, image: ImageFiles, progress: PublishProgress) -> PublishResult:
        """Puts blobs into `blobs/`, then the bootstrap; an image that was there is replaced by that."""
        transfer = Transfer(self, str(self._reference), progress)
        for blob in image.blobs:
            await transfer.send_blob(blob, self._open_origin, may_link=image.gives_blobs_away)
        return transfer.result(await self.put_bootstrap(image.bootstrap))

    async def put_bootstrap(self, bootstrap: Path) -> str:
        """Makes a copy of `bootstrap` the directory's image, in one step; gives its digest."""
        with staging_directory(self._directory) as staging:
            staged = staging / BOOTSTRAP_NAME
            digest = await trio.to_thread.run_sync(_copy_bootstrap, bootstrap, staged)
            await trio.to_thread.run_sync(publish_file, staged, self._directory / BOOTSTRAP_NAME)
        return digest

    def image_files(self, metadata: ImageMetadata) -> ImageFiles:
        """The directory's image in the form in which it can be published elsewhere.

        `metadata` is what `fetch_metadata` gave. Raises `BlobNotFound` for a blob that is missing.
        """
        with Bootstrap.open(metadata.bootstrap_path) as bootstrap:
            entries = bootstrap.blobs
        metas = {table.blob_id: table.path for table in metadata.blob_meta_paths}
        blobs, tables = [], []
        for entry in entries:
            blob_id, table_id = entry.blob_id, table_blob_id(entry)
            path = self._present_path(blob_id)
            if blob_id not in metas:  # a blob without chunks has no table, and nothing that anybody reads
                continue
            blobs.append(BlobFile(blob_id, path.stat().st_size, path, metas[blob_id]))
            if table_id != blob_id:
                path = self._present_path(table_id)
                tables.append(BlobFile(table_id, path.stat().st_size, path, metas[blob_id], table_of=blob_id))
        return ImageFiles(metadata.bootstrap_path, (*blobs, *tables))

    def _present_path(self, blob_id: str) -> Path:
        path = self._blob_path(f"sha256:{blob_id}")
        if not path.is_file():
            raise BlobNotFound(where=path)
        return path

    async def has_blob(self, digest: str, size_bytes: int) -> bool:
        """Whether the blob's file has that size and that digest; all of it is read."""
        return await trio.to_thread.run_sync(has_content, self._blob_path(digest), digest, size_bytes)

    async def mount_blob(self, digest: str, origin: Reference) -> bool:
        """Directories share nothing."""
        await trio.lowlevel.checkpoint()
        return False

    async def put_file(
        self, descriptor: Descriptor, path: Path, on_bytes: Callable[[int], None], *, may_link: bool = False
    ) -> None:
        """Stores a blob from a file; see `BlobTarget`."""
        final = self._prepared_path(descriptor)
        if may_link and await link_blob(path, final, self._directory):
            on_bytes(descriptor.size_bytes)
            return
        async with open_file_blob(path, self._limiter) as reader:
            await self.put_stream(descriptor, reader, on_bytes)

    async def put_stream(
        self, descriptor: Descriptor, reader: BlobReader, on_bytes: Callable[[int], None]
    ) -> None:
        """Stores a blob that is read piece by piece; see `BlobTarget`."""
        await store_blob(reader, descriptor, self._prepared_path(descriptor), self._directory, on_bytes)

    def _blob_path(self, digest: str) -> Path:
        return self._directory / BLOBS_NAME / require_digest(digest).removeprefix("sha256:")

    def _prepared_path(self, descriptor: Descriptor) -> Path:
        path = self._blob_path(descriptor.digest)
        with reporting_writes(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _copy_bootstrap(source: Path, target: Path) -> str:
    """Copies a bootstrap and gives its digest."""
    digest = hashlib.sha256()
    try:
        descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise NotAnImageDirectory(where=source.parent, why=f"{source.name}: {error.strerror}") from error
    with open(descriptor, "rb", buffering=0) as file, reporting_writes(target), target.open("wb") as copy:
        while piece := file.read(_STEP_BYTES):
            if file.tell() > BOOTSTRAP_SIZE_MAX_BYTES:
                why = f"{source.name} has more than {BOOTSTRAP_SIZE_MAX_BYTES} bytes"
                raise NotAnImageDirectory(where=source.parent, why=why)
            digest.update(piece)
            copy.write(piece)
    return f"sha256:{digest.hexdigest()}"
