"""Publishing an image whose bootstrap was put together from others, with their blobs and new ones."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

from backend.local import DirStore
from backend.manifest import OCI_MANIFEST, Descriptor
from backend.publish import ImageDescription, Transfer, send_image
from backend.store import BlobFile, ImageFiles, ImageStore, OciStore, OpenOrigin
from builder.merge import MergedImage


async def publish_merged(
    merged: MergedImage,
    blobs: Sequence[BlobFile],
    make_config: Callable[[Sequence[Descriptor], str], bytes],
    annotations: Mapping[str, str],
    target: ImageStore,
    transfer: Transfer,
    open_origin: OpenOrigin,
) -> str:
    """Brings the blobs over, each from its file or from the image that has it; the digest of the image.

    `make_config` as in `ImageDescription`; a bare directory has neither config nor annotations. Raises what
    the stores raise.
    """
    for blob in blobs:
        await transfer.send_blob(blob, open_origin, may_link=True)
    if isinstance(target, DirStore):
        return await target.put_bootstrap(merged.bootstrap)
    # Every blob is in the target now, and none of them is one of a dictionary.
    own = tuple(replace(blob, source=None) for blob in blobs)
    description = ImageDescription(make_config, annotations=dict(annotations))
    manifest = await send_image(transfer, ImageFiles(merged.bootstrap, own), description, open_origin)
    return await cast(OciStore, target).put_manifest(OCI_MANIFEST, manifest, as_reference=True)
