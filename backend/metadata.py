"""Brings an image's metadata to this machine: `images_dir/<manifest digest>/`.

A directory of that name was complete and verified: it is unpacked beside and renamed. One request looks the
tag up, one fetches the bootstrap layer, which is inflated in a thread while its next piece arrives.

Concurrency: directories appear by a rename. One that was damaged since is taken away under an flock on
`images_dir`, after a second look, so that nobody takes away what another process has just put in its place.
"""

import fcntl
import logging
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

from backend.blobtail import BlobMetaBroken, fetch_blob_meta, table_blob_id
from backend.bootstrap_layer import (
    BOOTSTRAP_NAME,
    LAYER_SIZE_MAX_BYTES,
    LayerBroken,
    LayerUnpacker,
    blob_id_of,
    blob_meta_name,
)
from backend.contract import BlobReader
from backend.manifest import (
    SOURCE_LAYER_ANNOTATION,
    Descriptor,
    ImageIndex,
    ImageManifest,
    ManifestBroken,
    NotNydusImage,
    NydusLayers,
    choose_manifests,
    is_nydus_entry,
    nydus_layers,
    parse_document,
)
from backend.metadata_index import find_damage, write_index
from backend.ocidigest import is_digest
from backend.pieces import pump
from backend.platforms import Platform
from backend.publishing import publish_directory, reporting_writes, staging_directory
from backend.store import BlobMetaFile, ImageMetadata, OciStore, StoredManifest
from rafs.blob_table import BlobEntry
from rafs.bootstrap import Bootstrap

MANIFEST_NAME = "manifest.json"
DIFF_ID_NAME = "diff_id"
"""Has the digest of the tar in the bootstrap layer."""
_CANDIDATES_MAX = 8
_SETTLE_TRIES = 2

_log = logging.getLogger(__name__)


class NydusImage(msgspec.Struct, frozen=True):
    """A Nydus image found under a reference: its manifest and what its layers are."""

    stored: StoredManifest
    manifest: ImageManifest
    layers: NydusLayers


async def find_image(store: OciStore, wanted: Platform) -> NydusImage:
    """The Nydus image that a store's reference names; from an index, the one for `wanted`.

    Raises `NotNydusImage`, `NoSuchPlatform`, `ManifestBroken` and what the store raises.
    """
    where = str(store.reference)
    stored = await store.get_manifest()
    document = parse_document(stored.data, where)
    if isinstance(document, ImageManifest):
        return NydusImage(stored, document, nydus_layers(document, where))
    return await _find_in_index(store, document, wanted, where)


async def _find_in_index(store: OciStore, index: ImageIndex, wanted: Platform, where: str) -> NydusImage:
    refusal: NotNydusImage | None = None
    for entry in choose_manifests(index, wanted, where)[:_CANDIDATES_MAX]:
        stored = await store.get_manifest(entry.digest)
        document = parse_document(stored.data, where)
        if isinstance(document, ImageIndex):
            raise ManifestBroken(where=where, why=f"{entry.digest} is an index and should be a manifest")
        try:
            return NydusImage(stored, document, nydus_layers(document, where))
        except NotNydusImage as error:
            refusal = refusal or error
    assert refusal is not None, "choose_manifests gives at least one entry"
    raise refusal


async def fetch_oci_metadata(store: OciStore, images_dir: Path, wanted: Platform) -> ImageMetadata:
    """`ImageStore.fetch_metadata` for stores that keep images the OCI way."""
    return await fetch_image_metadata(store, await find_image(store, wanted), images_dir)


