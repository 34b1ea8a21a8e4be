"""Images in a file of `docker save`: `docker-archive:FILE[:NAME[:TAG]|:@NUMBER]`. Read only.

The file has no OCI manifest (`manifest.json` names config and layers of each image by path), so one is made:
the same file always gives the same one. Layers stay as they are, which is a plain tar almost always.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import trio

from backend.archive_file import ArchiveFile, MemberReader
from backend.contract import BlobNotFound, BlobReader
from backend.layout_index import NoSuchTag, SeveralImages
from backend.manifest import (
    LAYER_GZIP,
    LAYER_TAR,
    LAYER_ZSTD,
    LAYERS_MAX,
    OCI_CONFIG,
    OCI_MANIFEST,
    Descriptor,
    ImageManifest,
    diff_ids_of,
    shown,
    this_platform,
)
from backend.metadata import fetch_oci_metadata
from backend.ocidigest import DigestMismatch, digest_of
from backend.reference import DockerArchiveReference, Reference, normal_name
from backend.store import (
    CannotPublish,
    ImageFiles,
    ImageMetadata,
    PublishProgress,
    PublishResult,
    StoredManifest,
)
from backend.tar_index import ArchiveBroken, Member

LISTING_NAME = "manifest.json"
IMAGES_MAX = 1024
_MAGICS = {b"\x1f\x8b\x08": LAYER_GZIP, b"\x28\xb5\x2f\xfd": LAYER_ZSTD}


class _Listed(msgspec.Struct, frozen=True):
    """An image in `manifest.json` (moby, docs/image/spec/v1.2.md, "Combined Image JSON + Filesystem")."""

    config: str = msgspec.field(name="Config")
    layers: tuple[str, ...] = msgspec.field(name="Layers")
    names: tuple[str, ...] | None = msgspec.field(default=None, name="RepoTags")


class _Image(msgspec.Struct, frozen=True):
    """The image that is meant, and where its blobs are, by digest."""

    manifest: StoredManifest
    blobs: dict[str, Member]


class DockerArchiveStore:
    """An `OciStore` over one archive file that nothing can be put into. Made by `open`."""

    def __init__(self, reference: DockerArchiveReference) -> None:
        self._reference = reference
        self._where = str(reference)
        self._archive = ArchiveFile(reference.file, self._where)
        self._lock = trio.Lock()
        self._image: _Image | None = None

    def __repr__(self) -> str:
        return f"<DockerArchiveStore {self._reference}>"

    @classmethod
    @asynccontextmanager
    async def open(cls, reference: DockerArchiveReference) -> AsyncIterator["DockerArchiveStore"]:
        """The store; the file is opened when it is first read, and closed with the context."""
        store = cls(reference)
        try:
            yield store
        finally:
            with trio.CancelScope(shield=True):
                await store._archive.aclose()

    @property
    def reference(self) -> Reference:
        """What names the image."""
        return self._reference

    async def fetch_metadata(self, images_dir: Path) -> ImageMetadata:
        """Raises `NotNydusImage`: docker keeps none."""
        return await fetch_oci_metadata(self, images_dir, this_platform())

    def open_blob(self, blob_id: str, size_bytes: int) -> BlobReader:
        """A reader of a data blob."""
        return self.open_content(f"sha256:{blob_id}", size_bytes)

    async def get_manifest(self, digest: str | None = None) -> StoredManifest:
        """The manifest that was made for the image; all of its layers are read for that, once.

        Raises `BlobNotFound`, `ArchiveBroken`, `DigestMismatch` and `ManifestBroken`.
        """
        manifest = (await self._load()).manifest
        if digest not in (None, manifest.digest):
            raise BlobNotFound(where=f"{self._where}, {digest}")
        return manifest

    def open_content(self, digest: str, size_bytes: int | None) -> BlobReader:
        """See `OciStore`."""

        async def locate() -> Member:
            blobs = (await self._load()).blobs
            if digest not in blobs:
                raise BlobNotFound(where=f"{self._where}, {digest}")
            return blobs[digest]

        return MemberReader(self._archive, locate, f"{self._where}, {digest}")

    async def publish(self, image: ImageFiles, progress: PublishProgress) -> PublishResult:
        """Raises `CannotPublish`."""
        raise self._read_only()

    async def put_manifest(self, media_type: str, data: bytes, *, as_reference: bool) -> str:
        """Raises `CannotPublish`."""
        raise self._read_only()

    async def has_blob(self, digest: str, size_bytes: int) -> bool:
        """Raises `CannotPublish`: who asks wants to write."""
        raise self._read_only()

    async def mount_blob(self, digest: str, origin: Reference) -> bool:
        """Raises `CannotPublish`."""
        raise self._read_only()

    async def put_file(
        self, descriptor: Descriptor, path: Path, on_bytes: Callable[[int], None], *, may_link: bool = False
    ) -> None:
        """Raises `CannotPublish`."""
        raise self._read_only()

    async def put_stream(
        self, descriptor: Descriptor, reader: BlobReader, on_bytes: Callable[[int], None]
    ) -> None:
        """Raises `CannotPublish`."""
        raise self._read_only()

    def _read_only(self) -> CannotPublish:
        why = "docker archives are only read; write oci-archive:FILE"
        return CannotPublish(where=self._where, why=why)

    async def _load(self) -> _Image:
        async with self._lock:
            if self._image is None:
                self._image = await self._make_image(await self._listed())
            return self._image

    async def _listed(self) -> _Listed:
        data = await self._archive.read_document(LISTING_NAME)
        if data is None:
            raise ArchiveBroken(where=self._where, why=f"no {LISTING_NAME} in it: not made by docker save")
        try:
            images = msgspec.json.decode(data, type=tuple[_Listed, ...])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ArchiveBroken(where=self._where, why=f"{LISTING_NAME}: {error}") from error
        if len(images) > IMAGES_MAX:
            raise ArchiveBroken(where=self._where, why=f"{len(images)} images, more than {IMAGES_MAX}")
        return _choose(images, self._reference)

    async def _make_image(self, listed: _Listed) -> _Image:
        if len(listed.layers) > LAYERS_MAX:
            why = f"an image of {len(listed.layers)} layers, more than {LAYERS_MAX}"
            raise ArchiveBroken(where=self._where, why=why)
        config_data = await self._archive.read_document(listed.config)
        if config_data is None:
            raise self._missing(listed.config)
        config = Descriptor(OCI_CONFIG, digest_of(config_data), len(config_data))
        diff_ids = diff_ids_of(config_data, self._where)
        if len(diff_ids) != len(listed.layers):
            why = f"{len(listed.layers)} layers and {len(diff_ids)} diff IDs in the config"
            raise ArchiveBroken(where=self._where, why=why)
        blobs = {config.digest: await self._archive.find(listed.config)}
        known: dict[Member, Descriptor] = {}  # a layer that comes twice is read once
        layers = []
        for name, diff_id in zip(listed.layers, diff_ids, strict=True):
            member = await self._find_layer(name)
            if member not in known:
                known[member] = await self._describe(member)
            layer = known[member]
            if layer.media_type == LAYER_TAR and layer.digest != diff_id:
                where = f"{self._where}, {shown(name)}"
                raise DigestMismatch(where=where, expected=shown(diff_id), got=layer.digest)
            blobs[layer.digest] = member
            layers.append(layer)
        manifest = ImageManifest(
            schema_version=2, media_type=OCI_MANIFEST, config=config, layers=tuple(layers)
        )
        data = msgspec.json.encode(manifest)
        return _Image(StoredManifest(OCI_MANIFEST, digest_of(data), data), blobs)

    async def _find_layer(self, name: str) -> Member:
        member = (await self._archive.index()).find(name)
        if member is None:
            raise self._missing(name)
        return member

    def _missing(self, name: str) -> ArchiveBroken:
        return ArchiveBroken(where=self._where, why=f"{LISTING_NAME} names {shown(name)}, which is not in it")

    async def _describe(self, layer: Member) -> Descriptor:
        start = await self._archive.read(layer, 0, min(4, layer.size_bytes))
        kinds = (kind for magic, kind in _MAGICS.items() if start.startswith(magic))
        digest = await self._archive.digest(layer)
        return Descriptor(next(kinds, LAYER_TAR), digest, layer.size_bytes)


def _choose(images: tuple[_Listed, ...], reference: DockerArchiveReference) -> _Listed:
    """The image that the reference names. Raises `NoSuchTag` or `SeveralImages`, with what there is."""
    wanted = reference.name
    if wanted is None and len(images) == 1:
        return images[0]
    if wanted is not None and wanted.startswith("@") and int(wanted[1:]) < len(images):
        return images[int(wanted[1:])]
    if wanted is not None:
        for image in images:
            if normal_name(wanted) in map(normal_name, image.names or ()):
                return image
    found = [", ".join(image.names or (f"@{number}",)) for number, image in enumerate(images)]
    kind = SeveralImages if wanted is None and images else NoSuchTag
    raise kind(where=reference, found=shown(", ".join(found)) or "none")
