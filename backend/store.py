"""Where images live: one interface over registries, OCI layouts, archive files and bare directories."""

import enum
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from backend.contract import BackendError, BlobReader
from backend.manifest import (
    Descriptor,
)
from backend.platforms import Platform
from backend.reference import (
    DirReference,
    DockerArchiveReference,
    LayoutReference,
    OciArchiveReference,
    Reference,
    parse_reference,
)

if TYPE_CHECKING:
    from backend.growing import GrowingFile
    from backend.registry import RegistryOptions


class CannotPublish(BackendError):
    """The target cannot take this image."""

    message = "{where}: cannot publish: {why}"
    exit_code: ClassVar[int] = 113


class NoChunkTable(BackendError):
    """An image's metadata lacks the chunk table of a blob: the blob has no chunks, or is of another image."""

    message = "{where}: no chunk table of blob {blob_id} here; remove this directory and run it again"
    exit_code: ClassVar[int] = 118


@dataclass(frozen=True, slots=True)
class BlobMetaFile:
    """The node-side chunk table of one blob."""

    blob_id: str
    path: Path


@dataclass(frozen=True, slots=True)
class ImageMetadata:
    """What a mount needs of an image, on this machine. `digest` is that of the manifest ("sha256:<hex>")."""

    digest: str
    directory: Path
    bootstrap_path: Path
    blob_meta_paths: tuple[BlobMetaFile, ...]

    def blob_meta_path(self, blob_id: str) -> Path:
        """The chunk table of a blob; raises `NoChunkTable` for one that has none here."""
        for file in self.blob_meta_paths:
            if file.blob_id == blob_id:
                return file.path
        raise NoChunkTable(where=self.directory, blob_id=blob_id)


@dataclass(frozen=True, slots=True)
class BlobFile:
    """A blob to publish: its bytes at `path`, or in the image that the reference text `source` names.

    `meta` is its chunk table, as hosts have it. A blob with `table_of` is no data blob: it holds the chunk
    table of the gzip layer with that ID, which has none at its end, and `meta` is that table.
    """

    blob_id: str
    size_bytes: int
    path: Path | None
    meta: Path
    source: str | None = None
    table_of: str = ""


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """An image to publish; `blobs` in the order of the bootstrap's blob table, chunk tables behind them.

    `platform` is the builder's where it is None. With `gives_blobs_away` nobody changes the blob files
    afterwards, and a store on the same file system takes them by a link, unread.
    """

    bootstrap: Path
    blobs: tuple[BlobFile, ...]
    platform: Platform | None = None
    gives_blobs_away: bool = False


@dataclass(frozen=True, slots=True)
class PublishResult:
    """What publishing did: the manifest's digest, and what became of the data blobs.

    `bytes_uploaded` counts everything that travelled, bootstrap layer and config too.
    """

    digest: str
    blobs_uploaded: int
    blobs_skipped: int
    bytes_uploaded: int
    blobs_mounted: int = 0


@dataclass(frozen=True, slots=True)
class StoredManifest:
    """A manifest or an index as a store keeps it; its digest has been checked."""

    media_type: str
    digest: str
    data: bytes


class BlobOutcome(enum.Enum):
    """How a blob came to be in the target."""

    UPLOADED = "uploaded"
    SKIPPED = "skipped"
    MOUNTED = "mounted"


class PublishProgress(Protocol):
    """Hears how publishing goes on. Called from the trio thread; must not block."""

    def blob_started(self, digest: str, size_bytes: int) -> None:
        """A blob, a bootstrap layer or a config is next."""

    def bytes_sent(self, count: int) -> None:
        """That many more bytes have arrived in the target."""

    def blob_finished(self, digest: str, outcome: BlobOutcome) -> None:
        """It is in the target now."""


class NoProgress:
    """Progress that nobody looks at."""

    def blob_started(self, digest: str, size_bytes: int) -> None:
        """Ignored."""

    def bytes_sent(self, count: int) -> None:
        """Ignored."""

    def blob_finished(self, digest: str, outcome: BlobOutcome) -> None:
        """Ignored."""