async def fetch_image_metadata(store: OciStore, image: NydusImage, images_dir: Path) -> ImageMetadata:
    """`ImageStore.fetch_metadata` of an image that has been found already."""
    existing = await trio.to_thread.run_sync(metadata_at, images_dir, image.stored.digest)
    if existing:
        return existing
    with staging_directory(images_dir) as staging:
        unpacked = staging / "image"
        with reporting_writes(unpacked):
            unpacked.mkdir()
            (unpacked / MANIFEST_NAME).write_bytes(image.stored.data)
        diff_id = await unpack_bootstrap(store, image.layers.bootstrap, unpacked)
        with reporting_writes(unpacked):
            (unpacked / DIFF_ID_NAME).write_text(diff_id)
        await _complete_tables(store, image.layers, unpacked)
        return await settle_metadata(unpacked, images_dir, image.stored.digest)


def metadata_at(images_dir: Path, digest: str) -> ImageMetadata | None:
    """The metadata of the image with that manifest digest, if this machine has it, whole.

    A directory whose files are not those of its index any more is removed, with a warning, so that the
    caller fetches it again. Blocks for about 0.1 ms per MB. Raises `CannotWrite`.
    """
    directory = images_dir / digest.removeprefix("sha256:")
    if not directory.exists():
        return None
    if find_damage(directory) is not None and _remove_damaged(directory):
        return None
    bootstrap = directory / BOOTSTRAP_NAME
    tables = [
        BlobMetaFile(blob_id, path)
        for path in sorted(directory.iterdir())
        if (blob_id := blob_id_of(path.name)) is not None
    ]
    return ImageMetadata(digest, directory, bootstrap, tuple(tables))


def bootstrap_diff_id(images_dir: Path, digest: str) -> str | None:
    """The diff ID of the bootstrap layer of the image with that manifest digest.

    None where its metadata is not here, or was left by a version that did not keep it.
    """
    path = images_dir / digest.removeprefix("sha256:") / DIFF_ID_NAME
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return None


def layers_of(metadata: ImageMetadata) -> NydusLayers | None:
    """The layers of an image by the manifest kept with its metadata; None for one from a bare directory.

    Raises `ManifestBroken` and `NotNydusImage` for a manifest that was changed since.
    """
    path = metadata.directory / MANIFEST_NAME
    if not path.exists():
        return None
    return nydus_layers(read_manifest(path), str(path))


def read_manifest(path: Path) -> ImageManifest:
    """A manifest that was kept. Raises `OSError`, `ManifestBroken`, `NotNydusImage`."""
    document = parse_document(path.read_bytes(), str(path))
    if isinstance(document, ImageIndex):
        raise ManifestBroken(where=path, why="an index and should be a manifest")
    return document


async def find_companion(store: OciStore, image: ImageMetadata) -> str | None:
    """Digest of the ordinary image for the same platform, where `store` names an index that has both.

    Raises what the store raises, and `ManifestBroken`.
    """
    where = str(store.reference)
    stored = await store.get_manifest()
    if stored.digest == image.digest:
        return None
    document = parse_document(stored.data, where)
    if isinstance(document, ImageManifest):
        return None
    own = next((entry for entry in document.manifests if entry.digest == image.digest), None)
    if own is None or own.platform is None:
        return None
    for entry in document.manifests:
        is_ordinary = entry.digest != image.digest and not is_nydus_entry(entry)
        if is_ordinary and entry.platform is not None and own.platform.is_same(entry.platform):
            return entry.digest
    return None


def remove_metadata(images_dir: Path, digest: str) -> None:
    """Removes the metadata of an image that nobody has mounted. Raises `CannotWrite`."""
    directory = images_dir / digest.removeprefix("sha256:")
    if directory.exists():
        with reporting_writes(directory), staging_directory(images_dir) as staging:
            os.rename(directory, staging / directory.name)


