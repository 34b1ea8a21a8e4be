"""Images in a tar file of an OCI layout: `oci-archive:FILE[:TAG]`.

Read in place, by offset. Written anew each time, as skopeo does: the file then holds the one image that was
put there, and appears when that is complete. So `has_blob` speaks of the file that is being written.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from backend.archive_file import ArchiveFile, MemberReader
from backend.contract import BlobReader
from backend.disk_store import OciDiskStore
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
from backend.manifest import Descriptor
from backend.ocidigest import check_digest, digest_of
from backend.reference import OciArchiveReference
from backend.store import (
    CannotPublish,
    OpenOrigin,
    StoredManifest,
)
from backend.tar_writer import TarWriter


class OciArchiveStore(OciDiskStore[OciArchiveReference]):
    """An `OciStore` over one archive file. Made by `open`."""

    def __init__(self, reference: OciArchiveReference, open_origin: OpenOrigin) -> None:
        super().__init__(reference, open_origin)
        self._archive = ArchiveFile(reference.file, str(reference))
        self._replaced: list[ArchiveFile] = []
        self._writer = TarWriter(reference.file.resolve())

    @classmethod
    @asynccontextmanager
    async def open(
        cls, reference: OciArchiveReference, open_origin: OpenOrigin
    ) -> AsyncIterator["OciArchiveStore"]:
        """The store; the file is opened when it is first read, and closed with the context."""
        store = cls(reference, open_origin)
        try:
            yield store
        finally:
            store._writer.close()
            with trio.CancelScope(shield=True):
                for archive in (store._archive, *store._replaced):
                    await archive.aclose()

    async def get_manifest(self, digest: str | None = None) -> StoredManifest:
        """See `OciStore`."""
        marker = await self._archive.read_document(MARKER_NAME)
        if marker is None:
            raise LayoutBroken(where=self._reference, why=f"not an OCI layout: no {MARKER_NAME} file in it")
        check_marker(marker, self._reference)
        media_type = ""
        if digest is None:
            listing = await self._archive.read_document(INDEX_NAME)
            index = EMPTY_INDEX if listing is None else parse_index(listing, self._reference)
            entry = named_entry(index, self._reference.tag, self._reference)
            digest, media_type = entry.digest, entry.media_type
        data = await self._archive.read_document(blob_name(digest))
        if data is None:
            raise LayoutBroken(where=self._reference, why=f"the manifest {digest} is not in it")
        check_digest(data, digest, f"{self._reference}, manifest")
        return StoredManifest(media_type, digest, data)

    async def put_manifest(self, media_type: str, data: bytes, *, as_reference: bool) -> str:
        """See `OciStore`."""
        self._check_target()
        digest = digest_of(data)
        await self._writer.add(blob_name(digest), data)
        if as_reference:
            entry = new_entry(media_type, data, self._reference.tag)
            await self._writer.add(INDEX_NAME, with_entry(EMPTY_INDEX, entry, self._reference))
            await self._writer.add(MARKER_NAME, MARKER)
            await self._writer.finish()
            self._replaced.append(self._archive)  # some may still read in it
            self._archive = ArchiveFile(self._reference.file, str(self._reference))
        return digest

    def open_content(self, digest: str, size_bytes: int | None) -> BlobReader:
        """See `OciStore`."""
        name, archive = blob_name(digest), self._archive
        return MemberReader(archive, lambda: archive.find(name), f"{self._reference}, {name}")

    async def has_blob(self, digest: str, size_bytes: int) -> bool:
        """Whether the blob is in the file that is being written."""
        await trio.lowlevel.checkpoint()
        return blob_name(digest) in self._writer

    async def put_stream(
        self, descriptor: Descriptor, reader: BlobReader, on_bytes: Callable[[int], None]
    ) -> None:
        """See `BlobTarget`."""
        self._check_target()
        await self._writer.add_blob(blob_name(descriptor.digest), descriptor, reader, on_bytes)

    def _check_target(self) -> None:
        path = self._reference.file
        if path.exists() and not path.is_file():
            raise CannotPublish(where=self._reference, why="something that is no regular file has this name")
