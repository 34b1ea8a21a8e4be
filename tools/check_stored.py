"""Checks of what a store keeps beside the chunks: the config, and the chunk tables at the ends of blobs."""

import dataclasses
import hashlib
import zlib
from collections.abc import Iterator

import trio

from backend.blobtail import BlobMetaBroken, has_blob_meta, read_blob_meta, table_blob_id
from backend.contract import BlobNotFound, BlobReader, ShortRead
from backend.manifest import (
    MANIFEST_SIZE_MAX_BYTES,
    NYDUS_BLOB,
    OCI_CONFIG,
    Descriptor,
    ImageManifest,
    ManifestBroken,
    diff_ids_of,
    nydus_layers,
    parse_document,
)
from backend.metadata import MANIFEST_NAME
from backend.ocidigest import digest_of
from backend.pieces import pump
from backend.store import ImageMetadata, ImageStore
from rafs.blob_table import BlobEntry
from rafs.blobmeta import BlobMeta
from rafs.check import Fault

_CONFIG_TYPES = (OCI_CONFIG, "application/vnd.docker.container.image.v1+json")
_INFLATE_STEP_BYTES = 4 << 20
_GZIP_WRAPPER = 31


def read_manifest(metadata: ImageMetadata) -> ImageManifest | None:
    """The manifest that came with the metadata; None for an image in a bare directory."""
    path = metadata.directory / MANIFEST_NAME
    if not path.exists():
        return None
    document = parse_document(path.read_bytes(), str(path))
    assert isinstance(document, ImageManifest), "metadata is fetched of one manifest"
    return document


async def config_faults(store: ImageStore, manifest: ImageManifest) -> list[Fault]:
    """What is wrong with the config: its size and digest, and its diff IDs beside the manifest's layers.

    The bootstrap layer is read for its diff ID. Raises what the store raises, but for content that is
    missing or cut short.
    """
    config = manifest.config
    if config.size_bytes > MANIFEST_SIZE_MAX_BYTES:
        wanted = f"at most {MANIFEST_SIZE_MAX_BYTES} bytes, the manifest says {config.size_bytes}"
        return [Fault("config", 0, wanted)]
    reader = store.open_blob(config.hex, config.size_bytes)
    try:
        size_bytes = await reader.size()
        if size_bytes != config.size_bytes:
            return [Fault("config", 0, f"{config.size_bytes} bytes, found {size_bytes}")]
        data = await reader.read_range(0, size_bytes)
    except (BlobNotFound, ShortRead) as error:
        return [Fault("config", 0, f"{config.size_bytes} bytes: {error}")]
    finally:
        await _close(reader)
    if digest_of(data) != config.digest:
        return [Fault("config", 0, f"digest {config.digest}, found {digest_of(data)}")]
    if config.media_type not in _CONFIG_TYPES:
        return []
    return await _diff_id_faults(store, manifest, data)


async def _diff_id_faults(store: ImageStore, manifest: ImageManifest, config: bytes) -> list[Fault]:
    try:
        diff_ids = diff_ids_of(config, "config")
    except ManifestBroken as error:
        return [Fault("config", 0, f"an image config: {error}")]
    if len(diff_ids) != len(manifest.layers):
        wanted = f"{len(manifest.layers)} diff IDs, one for each layer, found {len(diff_ids)}"
        return [Fault("config", 0, wanted)]
    bootstrap = nydus_layers(manifest, "manifest").bootstrap
    faults = []
    for number, (layer, diff_id) in enumerate(zip(manifest.layers, diff_ids, strict=True)):
        if layer is bootstrap:
            wanted = await _plain_digest(store, layer)
        elif layer.media_type == NYDUS_BLOB:
            wanted = layer.digest  # a data blob is as it is: nothing unpacks it
        else:
            continue  # an ordinary layer; only unpacking it would tell
        if diff_id != wanted:
            faults.append(Fault(f"diff ID {number}", 0, f"{wanted}, found {diff_id!r:.100}"))
    return faults


async def _plain_digest(store: ImageStore, layer: Descriptor) -> str:
    """The digest of what a gzip layer, which has been unpacked once already, inflates to."""
    content = hashlib.sha256()
    inflater = zlib.decompressobj(_GZIP_WRAPPER)

    def inflate(piece: bytes) -> None:
        nonlocal inflater
        while piece:
            content.update(inflater.decompress(piece, _INFLATE_STEP_BYTES))
            piece = inflater.unconsumed_tail
            if inflater.eof:  # another member may follow
                piece, inflater = inflater.unused_data, zlib.decompressobj(_GZIP_WRAPPER)

    async def take(piece: bytes) -> None:
        await trio.to_thread.run_sync(inflate, piece)

    reader = store.open_blob(layer.hex, layer.size_bytes)
    try:
        await pump(reader, layer.size_bytes, take)
    finally:
        await _close(reader)
    content.update(inflater.flush())
    return f"sha256:{content.hexdigest()}"


def names_table(manifest: ImageManifest | None, blob: BlobEntry) -> bool:
    """Whether the image has the chunk table of a blob in the registry: `--no-copy` once left it out."""
    named = {layer.hex for layer in manifest.layers} if manifest is not None else {table_blob_id(blob)}
    return has_blob_meta(blob) and table_blob_id(blob) in named | {blob.blob_id}


async def table_faults(store: ImageStore, blob: BlobEntry, meta: BlobMeta) -> list[Fault]:
    """How the node-side chunk table differs from the one at the end of a blob, `names_table` given.

    That of a gzip layer is in a blob of its own. Offsets are into the node-side file. Raises what the store
    raises.
    """
    table_id = table_blob_id(blob)
    reader = store.open_blob(table_id, blob.meta_size or blob.compressed_size)
    record = f"chunk table at the end of blob {table_id[:12]}"
    try:
        stored = BlobMeta(await read_blob_meta(reader, blob, "blob"), "blob")
    except (BlobNotFound, BlobMetaBroken, ShortRead) as error:
        return [Fault(record, blob.ci_offset, f"as the blob table says: {error}")]
    finally:
        await _close(reader)
    return list(_differences(stored, meta))


def _differences(stored: BlobMeta, meta: BlobMeta) -> Iterator[Fault]:
    header_at = meta.count * meta.header.entry_size
    for field in dataclasses.fields(stored.header):
        wanted, found = getattr(stored.header, field.name), getattr(meta.header, field.name)
        if wanted != found:
            expectation = f"{field.name} {int(wanted)} as at the end of the blob, found {int(found)}"
            yield Fault("blob.meta header", header_at, expectation)
            return
    for index in range(meta.count):
        if meta.chunk(index) != stored.chunk(index):
            where = index * meta.header.entry_size
            expectation = f"as at the end of the blob {stored.chunk(index)}, found {meta.chunk(index)}"
            yield Fault(f"chunk info {index}", where, expectation)
    pairs = enumerate(zip(meta.contexts(), stored.contexts(), strict=True), meta.header.context_offset)
    if meta.contexts() != stored.contexts():
        where = next(offset for offset, (found, wanted) in pairs if found != wanted)
        yield Fault("contexts", where, "as at the end of the blob")


async def _close(reader: BlobReader) -> None:
    with trio.CancelScope(shield=True):
        await reader.aclose()
