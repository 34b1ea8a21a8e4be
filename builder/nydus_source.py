"""A Nydus image as the source of another one: its metadata on this machine, and what its manifest says."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import trio

from backend.local import DirStore
from backend.manifest import Platform
from backend.metadata import fetch_image_metadata, find_image
from backend.source_image import read_small_blob
from backend.store import ImageMetadata, ImageStore, OciStore


@dataclass(frozen=True, slots=True)
class NydusSource:
    """A Nydus image. A bare directory has no config and no annotations; `sizes` are those of its blobs."""

    reference: str
    metadata: ImageMetadata
    sizes: dict[str, int]
    config: bytes | None = None
    annotations: dict[str, str] = field(default_factory=dict)


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
    sizes = {blob.hex: blob.size_bytes for blob in image.layers.blobs}
    return NydusSource(where, metadata, sizes, config, image.manifest.annotations)


async def _sizes_on_disk(store: DirStore, metadata: ImageMetadata) -> dict[str, int]:
    sizes = {}
    for table in metadata.blob_meta_paths:
        reader = store.open_blob(table.blob_id, 0)
        try:
            sizes[table.blob_id] = await reader.size()
        finally:
            with trio.CancelScope(shield=True):
                await reader.aclose()
    return sizes
