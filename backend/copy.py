"""Copies an image between stores. Only what the target lacks travels; the manifest comes last.

Between registries, layouts and OCI archives every byte stays as it is, so the copy has the digest of the
original; an index is copied with all its platforms. Bare directories and docker archives have no manifest:
one is made on the way out of them.
"""

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import trio

from backend.docker_archive import DockerArchiveStore
from backend.local import DirStore
from backend.manifest import (
    BOOTSTRAP_ANNOTATION,
    LAYER_GZIP,
    OCI_INDEX,
    OCI_MANIFEST,
    SOURCE_LAYER_ANNOTATION,
    Descriptor,
    ImageIndex,
    ImageManifest,
    ManifestBroken,
    layers_left_out,
    parse_document,
)
from backend.metadata import fetch_oci_metadata, find_image
from backend.platforms import this_platform
from backend.publish import Transfer
from backend.publishing import reporting_writes
from backend.source_image import find_source
from backend.store import ImageStore, OciStore, PublishProgress, PublishResult, StoredManifest


async def copy_image(source: ImageStore, target: ImageStore, progress: PublishProgress) -> PublishResult:
    """Copies what `source` names to what `target` names. Raises what the stores raise.

    A bare directory takes the Nydus image of this platform, a docker archive the ordinary one; the other
    stores take any image.
    """
    if isinstance(source, DirStore):
        async with _scratch() as scratch:
            metadata = await source.fetch_metadata(scratch)
            return await target.publish(source.image_files(metadata), progress)
    # Every other store keeps images the OCI way.
    oci_source = cast(OciStore, source)
    if isinstance(target, DirStore):
        return await _copy_into_directory(oci_source, target, progress)
    if isinstance(target, DockerArchiveStore):
        return await _copy_into_docker_archive(oci_source, target, progress)
    return await _copy_verbatim(oci_source, cast(OciStore, target), progress)


async def _copy_into_directory(
    source: OciStore, target: DirStore, progress: PublishProgress
) -> PublishResult:
    transfer = Transfer(target, str(target.reference), progress)
    image = await find_image(source, this_platform())
    async with _scratch() as scratch:
        metadata = await fetch_oci_metadata(source, scratch, this_platform())
        for layer in (*image.layers.blobs, *await _left_out(image.manifest, source)):
            await transfer.send_content(layer, source, is_counted=True)
        for table in image.layers.tables:
            await transfer.send_content(table, source, is_counted=False)
        return transfer.result(await target.put_bootstrap(metadata.bootstrap_path))


async def _copy_into_docker_archive(
    source: OciStore, target: DockerArchiveStore, progress: PublishProgress
) -> PublishResult:
    transfer = Transfer(target, str(target.reference), progress)
    (image,) = (await find_source(source, this_platform())).images
    await copy_content(image.manifest, source, transfer)
    stored = image.stored
    return transfer.result(
        await target.put_manifest(_media_type(stored, image.manifest), stored.data, as_reference=True)
    )


async def _copy_verbatim(source: OciStore, target: OciStore, progress: PublishProgress) -> PublishResult:
    where = str(source.reference)
    transfer = Transfer(target, str(target.reference), progress)
    stored = await source.get_manifest()
    document = parse_document(stored.data, where)
    if isinstance(document, ImageIndex):
        for entry in document.manifests:
            nested = await source.get_manifest(entry.digest)
            manifest = parse_document(nested.data, where)
            if isinstance(manifest, ImageIndex):
                raise ManifestBroken(where=where, why=f"{entry.digest} is an index inside an index")
            await copy_content(manifest, source, transfer)
            await target.put_manifest(_media_type(nested, manifest), nested.data, as_reference=False)
    else:
        await copy_content(document, source, transfer)
    media_type = _media_type(stored, document)
    return transfer.result(await target.put_manifest(media_type, stored.data, as_reference=True))


async def copy_content(manifest: ImageManifest, source: OciStore, transfer: Transfer) -> None:
    """Brings layers and config of an image over, but not its manifest."""
    for layer in (*manifest.layers, *await _left_out(manifest, source)):
        if not layer.urls:  # those with addresses are not kept in registries
            await transfer.send_content(layer, source, is_counted=_is_data(layer))
    await transfer.send_content(manifest.config, source, is_counted=False)


def _is_data(layer: Descriptor) -> bool:
    return not layer.is_marked(BOOTSTRAP_ANNOTATION) and SOURCE_LAYER_ANNOTATION not in layer.annotations


async def _left_out(manifest: ImageManifest, source: OciStore) -> list[Descriptor]:
    """The gzip layers that an image of other Nydus tools reads and its manifest does not name."""
    layers = []
    for digest in layers_left_out(manifest, str(source.reference)):
        reader = source.open_content(digest, None)
        try:
            layers.append(Descriptor(LAYER_GZIP, digest, await reader.size()))
        finally:
            with trio.CancelScope(shield=True):
                await reader.aclose()
    return layers


def _media_type(stored: StoredManifest, document: ImageManifest | ImageIndex) -> str:
    fallback = OCI_INDEX if isinstance(document, ImageIndex) else OCI_MANIFEST
    return document.media_type or stored.media_type or fallback


@asynccontextmanager
async def _scratch() -> AsyncIterator[Path]:
    with (
        reporting_writes(Path(tempfile.gettempdir())),
        tempfile.TemporaryDirectory(prefix="nydus-py-") as name,
    ):
        yield Path(name)
