"""Images in a registry."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from backend.contract import BlobReader
from backend.growing import GrowingFile
from backend.manifest import (
    Descriptor,
)
from backend.metadata import fetch_oci_metadata, metadata_at
from backend.ocidigest import digest_of
from backend.platforms import this_platform
from backend.publish import publish_oci_image
from backend.reference import Reference, RegistryReference
from backend.referrers import list_referral, referral_of
from backend.registry import RegistryClient, RegistryOptions
from backend.store import (
    CannotPublish,
    ImageFiles,
    ImageMetadata,
    OpenOrigin,
    PublishProgress,
    PublishResult,
    StoredManifest,
)


class RegistryStore:
    """An `OciStore` over one repository of a registry."""

    def __init__(self, reference: RegistryReference, client: RegistryClient, open_origin: OpenOrigin) -> None:
        self._reference = reference
        self._client = client
        self._open_origin = open_origin

    def __repr__(self) -> str:
        return f"<RegistryStore {self._reference}>"

    @classmethod
    @asynccontextmanager
    async def open(
        cls, reference: RegistryReference, options: RegistryOptions, open_origin: OpenOrigin
    ) -> AsyncIterator["RegistryStore"]:
        """A store with a client of its own, which is closed at the end."""
        async with RegistryClient(reference, options) as client:
            yield cls(reference, client, open_origin)

    @property
    def reference(self) -> Reference:
        """What names the image."""
        return self._reference

    async def fetch_metadata(self, images_dir: Path) -> ImageMetadata:
        """See `ImageStore`. An image named by its digest that is here already needs no request at all."""
        if self._reference.digest and (known := metadata_at(images_dir, self._reference.digest)):
            await trio.lowlevel.checkpoint()
            return known
        return await fetch_oci_metadata(self, images_dir, this_platform())

    def open_blob(self, blob_id: str, size_bytes: int) -> BlobReader:
        """A reader of a data blob."""
        return self._client.open_blob(f"sha256:{blob_id}", size_bytes)

    async def publish(self, image: ImageFiles, progress: PublishProgress) -> PublishResult:
        """See `ImageStore`; the tag is set last. Raises `CannotPublish` for a reference without a tag."""
        self._tag_to_set()
        return await publish_oci_image(self, image, self._open_origin, progress)

    async def get_manifest(self, digest: str | None = None) -> StoredManifest:
        """See `OciStore`."""
        fetched = await self._client.fetch_manifest(digest or self._reference.manifest_key)
        return StoredManifest(fetched.media_type, fetched.digest, fetched.data)

    async def put_manifest(self, media_type: str, data: bytes, *, as_reference: bool) -> str:
        """See `OciStore`. One with a subject is among the referrers of that before it gets its tag."""
        digest = digest_of(data)
        key = self._tag_to_set() if as_reference and self._reference.digest != digest else digest
        referral = referral_of(media_type, data, str(self._reference))
        if referral is not None and not await self._client.push_referrer(media_type, data):
            await list_referral(self._client, referral, str(self._reference))
        if referral is not None and key == digest:
            return digest
        return await self._client.push_manifest(key, media_type, data)

    def open_content(self, digest: str, size_bytes: int | None) -> BlobReader:
        """See `OciStore`."""
        return self._client.open_blob(digest, size_bytes)

    async def has_blob(self, digest: str, size_bytes: int) -> bool:
        """See `BlobTarget`."""
        return await self._client.blob_size(digest) == size_bytes

    async def mount_blob(self, digest: str, origin: Reference) -> bool:
        """See `BlobTarget`; possible between repositories of one registry."""
        if not isinstance(origin, RegistryReference) or origin.host != self._reference.host:
            await trio.lowlevel.checkpoint()
            return False
        return await self._client.mount_blob(digest, origin.repository)

    async def put_file(
        self, descriptor: Descriptor, path: Path, on_bytes: Callable[[int], None], *, may_link: bool = False
    ) -> None:
        """See `BlobTarget`."""
        await self._client.upload_blob(path, descriptor.digest, descriptor.size_bytes, on_bytes)

    async def put_stream(
        self, descriptor: Descriptor, reader: BlobReader, on_bytes: Callable[[int], None]
    ) -> None:
        """See `BlobTarget`; one upload chunk is in memory at a time."""
        await self._client.upload_from(reader, descriptor.digest, descriptor.size_bytes, on_bytes)

    async def put_growing(self, source: GrowingFile, on_bytes: Callable[[int], None]) -> None:
        """See `GrowingTarget`."""
        await self._client.upload(source, on_bytes)

    def _tag_to_set(self) -> str:
        if self._reference.tag is None:
            why = "a digest cannot be chosen; name the image by a tag"
            raise CannotPublish(where=self._reference, why=why)
        return self._reference.tag
