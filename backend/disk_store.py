"""What stores that keep images on a local disk the OCI way have in common, however these lie there."""

import abc
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import trio

from backend.contract import BlobReader
from backend.fileblob import READERS_MAX, open_file_blob
from backend.manifest import (
    Descriptor,
)
from backend.metadata import fetch_oci_metadata
from backend.platforms import this_platform
from backend.publish import publish_oci_image
from backend.reference import Reference
from backend.store import (
    ImageFiles,
    ImageMetadata,
    OpenOrigin,
    PublishProgress,
    PublishResult,
    StoredManifest,
)

Where = TypeVar("Where", bound=Reference)


class OciDiskStore(abc.ABC, Generic[Where]):
    """An `OciStore`; what is abstract is described there."""

    def __init__(self, reference: Where, open_origin: OpenOrigin) -> None:
        self._reference = reference
        self._open_origin = open_origin
        self._limiter = trio.CapacityLimiter(READERS_MAX)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._reference}>"

    @property
    def reference(self) -> Reference:
        """What names the image."""
        return self._reference

    @abc.abstractmethod
    async def get_manifest(self, digest: str | None = None) -> StoredManifest:
        """See `OciStore`."""

    @abc.abstractmethod
    async def put_manifest(self, media_type: str, data: bytes, *, as_reference: bool) -> str:
        """See `OciStore`."""

    @abc.abstractmethod
    def open_content(self, digest: str, size_bytes: int | None) -> BlobReader:
        """See `OciStore`."""

    @abc.abstractmethod
    async def has_blob(self, digest: str, size_bytes: int) -> bool:
        """See `BlobTarget`."""

    @abc.abstractmethod
    async def put_stream(
        self, descriptor: Descriptor, reader: BlobReader, on_bytes: Callable[[int], None]
    ) -> None:
        """See `BlobTarget`."""

    async def fetch_metadata(self, images_dir: Path) -> ImageMetadata:
        """See `ImageStore`."""
        return await fetch_oci_metadata(self, images_dir, this_platform())

    def open_blob(self, blob_id: str, size_bytes: int) -> BlobReader:
        """A reader of a data blob."""
        return self.open_content(f"sha256:{blob_id}", size_bytes)

    async def publish(self, image: ImageFiles, progress: PublishProgress) -> PublishResult:
        """See `ImageStore`."""
        return await publish_oci_image(self, image, self._open_origin, progress)

    async def mount_blob(self, digest: str, origin: Reference) -> bool:
        """Places on a disk share nothing."""
        await trio.lowlevel.checkpoint()
        return False

    async def put_file(
        self, descriptor: Descriptor, path: Path, on_bytes: Callable[[int], None], *, may_link: bool = False
    ) -> None:
        """See `BlobTarget`; this reads the file whatever may be done with it."""
        async with open_file_blob(path, self._limiter) as reader:
            await self.put_stream(descriptor, reader, on_bytes)
