"""OCI manifests, indexes and configs of Nydus images: their parts, how to read and how to write them.

Media types and annotations are those of nydusify and nydus-snapshotter, so that their tools know the image.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import msgspec

from backend.contract import BackendError
from backend.ocidigest import is_digest
from backend.platforms import Platform

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
LAYER_TAR = "application/vnd.oci.image.layer.v1.tar"
LAYER_GZIP = LAYER_TAR + "+gzip"
LAYER_ZSTD = LAYER_TAR + "+zstd"
NYDUS_CONFIG = "application/vnd.nydus.image.config.v1+json"
NYDUS_BLOB = "application/vnd.oci.image.layer.nydus.blob.v1"
NYDUS_ARTIFACT = "application/vnd.nydus.image.manifest.v1+json"
NYDUS_OS_FEATURE = "nydus.remoteimage.v1"

BLOB_ANNOTATION = "containerd.io/snapshot/nydus-blob"
BOOTSTRAP_ANNOTATION = "containerd.io/snapshot/nydus-bootstrap"
FS_VERSION_ANNOTATION = "containerd.io/snapshot/nydus-fs-version"
REFERENCE_BLOBS_ANNOTATION = "containerd.io/snapshot/nydus-reference-blob-ids"
SOURCE_LAYER_ANNOTATION = "containerd.io/snapshot/nydus-ref"
"""At a blob that is only the chunk table of a layer of an ordinary image: that layer's digest."""
REF_NAME_ANNOTATION = "org.opencontainers.image.ref.name"

FS_VERSION = "6"
EPOCH = "1970-01-01T00:00:00Z"
MANIFEST_SIZE_MAX_BYTES = 4 << 20
LAYERS_MAX = 1024


class ManifestBroken(BackendError):
    """A manifest, an index or a part of them that cannot be true."""

    message = "{where}: broken manifest: {why}"
    exit_code: ClassVar[int] = 47


class NotNydusImage(BackendError):
    """The image exists and is something else."""

    message = (
        "{where}: not a Nydus image but {what}; "
        "unpack it and make one with `nydus-py build`, or convert it with a Nydus builder"
    )
    exit_code = 46


class UnsupportedImage(BackendError):
    """A Nydus image of a kind that this program does not read."""

    message = "{where}: {why}"
    exit_code = 111


class NoSuchPlatform(BackendError):
    """An index without a Nydus image for the platform asked for."""

    message = "{where}: no Nydus image for {wanted} in this index; it has {found}"
    exit_code = 112


class Descriptor(msgspec.Struct, frozen=True, omit_defaults=True):
    """A pointer to content: what it is, its digest ("sha256:<hex>") and its size in bytes."""

    media_type: str = msgspec.field(name="mediaType")
    digest: str
    size_bytes: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] = msgspec.field(name="size")
    annotations: dict[str, str] = {}
    platform: Platform | None = None
    artifact_type: str = msgspec.field(default="", name="artifactType")
    urls: tuple[str, ...] = ()

    @property
    def hex(self) -> str:
        """The digest without its algorithm, which is also the ID of a Nydus blob."""
        return self.digest.removeprefix("sha256:")

    def is_marked(self, annotation: str) -> bool:
        """Whether an annotation says "true"."""
        return self.annotations.get(annotation) == "true"


