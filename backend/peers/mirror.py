"""What this host gives to clients of registries: the images that it has open, as the registry has them.

An image is given by its digest only (what a tag names, the registry says), and only when all of it can be
given: a client that has got a manifest here asks nobody else for the rest. Data blobs are those that are kept
whole (`backend.encoded`). Configs, bootstrap layers and chunk tables are small: they are brought from the
registry when they are first asked for, and kept as `blobs/<digest>.blob`.

Concurrency: for the trio thread. What is brought is brought once, whoever asks meanwhile.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import trio

from backend.contract import BlobReader
from backend.encoded import file_digest
from backend.manifest import Descriptor, ImageIndex, ImageManifest, nydus_layers, parse_document
from backend.metadata import MANIFEST_NAME
from backend.ocidigest import check_digest
from backend.publishing import staging_directory, write_atomically
from backend.store import ImageMetadata
from rafs.errors import NydusError

if TYPE_CHECKING:
    from backend.fetch import ChunkFetcher

DOCUMENT_MAX_BYTES = 64 << 20
DOCUMENT_TYPE = "application/octet-stream"


class NotMirrored(NydusError):
    """A client of registries asks for what this host cannot give; it goes to the registry."""

    message = "{digest}: {why}"
    exit_code: ClassVar[int] = 157


@dataclass(frozen=True, slots=True)
class SharedImage:
    """An image that is open here. `fetchers` by ID of their data blob; `open_content`: of its registry."""

    metadata: ImageMetadata
    cache_dir: Path
    open_content: Callable[[str, int | None], BlobReader]
    fetchers: Mapping[str, "ChunkFetcher"]

    def manifest(self) -> ImageManifest:
        """The manifest, which was verified when it came. Raises `NydusError`."""
        path = self.metadata.directory / MANIFEST_NAME
        document = parse_document(path.read_bytes(), str(path))
        if isinstance(document, ImageIndex):
            raise NotMirrored(digest=self.metadata.digest, why="an index is no image")
        return document

    def documents(self) -> dict[str, Descriptor]:
        """What belongs to the image and is no data blob, by its digest in hexadecimal."""
        manifest = self.manifest()
        data = {blob.hex for blob in nydus_layers(manifest, self.metadata.digest).blobs}
        parts = (manifest.config, *manifest.layers)
        return {part.hex: part for part in parts if part.hex not in data}


@dataclass(slots=True)
class _Document:
    """A file that is being brought, or why it does not come."""

    ended: trio.Event = field(default_factory=trio.Event)
    failure: Exception | None = None


class Mirror:
    """See above."""

    def __init__(self) -> None:
        self._images: dict[str, list[SharedImage]] = {}
        self._coming: dict[Path, _Document] = {}

    @contextmanager
    def sharing(self, image: SharedImage) -> Iterator[None]:
        """The image can be given for the time of the block."""
        images = self._images.setdefault(image.metadata.digest, [])
        images.append(image)
        try:
            yield
        finally:
            images.remove(image)
            if not images:
                del self._images[image.metadata.digest]

    async def open_manifest(self, digest: str) -> tuple[int, str]:
        """A descriptor of the manifest `digest` (hexadecimal), for the caller to close, and its media type.

        Makes sure that all that it names can be given. Raises `NydusError`.
        """
        images = self._images.get(f"sha256:{digest}")
        if not images:
            raise NotMirrored(digest=digest[:12], why="no such image is open here")
        image = images[0]
        manifest = image.manifest()
        documents = image.documents()
        for part in (manifest.config, *manifest.layers):
            if part.hex in documents:
                os.close(await self._open_document(image, part))
            elif not await complete(image.fetchers.get(part.hex)):
                raise NotMirrored(digest=digest[:12], why=f"blob {part.hex[:12]} is not whole here")
        path = image.metadata.directory / MANIFEST_NAME
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC), manifest.media_type

    async def open_document(self, digest: str) -> tuple[int, str]:
        """As `open_manifest`, of a config, a bootstrap layer or a chunk table."""
        for image in [images[0] for images in self._images.values()]:
            part = image.documents().get(digest)
            if part is not None:
                return await self._open_document(image, part), DOCUMENT_TYPE
        await trio.lowlevel.checkpoint()
        raise NotMirrored(digest=digest[:12], why="no open image has it")

    async def _open_document(self, image: SharedImage, part: Descriptor) -> int:
        path = image.cache_dir / "blobs" / f"{part.hex}.blob"
        found = await trio.to_thread.run_sync(_open_verified, path, part)
        if found is not None:
            return found
        coming = self._coming.get(path)
        if coming is None:
            coming = self._coming[path] = _Document()
            try:
                await _bring(image, part, path)
            except NydusError as error:
                coming.failure = error
            finally:
                del self._coming[path]
                coming.ended.set()
        await coming.ended.wait()
        if coming.failure is not None:
            raise coming.failure
        found = await trio.to_thread.run_sync(_open_verified, path, part)
        if found is None:
            raise NotMirrored(digest=part.hex[:12], why="it was not brought, or has been damaged since")
        return found


async def complete(fetcher: "ChunkFetcher | None") -> bool:
    """Whether the encoded bytes of a blob are whole here, after what little was lacking has been brought.

    Raises what the registry's reader raises.
    """
    if fetcher is None or fetcher.origin.encoded is None:
        return False
    return await fetcher.origin.encoded.complete(fetcher.origin.read)


async def _bring(image: SharedImage, part: Descriptor, path: Path) -> None:
    if part.size_bytes > DOCUMENT_MAX_BYTES:
        raise NotMirrored(digest=part.hex[:12], why=f"{part.size_bytes} bytes are no small part")
    reader = image.open_content(part.digest, part.size_bytes)
    try:
        data = await reader.read_range(0, part.size_bytes)
    finally:
        with trio.CancelScope(shield=True):
            await reader.aclose()

    def write() -> None:
        check_digest(data, part.digest, str(path))
        with staging_directory(path.parent) as staging:
            write_atomically(path, data, staging)

    await trio.to_thread.run_sync(write)


def _open_verified(path: Path, part: Descriptor) -> int | None:
    """A descriptor of the file if it has the bytes that its name says. Blocking."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        size_bytes = os.fstat(descriptor).st_size
        is_right = size_bytes == part.size_bytes and file_digest(descriptor, size_bytes) == part.hex
    except BaseException:
        os.close(descriptor)
        raise
    if not is_right:
        os.close(descriptor)
        return None
    return descriptor