class ImageStore(Protocol):
    """One image (one reference) in one place."""

    @property
    def reference(self) -> Reference:
        """What names the image."""
        ...

    async def fetch_metadata(self, images_dir: Path) -> ImageMetadata:
        """Makes bootstrap and chunk tables local in `images_dir/<manifest digest>/`, verified and complete.

        What is there already is used again; the tag is still looked up. Safe in many processes at once.
        """
        ...

    def open_blob(self, blob_id: str, size_bytes: int) -> BlobReader:
        """A reader of one of the image's data blobs."""
        ...

    async def publish(self, image: ImageFiles, progress: PublishProgress) -> PublishResult:
        """Puts an image under the store's reference. It becomes visible with the last step, or not at all."""
        ...


class BlobTarget(Protocol):
    """A place that takes blobs by digest, each at once or not at all. Digests are "sha256:<hex>"."""

    async def has_blob(self, digest: str, size_bytes: int) -> bool:
        """Whether the blob is there, whole: by its digest where the store itself does not vouch for it."""
        ...

    async def mount_blob(self, digest: str, origin: Reference) -> bool:
        """Takes the blob from `origin` without moving bytes; False where that is not possible."""
        ...

    async def put_file(
        self, descriptor: Descriptor, path: Path, on_bytes: Callable[[int], None], *, may_link: bool = False
    ) -> None:
        """Stores a blob from a file; with `may_link` the file itself may become the stored one."""
        ...

    async def put_stream(
        self, descriptor: Descriptor, reader: BlobReader, on_bytes: Callable[[int], None]
    ) -> None:
        """Stores a blob that is read piece by piece, in bounded memory. `on_bytes` gets increments."""
        ...


@runtime_checkable
class GrowingTarget(Protocol):
    """A target that takes a blob while it is still being written."""

    async def put_growing(self, source: "GrowingFile", on_bytes: Callable[[int], None]) -> None:
        """Stores the blob that the file is at its end; `on_bytes` gets increments."""
        ...


class OciStore(ImageStore, BlobTarget, Protocol):
    """A store that keeps manifests and blobs the OCI way."""

    async def get_manifest(self, digest: str | None = None) -> StoredManifest:
        """The manifest or index that the reference names, or another one of the same repository."""
        ...

    async def put_manifest(self, media_type: str, data: bytes, *, as_reference: bool) -> str:
        """Stores a manifest, under its digest only or also as what the reference names; gives the digest."""
        ...

    def open_content(self, digest: str, size_bytes: int | None) -> BlobReader:
        """A reader of any blob of the repository, bootstrap layers and configs too."""
        ...


OpenOrigin = Callable[[str], AbstractAsyncContextManager[ImageStore]]
"""Opens the image that a reference text names."""


@asynccontextmanager
async def open_store(
    reference: Reference, registry_options: "RegistryOptions | None" = None
) -> AsyncIterator[ImageStore]:
    """The store of an image; `registry_options` (default ones if None) also serve other images it needs.

    The implementations are imported here: the HTTP client costs more than opening a local image does.
    """

    def open_origin(text: str) -> AbstractAsyncContextManager[ImageStore]:
        return open_store(parse_reference(text), registry_options)

    if isinstance(reference, DirReference):
        from backend.local import DirStore

        yield DirStore(reference, open_origin)
    elif isinstance(reference, LayoutReference):
        from backend.ocilayout import LayoutStore

        yield LayoutStore(reference, open_origin)
    elif isinstance(reference, OciArchiveReference):
        from backend.oci_archive import OciArchiveStore

        async with OciArchiveStore.open(reference, open_origin) as archive:
            yield archive
    elif isinstance(reference, DockerArchiveReference):
        from backend.docker_archive import DockerArchiveStore

        async with DockerArchiveStore.open(reference, open_origin) as saved:
            yield saved
    else:
        from backend.registry import RegistryOptions
        from backend.registry_store import RegistryStore

        async with RegistryStore.open(reference, registry_options or RegistryOptions(), open_origin) as store:
            yield store