class ImageManifest(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One image for one platform."""

    schema_version: int = msgspec.field(name="schemaVersion")
    media_type: str = msgspec.field(default="", name="mediaType")
    artifact_type: str = msgspec.field(default="", name="artifactType")
    config: Descriptor
    layers: tuple[Descriptor, ...]
    subject: Descriptor | None = None
    annotations: dict[str, str] = {}


class ImageIndex(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Images for several platforms under one name; also what `index.json` of an OCI layout holds."""

    schema_version: int = msgspec.field(name="schemaVersion")
    media_type: str = msgspec.field(default="", name="mediaType")
    manifests: tuple[Descriptor, ...]
    annotations: dict[str, str] = {}


class NydusLayers(msgspec.Struct, frozen=True):
    """The layers of a Nydus image: data blobs in the order of the blob table, and the bootstrap.

    `tables` are the chunk tables of gzip layers. Other Nydus tools leave those layers themselves out of
    `blobs`: they are in the repository because of the image that they are from.
    """

    blobs: tuple[Descriptor, ...]
    bootstrap: Descriptor
    tables: tuple[Descriptor, ...] = ()

    def sizes(self) -> dict[str, int]:
        """Sizes in bytes of all blobs that the manifest names, by their ID."""
        return {blob.hex: blob.size_bytes for blob in (*self.blobs, *self.tables)}


class _RootFs(msgspec.Struct, frozen=True):
    type: str
    diff_ids: tuple[str, ...]


class _History(msgspec.Struct, frozen=True):
    created: str
    created_by: str
    comment: str


class _Config(msgspec.Struct, frozen=True):
    created: str
    architecture: str
    os: str
    config: dict[str, str]
    rootfs: _RootFs
    history: tuple[_History, ...]


class _Layers(msgspec.Struct, frozen=True):
    rootfs: _RootFs


class _Artifact(msgspec.Struct, frozen=True):
    artifact_type: str = msgspec.field(default="", name="artifactType")


class _Kind(msgspec.Struct, frozen=True):
    """Which of the two a document is; one that could be read both ways is an attack (CVE-2021-41190)."""

    manifests: msgspec.Raw = msgspec.Raw()
    layers: msgspec.Raw = msgspec.Raw()


def shown(text: str, length: int = 200) -> str:
    """Text that others chose, cut and with everything escaped that a terminal would act on."""
    return repr(text[:length])[1:-1]


def parse_document(data: bytes, where: str) -> ImageManifest | ImageIndex:
    """Reads a manifest or an index; raises `ManifestBroken`, or `NotNydusImage` for neither of them."""
    if len(data) > MANIFEST_SIZE_MAX_BYTES:
        raise ManifestBroken(where=where, why=f"{len(data)} bytes, more than {MANIFEST_SIZE_MAX_BYTES}")
    try:
        kind = msgspec.json.decode(data, type=_Kind)
        if bytes(kind.manifests) and bytes(kind.layers):
            raise ManifestBroken(where=where, why="it has both manifests and layers")
        if bytes(kind.manifests):
            return _checked_index(msgspec.json.decode(data, type=ImageIndex), where)
        if not bytes(kind.layers):
            raise NotNydusImage(where=where, what="a manifest without layers")
        return _checked_manifest(msgspec.json.decode(data, type=ImageManifest), where)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ManifestBroken(where=where, why=str(error)) from error


def _checked_manifest(manifest: ImageManifest, where: str) -> ImageManifest:
    if manifest.schema_version != 2:
        raise ManifestBroken(where=where, why=f"schema version {manifest.schema_version}, not 2")
    _check_descriptors((manifest.config, *manifest.layers), where)
    return manifest


def _checked_index(index: ImageIndex, where: str) -> ImageIndex:
    if index.schema_version != 2:
        raise ManifestBroken(where=where, why=f"schema version {index.schema_version}, not 2")
    _check_descriptors(index.manifests, where)
    return index


def _check_descriptors(descriptors: Sequence[Descriptor], where: str) -> None:
    if len(descriptors) > LAYERS_MAX:
        raise ManifestBroken(where=where, why=f"{len(descriptors)} entries, more than {LAYERS_MAX}")
    for descriptor in descriptors:
        if not is_digest(descriptor.digest):
            raise ManifestBroken(where=where, why=f"'{shown(descriptor.digest)}' is not a sha256 digest")


def artifact_type_of(data: bytes) -> str:
    """The artifact type that a manifest declares, "" for none."""
    return msgspec.json.decode(data, type=_Artifact).artifact_type


def nydus_layers(manifest: ImageManifest, where: str) -> NydusLayers:
    """The data blobs and the bootstrap of a manifest; raises `NotNydusImage` or `UnsupportedImage`."""
    marked = [layer for layer in manifest.layers if layer.is_marked(BOOTSTRAP_ANNOTATION)]
    if not marked:
        raise NotNydusImage(where=where, what=_describe(manifest))
    if len(marked) > 1:
        raise ManifestBroken(where=where, why=f"{len(marked)} bootstrap layers")
    bootstrap = marked[0]
    version = bootstrap.annotations.get(FS_VERSION_ANNOTATION, FS_VERSION)
    if version != FS_VERSION:
        raise UnsupportedImage(where=where, why=f"RAFS version {shown(version)}; only version 6 can be read")
    if bootstrap.media_type not in (LAYER_GZIP, DOCKER_LAYER_GZIP):
        raise UnsupportedImage(where=where, why=f"a bootstrap layer of type {shown(bootstrap.media_type)}")
    blobs = [
        layer
        for layer in manifest.layers
        if layer.media_type == NYDUS_BLOB or layer.is_marked(BLOB_ANNOTATION)
    ]
    tables = tuple(blob for blob in blobs if SOURCE_LAYER_ANNOTATION in blob.annotations)
    data = tuple(blob for blob in blobs if SOURCE_LAYER_ANNOTATION not in blob.annotations)
    return NydusLayers(data, bootstrap, tables)


def layers_left_out(manifest: ImageManifest, where: str) -> tuple[str, ...]:
    """Digests of gzip layers whose chunk tables a manifest names, and not themselves.

    Raises `ManifestBroken` for an annotation that is no digest.
    """
    sources = [layer.annotations.get(SOURCE_LAYER_ANNOTATION) for layer in manifest.layers]
    wanted = dict.fromkeys(source for source in sources if source is not None)
    for digest in wanted:
        if not is_digest(digest):
            raise ManifestBroken(
                where=where, why=f"{SOURCE_LAYER_ANNOTATION}: '{shown(digest)}' is no digest"
            )
    named = {layer.digest for layer in manifest.layers}
    return tuple(digest for digest in wanted if digest not in named)


def _describe(manifest: ImageManifest) -> str:
    kind = manifest.artifact_type or manifest.config.media_type
    if "image" in kind:
        return f"an ordinary container image of {len(manifest.layers)} layers"
    return f"an artifact of type {shown(kind)}"


def choose_manifests(index: ImageIndex, wanted: Platform, where: str) -> tuple[Descriptor, ...]:
    """Entries of an index that may be the Nydus image for `wanted`, likeliest first.

    Entries that say that they are Nydus images come alone; where none says so, every image of the platform
    has to be looked at. Of several variants the best comes first, and one that the host would not run last:
    it can be mounted. Raises `NoSuchPlatform`.
    """
    images = [entry for entry in index.manifests if entry.media_type in (OCI_MANIFEST, DOCKER_MANIFEST)]
    fitting = [entry for entry in images if entry.platform is None or wanted.runs(entry.platform)]
    if not fitting:
        found = ", ".join(sorted({str(entry.platform) for entry in images})) or "no images"
        raise NoSuchPlatform(where=where, wanted=wanted, found=shown(found))
    fitting.sort(key=lambda entry: nearness_of(entry, wanted) or (), reverse=True)
    labelled = [entry for entry in fitting if is_nydus_entry(entry)]
    return tuple(labelled or fitting)


def nearness_of(entry: Descriptor, wanted: Platform) -> tuple[int, ...] | None:
    """How well an entry of an index suits a host, the larger the better; None for one that it does not run.

    One that does not say what it runs on is the last resort.
    """
    return wanted.nearness(entry.platform) if entry.platform is not None else ()


def is_nydus_entry(entry: Descriptor) -> bool:
    """Whether an entry of an index says that it is a Nydus image."""
    features = entry.platform.os_features if entry.platform else ()
    return entry.artifact_type == NYDUS_ARTIFACT or NYDUS_OS_FEATURE in features


def blob_descriptor(blob_id: str, size_bytes: int, table_of: str = "") -> Descriptor:
    """The layer of one blob, whose ID is its SHA-256: data, or the chunk table of the gzip layer `table_of`.

    https://github.com/dragonflyoss/nydus/blob/master/docs/nydus-zran.md, whose tools mark such tables so.
    """
    annotations = {BLOB_ANNOTATION: "true"}
    if table_of:
        annotations[SOURCE_LAYER_ANNOTATION] = f"sha256:{table_of}"
    return Descriptor(NYDUS_BLOB, f"sha256:{blob_id}", size_bytes, annotations)


def bootstrap_descriptor(digest: str, size_bytes: int, reference_blob_ids: Sequence[str]) -> Descriptor:
    """The bootstrap layer; `reference_blob_ids` are the blobs that came from chunk dictionaries."""
    annotations = {BOOTSTRAP_ANNOTATION: "true", FS_VERSION_ANNOTATION: FS_VERSION}
    if reference_blob_ids:
        annotations[REFERENCE_BLOBS_ANNOTATION] = msgspec.json.encode(list(reference_blob_ids)).decode()
    return Descriptor(LAYER_GZIP, digest, size_bytes, annotations)


def reference_blob_ids_of(bootstrap: Descriptor, where: str) -> tuple[str, ...]:
    """The blobs that came from chunk dictionaries, by the bootstrap layer. Raises `ManifestBroken`."""
    try:
        text = bootstrap.annotations.get(REFERENCE_BLOBS_ANNOTATION, "[]")
        return tuple(msgspec.json.decode(text, type=list[str]))
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError) as error:
        raise ManifestBroken(where=where, why=f"{REFERENCE_BLOBS_ANNOTATION}: {error}") from error


