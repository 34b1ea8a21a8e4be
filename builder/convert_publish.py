"""What becomes visible of a conversion: one manifest, or an index of several, set as the last step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import msgspec

from backend.contract import BackendError
from backend.copy import copy_content
from backend.manifest import (
    DOCKER_MANIFEST,
    NYDUS_ARTIFACT,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    ImageIndex,
    is_nydus_entry,
)
from backend.ocidigest import digest_of
from backend.platforms import Platform
from backend.publish import Transfer
from backend.source_image import Source, SourceImage, find_source
from backend.store import OciStore
from builder.convert import ConvertedImage


class SourceMoved(BackendError):
    """A tag that was to be replaced, and that somebody else has replaced meanwhile."""

    message = (
        "{where}: it named {was} when the conversion began, and now {now}; it was left alone, run this again"
    )
    exit_code: ClassVar[int] = 64


@dataclass(frozen=True, slots=True)
class Conversion:
    """An image and what it was converted to."""

    source: SourceImage
    converted: ConvertedImage


async def source_to_replace(
    store: OciStore, source: Source, wanted: Platform | None, *, keeps_others: bool
) -> Source:
    """What the reference of `source` names now, when it is to be replaced by what was made of that.

    With `keeps_others` it may have become another index, as long as the images that were converted are in it.
    Raises `SourceMoved`.
    """
    now = await find_source(store, wanted)
    is_kept = keeps_others and _digests(now) == _digests(source)
    if now.digest != source.digest and not is_kept:
        raise SourceMoved(where=store.reference, was=source.digest, now=now.digest)
    return now


def _digests(source: Source) -> list[str]:
    return [image.stored.digest for image in source.images]


async def publish_single(target: OciStore, conversion: Conversion) -> str:
    """Makes the image what the target's reference names; its digest."""
    return await target.put_manifest(OCI_MANIFEST, conversion.converted.manifest, as_reference=True)


async def publish_index(
    target: OciStore, source: Source, conversions: Sequence[Conversion], originals: Sequence[Descriptor]
) -> str:
    """Makes an index of `originals` and the converted images what the target's reference names.

    It has the annotations of the source's index, if that is one.
    """
    entries = list(originals)
    for conversion in conversions:
        manifest = conversion.converted.manifest
        await target.put_manifest(OCI_MANIFEST, manifest, as_reference=False)
        entries.append(
            Descriptor(
                OCI_MANIFEST,
                digest_of(manifest),
                len(manifest),
                platform=conversion.source.platform,
                artifact_type=NYDUS_ARTIFACT,
            )
        )
    index = ImageIndex(
        schema_version=2,
        media_type=OCI_INDEX,
        manifests=tuple(entries),
        annotations=source.index.annotations if source.index else {},
    )
    return await target.put_manifest(OCI_INDEX, msgspec.json.encode(index), as_reference=True)


async def bring_originals(
    store: OciStore, target: OciStore, transfer: Transfer, source: Source, *, is_same_place: bool
) -> list[Descriptor]:
    """Has the target hold the original images too; entries of an index that name them, for its beginning.

    In the same repository everything that the index had stays, but for Nydus images of the platforms that
    were converted. In another one it gets the images that were converted.
    """
    if is_same_place and source.index is not None:
        done = [image.platform for image in source.images]
        return [entry for entry in source.index.manifests if not _is_replaced(entry, done)]
    entries = []
    for image in source.images:
        named = image.descriptor
        if not is_same_place:
            await copy_content(image.manifest, store, transfer)
            await target.put_manifest(named.media_type, image.stored.data, as_reference=False)
        entries.append(msgspec.structs.replace(named, platform=image.platform))
    return entries


def _is_replaced(entry: Descriptor, done: Sequence[Platform]) -> bool:
    if entry.media_type not in (OCI_MANIFEST, DOCKER_MANIFEST) or not is_nydus_entry(entry):
        return False
    return entry.platform is None or any(platform.is_same(entry.platform) for platform in done)
