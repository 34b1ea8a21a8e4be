"""A Nydus image as the source of another one: its metadata on this machine, and what its manifest says."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import trio

from backend.blobtail import table_blob_id
from backend.local import DirStore
from backend.metadata import fetch_image_metadata, find_image
from backend.platforms import Platform
from backend.source_image import read_small_blob
from backend.store import BlobFile, ImageMetadata, ImageStore, OciStore
from rafs.blob_table import BlobEntry
from rafs.bootstrap import Bootstrap


@dataclass(frozen=True, slots=True)
class NydusSource:
    """A Nydus image. A bare directory has no config and no annotations; `sizes` are those of its blobs."""

    reference: str
    metadata: ImageMetadata
    sizes: dict[str, int]
    config: bytes | None = None
    annotations: dict[str, str] = field(default_factory=dict)

    def blob_files(self, entry: BlobEntry) -> tuple[BlobFile, ...]:
        """A blob of it as another image gets it, and the blob of its chunk table where that is apart."""
        size_bytes = self.sizes.get(entry.blob_id, entry.compressed_size)
        meta = self.metadata.blob_meta_path(entry.blob_id)
        blob = BlobFile(entry.blob_id, size_bytes, None, meta, self.reference)
        table_id = table_blob_id(entry)
        if table_id == entry.blob_id or table_id not in self.sizes:
            return (blob,)
        return blob, replace(blob, blob_id=table_id, size_bytes=self.sizes[table_id], table_of=entry.blob_id)


def in_order(files: Iterable[BlobFile]) -> tuple[BlobFile, ...]:
    """Data blobs in the order given, chunk tables behind them, as an image has them."""
    return tuple(sorted(files, key=lambda file: bool(file.table_of)))


async def fetch_source(store: ImageStore, images_dir: Path, wanted: Platform) -> NydusSource:
    """The image that a store's reference names; of an index, the one for `wanted`.

    Raises `NotNydusImage`, `NoSuchPlatform`, `ManifestBroken` and what the store raises.
    """
    where = str(store.reference)
    if isinstance(store, DirStore):
        metadata = await store.fetch_metadata(images_dir)
        return NydusSource(where, metadata, await _sizes_on_disk(store, metadata))
    oci = cast(OciStore, store)  # every other store keeps images the OCI way
    image = await find_image(oci, wanted)
    metadata = await fetch_image_metadata(oci, image, images_dir)
    config = await read_small_blob(oci, image.manifest.config, where)
    return NydusSource(where, metadata, image.layers.sizes(), config, image.manifest.annotations)


async def _sizes_on_disk(store: DirStore, metadata: ImageMetadata) -> dict[str, int]:
    with Bootstrap.open(metadata.bootstrap_path) as bootstrap:
        entries = [entry for entry in bootstrap.blobs if entry.chunk_count]
    sizes = {}
    for blob_id in {blob_id for entry in entries for blob_id in (entry.blob_id, table_blob_id(entry))}:
        reader = store.open_blob(blob_id, 0)
        try:
            sizes[blob_id] = await reader.size()
        finally:
            with trio.CancelScope(shield=True):
                await reader.aclose()
    return sizes