def build_config(target: Platform, blobs: Sequence[Descriptor], bootstrap_diff_id: str) -> bytes:
    """The config of an image; nothing in it depends on when or where it is written.

    The diff ID of a data blob is its own digest, that of the bootstrap layer the one of its plain tar.
    """
    history = [_History(EPOCH, "nydus-py build", "Nydus Blob Layer") for _ in blobs]
    history.append(_History(EPOCH, "nydus-py build", "Nydus Bootstrap Layer"))
    diff_ids = (*(blob.digest for blob in blobs), bootstrap_diff_id)
    rootfs = _RootFs("layers", diff_ids)
    return msgspec.json.encode(
        _Config(EPOCH, target.architecture, target.os, {}, rootfs, tuple(history)),
    )


def platform_of(config: bytes, where: str) -> Platform:
    """What an image runs on, by its config. Raises `ManifestBroken`."""
    try:
        return msgspec.json.decode(config, type=Platform)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ManifestBroken(where=where, why=f"config: {error}") from error


def diff_ids_of(config: bytes, where: str) -> tuple[str, ...]:
    """The diff IDs in the config of an image. Raises `ManifestBroken`."""
    try:
        return msgspec.json.decode(config, type=_Layers).rootfs.diff_ids
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ManifestBroken(where=where, why=f"config: {error}") from error


def build_manifest(
    config: Descriptor,
    blobs: Sequence[Descriptor],
    bootstrap: Descriptor,
    annotations: dict[str, str] | None = None,
    subject: Descriptor | None = None,
) -> bytes:
    """The manifest of an image: data layers in the order of the blob table, the bootstrap layer last."""
    return msgspec.json.encode(
        ImageManifest(
            schema_version=2,
            media_type=OCI_MANIFEST,
            artifact_type=NYDUS_ARTIFACT,
            config=config,
            layers=(*blobs, bootstrap),
            subject=subject,
            annotations=annotations or {},
        )
    )