def _remove_damaged(directory: Path) -> bool:
    """Takes a damaged directory away; False when another process has put a sound one there meanwhile."""
    with reporting_writes(directory):
        lock = os.open(directory.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # This first: from here on it may come, but only the holder of the lock makes it go.
            if not directory.exists():
                return True
            damage = find_damage(directory)
            if damage is None:
                return False
            _log.warning("%s is damaged and is fetched again: %s", directory, damage)
            with staging_directory(directory.parent) as staging:
                os.rename(directory, staging / directory.name)
        finally:
            os.close(lock)
    return True


async def settle_metadata(unpacked: Path, images_dir: Path, digest: str) -> ImageMetadata:
    """Gives a finished directory its final name, or takes the one that another process made meanwhile."""
    metadata = await trio.to_thread.run_sync(_settle, unpacked, images_dir, digest)
    if metadata is None:
        where = images_dir / digest.removeprefix("sha256:")
        raise LayerBroken(where=where, why="the directory changes while it is used; run it again")
    return metadata


def _settle(unpacked: Path, images_dir: Path, digest: str) -> ImageMetadata | None:
    with reporting_writes(unpacked):
        write_index(unpacked)
    final = images_dir / digest.removeprefix("sha256:")
    for _ in range(_SETTLE_TRIES):
        publish_directory(unpacked, final)
        if (metadata := metadata_at(images_dir, digest)) is not None:
            return metadata
    return None


async def unpack_bootstrap(store: OciStore, layer: Descriptor, directory: Path) -> str:
    """Fetches a bootstrap layer and unpacks it, verified; its diff ID.

    Raises `LayerBroken` and what the store raises.
    """
    where = str(store.reference)
    if layer.size_bytes > LAYER_SIZE_MAX_BYTES:
        raise ManifestBroken(where=where, why=f"a bootstrap layer of {layer.size_bytes} bytes")
    reader = store.open_content(layer.digest, layer.size_bytes)
    unpacker = LayerUnpacker(directory, where)

    async def take(piece: bytes) -> None:
        await trio.to_thread.run_sync(unpacker.feed, piece)

    try:
        await pump(reader, layer.size_bytes, take)
        unpacker.finish(layer.digest)
        return unpacker.diff_id
    finally:
        unpacker.close()
        with trio.CancelScope(shield=True):
            await reader.aclose()


async def _complete_tables(store: OciStore, layers: NydusLayers, directory: Path) -> None:
    """Fetches the chunk tables that the layer lacks: older tools left them in the blobs only."""
    ids = [blob.hex for blob in layers.blobs]
    ids += [table.annotations[SOURCE_LAYER_ANNOTATION].removeprefix("sha256:") for table in layers.tables]
    if ids and all((directory / blob_meta_name(blob_id)).exists() for blob_id in ids):
        return
    sizes = layers.sizes()
    await fetch_missing_tables(
        directory,
        lambda blob_id: store.open_content(f"sha256:{blob_id}", sizes.get(blob_id)),
        str(store.reference),
    )


async def fetch_missing_tables(directory: Path, open_blob: Callable[[str], BlobReader], where: str) -> None:
    """Reads each chunk table that `directory` lacks from the tail of the blob that has it.

    `open_blob` takes that blob's ID. Raises as `fetch_blob_meta`.
    """
    with Bootstrap.open(directory / BOOTSTRAP_NAME) as bootstrap:
        entries = bootstrap.blobs
    for entry in entries:
        if entry.chunk_count == 0 or _has_table(directory, entry):
            continue
        if not is_digest(f"sha256:{entry.blob_id}"):
            why = "this bootstrap was cut out of the blob that it describes, and does not name it"
            raise BlobMetaBroken(where=where, blob_id=entry.blob_id, why=why)
        reader = open_blob(table_blob_id(entry))
        try:
            await fetch_blob_meta(reader, entry, directory, where)
        finally:
            with trio.CancelScope(shield=True):
                await reader.aclose()


def _has_table(directory: Path, entry: BlobEntry) -> bool:
    """Whether the chunk table of `entry` is in `directory`, where it gets the name of the data blob.

    nydusify names that of a gzip layer by the blob that holds it in the registry.
    """
    path = directory / blob_meta_name(entry.blob_id)
    named_otherwise = directory / blob_meta_name(table_blob_id(entry))
    if not path.exists() and named_otherwise.exists():
        with reporting_writes(directory):
            named_otherwise.rename(path)
    return path.exists()
