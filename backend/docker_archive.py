"""Images in a file of `docker save`: `docker-archive:FILE[:NAME[:TAG]|:@NUMBER]`.

The file has no OCI manifest (`manifest.json` names config and layers of each image by path), so one is made:
the same file always gives the same one. Layers are read as they are, which is a plain tar almost always.
Written is a new file with one image, never into one that is there, as skopeo does.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import trio

from backend.archive_file import ArchiveFile, MemberReader
from backend.compression import START_BYTES, compression_of
from backend.contract import BlobNotFound, BlobReader
from backend.disk_store import OciDiskStore
from backend.docker_archive_writer import DockerArchiveWriter
from backend.docker_listing import LISTING_NAME, SavedImage, parse_listing
from backend.manifest import (
    LAYER_GZIP,
    LAYER_TAR,
    LAYER_ZSTD,
    OCI_CONFIG,
    OCI_MANIFEST,
    Descriptor,
    ImageManifest,
    diff_ids_of,
    parse_document,
    shown,
)
from backend.ocidigest import DigestMismatch, digest_of
from backend.reference import DockerArchiveReference, normal_name
from backend.store import (
    CannotPublish,
    ImageFiles,
    OpenOrigin,
    PublishProgress,
    PublishResult,
    StoredManifest,
)
from backend.tar_index import ArchiveBroken, Member

_LAYER_TYPES = {None: LAYER_TAR, "gzip": LAYER_GZIP, "zstd": LAYER_ZSTD}


class _Image(msgspec.Struct, frozen=True):
    """The image that is meant, and where its blobs are, by digest."""

    manifest: StoredManifest
    blobs: dict[str, Member]


class DockerArchiveStore(OciDiskStore[DockerArchiveReference]):
    """An `OciStore` over one archive file, for ordinary images. Made by `open`."""

    def __init__(self, reference: DockerArchiveReference, open_origin: OpenOrigin) -> None:
        super().__init__(reference, open_origin)
        self._where = str(reference)
        self._archive = ArchiveFile(reference.file, self._where)
        self._writer = DockerArchiveWriter(reference.file.resolve(), self._where)
        self._lock = trio.Lock()
        self._image: _Image | None = None

    @classmethod
    @asynccontextmanager
    async def open(
        cls, reference: DockerArchiveReference, open_origin: OpenOrigin
    ) -> AsyncIterator["DockerArchiveStore"]:
        """The store; the file is opened when it is first read, and closed with the context."""
        store = cls(reference, open_origin)
        try:
            yield store
        finally:
            store._writer.close()
            with trio.CancelScope(shield=True):
                await store._archive.aclose()

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
        """Raises `CannotPublish`: docker keeps no Nydus images."""
        raise self._cannot("docker archives hold no Nydus images; use oci-archive:FILE")

    async def put_manifest(self, media_type: str, data: bytes, *, as_reference: bool) -> str:
        """Makes what was put before the file's image; gives "", since the manifest itself is not kept.

        Raises `CannotPublish` for an index, and a manifest that is not to be the reference's.
        """
        self._check_target()
        document = parse_document(data, self._where)
        if not isinstance(document, ImageManifest) or not as_reference:
            raise self._cannot("a docker archive holds one image for one platform")
        name = self._reference.name
        await self._writer.finish(document, normal_name(name) if name else None)
        return ""

    async def has_blob(self, digest: str, size_bytes: int) -> bool:
        """Whether the blob is in the file that is being written."""
        await trio.lowlevel.checkpoint()
        return digest in self._writer

    async def put_stream(
        self, descriptor: Descriptor, reader: BlobReader, on_bytes: Callable[[int], None]
    ) -> None:
        """See `BlobTarget`; a layer becomes a plain tar."""
        self._check_target()
        await self._writer.add(descriptor, reader, on_bytes)

    def _check_target(self) -> None:
        path, name = self._reference.file, self._reference.name
        if name is not None and name.startswith("@"):
            raise self._cannot(f"{name} is the number of an image that is there; give a name")
        if path.exists() and (not path.is_file() or path.stat().st_size):
            raise self._cannot("the file is there already, and images are not added to docker archives")

    def _cannot(self, why: str) -> CannotPublish:
        return CannotPublish(where=self._where, why=why)

    async def _load(self) -> _Image:
        async with self._lock:
            if self._image is None:
                self._image = await self._make_image(await self._listed())
            return self._image

    async def _listed(self) -> SavedImage:
        data = await self._archive.read_document(LISTING_NAME)
        if data is None:
            raise ArchiveBroken(where=self._where, why=f"no {LISTING_NAME} in it: not made by docker save")
        return parse_listing(data, self._reference)

    async def _make_image(self, listed: SavedImage) -> _Image:
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
        start = await self._archive.read(layer, 0, min(START_BYTES, layer.size_bytes))
        compression = compression_of(start)
        if compression not in _LAYER_TYPES:
            raise ArchiveBroken(where=self._where, why=f"a layer that is compressed with {compression}")
        digest = await self._archive.digest(layer)
        return Descriptor(_LAYER_TYPES[compression], digest, layer.size_bytes)
