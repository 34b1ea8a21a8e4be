"""Ordinary container images as a source: which manifests a reference names, and what their layers are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import trio

from backend.contract import BackendError
from backend.manifest import (
    BOOTSTRAP_ANNOTATION,
    DOCKER_MANIFEST,
    OCI_MANIFEST,
    Descriptor,
    ImageIndex,
    ImageManifest,
    ManifestBroken,
    NoSuchPlatform,
    is_nydus_entry,
    nearness_of,
    parse_document,
    platform_of,
    shown,
)
from backend.ocidigest import DigestMismatch, digest_of
from backend.platforms import Platform
from backend.store import OciStore, StoredManifest

CONFIG_SIZE_MAX_BYTES = 8 << 20
_FOREIGN = ("nondistributable", "foreign")
TAR_TYPES = frozenset(
    f"application/vnd.{kind}"
    for kind in (
        "oci.image.layer.v1.tar",
        "oci.image.layer.v1.tar+gzip",
        "oci.image.layer.v1.tar+zstd",
        "oci.image.layer.nondistributable.v1.tar",
        "oci.image.layer.nondistributable.v1.tar+gzip",
        "oci.image.layer.nondistributable.v1.tar+zstd",
        "docker.image.rootfs.diff.tar",
        "docker.image.rootfs.diff.tar.gzip",
        "docker.image.rootfs.diff.tar.zstd",
        "docker.image.rootfs.foreign.diff.tar",
        "docker.image.rootfs.foreign.diff.tar.gzip",
    )
)
"""Media types of layers that are tars, compressed or not."""


class NotContainerImage(BackendError):
    """Something that is no ordinary container image where one is to be converted."""

    message = "{where}: {what}"
    exit_code: ClassVar[int] = 124


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image for one platform: its manifest, as stored and as read, its config, and what it runs on."""

    stored: StoredManifest
    manifest: ImageManifest
    config: bytes
    platform: Platform

    @property
    def descriptor(self) -> Descriptor:
        """What names its manifest."""
        media_type = self.manifest.media_type or self.stored.media_type or OCI_MANIFEST
        return Descriptor(media_type, self.stored.digest, len(self.stored.data))


@dataclass(frozen=True, slots=True)
class Source:
    """What a reference names, by its digest: the images asked for, and the index when it is one."""

    digest: str
    images: tuple[SourceImage, ...]
    index: ImageIndex | None


async def find_source(store: OciStore, wanted: Platform | None) -> Source:
    """The image for `wanted`, or those for all platforms when it is None.

    A reference that names a single image gives that one, whatever it runs on. Entries of an index that are
    Nydus images, or no images at all (signatures, attestations), are passed over. Raises `NotContainerImage`,
    `NoSuchPlatform`, `ManifestBroken` and what the store raises.
    """
    where = str(store.reference)
    stored = await store.get_manifest()
    document = parse_document(stored.data, where)
    if isinstance(document, ImageManifest):
        return Source(stored.digest, (await _read_image(store, stored, document, None, where),), None)
    entries = [entry for entry in document.manifests if _is_image(entry)]
    fitting = entries if wanted is None else _best_first(entries, wanted)
    if not fitting:
        found = ", ".join(sorted({str(entry.platform) for entry in entries})) or "no images"
        raise NoSuchPlatform(where=where, wanted=wanted or "any platform", found=shown(found))
    if wanted is not None:
        fitting = fitting[:1]
    images = []
    for entry in fitting:
        nested = await store.get_manifest(entry.digest)
        manifest = parse_document(nested.data, where)
        if isinstance(manifest, ImageIndex):
            raise ManifestBroken(where=where, why=f"{entry.digest} is an index inside an index")
        images.append(await _read_image(store, nested, manifest, entry.platform, where))
    return Source(stored.digest, tuple(images), document)


def _is_image(entry: Descriptor) -> bool:
    named = entry.platform is None or entry.platform.os != "unknown"
    return entry.media_type in (OCI_MANIFEST, DOCKER_MANIFEST) and named and not is_nydus_entry(entry)


def _best_first(entries: Sequence[Descriptor], wanted: Platform) -> list[Descriptor]:
    """The entries that run on a host: that of its own variant, then the highest of the lower ones."""
    ranked = [(nearness, entry) for entry in entries if (nearness := nearness_of(entry, wanted)) is not None]
    return [entry for _, entry in sorted(ranked, key=lambda pair: pair[0], reverse=True)]


async def _read_image(
    store: OciStore, stored: StoredManifest, manifest: ImageManifest, named: Platform | None, where: str
) -> SourceImage:
    if any(layer.is_marked(BOOTSTRAP_ANNOTATION) for layer in manifest.layers):
        raise NotContainerImage(where=where, what="already a Nydus image, where an ordinary one is needed")
    for layer in manifest.layers:
        _expect_tar_layer(layer, where)
    config = await read_small_blob(store, manifest.config, where)
    return SourceImage(stored, manifest, config, named or platform_of(config, where))


def _expect_tar_layer(layer: Descriptor, where: str) -> None:
    kind = layer.media_type
    if any(word in kind for word in _FOREIGN) and layer.urls:
        what = f"layer {layer.digest} is a foreign one ({shown(kind)}): its bytes are not in the registry"
        raise NotContainerImage(where=where, what=what)
    if kind not in TAR_TYPES:
        raise NotContainerImage(
            where=where, what=f"layer {layer.digest} is of type '{shown(kind)}', which is no tar layer"
        )


async def read_small_blob(store: OciStore, descriptor: Descriptor, where: str) -> bytes:
    """A config, whole and verified. Raises `ManifestBroken` for a large one, `DigestMismatch`."""
    if descriptor.size_bytes > CONFIG_SIZE_MAX_BYTES:
        raise ManifestBroken(where=where, why=f"a config of {descriptor.size_bytes} bytes")
    reader = store.open_content(descriptor.digest, descriptor.size_bytes)
    try:
        data = await reader.read_range(0, descriptor.size_bytes)
    finally:
        with trio.CancelScope(shield=True):
            await reader.aclose()
    if digest_of(data) != descriptor.digest:
        raise DigestMismatch(where=where, expected=descriptor.digest, got=digest_of(data))
    return data
