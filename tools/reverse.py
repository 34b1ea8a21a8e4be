"""`nydus-py convert --reverse`: a Nydus image becomes an ordinary one, of one layer.

The layer is on its way to the target while it is written; its file goes when it is there.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec
import trio

from backend.image_config import reversed_config
from backend.manifest import (
    OCI_CONFIG,
    OCI_MANIFEST,
    Descriptor,
    ImageManifest,
    build_config,
)
from backend.ocidigest import digest_of
from backend.pieces import first_failure
from backend.platforms import Platform
from backend.publish import Transfer
from backend.publishing import staging_directory
from backend.reference import Reference, absolute_reference
from backend.store import OciStore, open_store
from builder.nydus_source import fetch_source
from builder.oci_layer import LayerCompression, LayerFile, LayerTar, SettledChunks
from builder.unpack import content_refs, unpack
from rafs.bootstrap import Bootstrap
from tools.chunk_stream import chunk_stream
from tools.image import OpenImage
from tools.output import talk
from tools.progress import TransferProgress, progress_bar
from tools.settings import Settings
from tools.sizes import format_size


@dataclass(frozen=True, slots=True)
class ReverseReport:
    """What was made. Sizes in bytes: `bytes_in` of the plain tar, `bytes_out` of the layer."""

    source: str
    reference: str
    digest: str
    inodes: int
    sockets_left_out: int
    bytes_in: int
    bytes_out: int
    bytes_uploaded: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class ReverseOptions:
    """Of which image of an index, and how its layer is packed."""

    platform: Platform
    compression: LayerCompression


async def reverse_image(
    source: str, destination: Reference, options: ReverseOptions, settings: Settings, start: float
) -> ReverseReport:
    """Makes the ordinary image. Raises what stores raise, and what `unpack` raises."""
    registry_options = settings.registry_options()
    async with (
        open_store(absolute_reference(source), registry_options) as reader,
        open_store(destination, registry_options) as writer,
    ):
        target = cast(OciStore, writer)
        found = await fetch_source(reader, settings.images_dir, options.platform)
        # Not closed: an error on its way out may still hold views of the map.
        image = OpenImage(reader, found.metadata, Bootstrap.open(found.metadata.bootstrap_path))
        config = found.config or build_config(options.platform, (), "")
        with staging_directory(settings.cache_dir / "build") as staging, progress_bar("converting") as bar:
            transfer = Transfer(target, str(destination), TransferProgress(bar))
            layer = await _send_layer(image, staging / "layer", options.compression, transfer)
            made = reversed_config(config, layer.diff_id, source)
            (staging / "config").write_bytes(made)
            described = Descriptor(OCI_CONFIG, digest_of(made), len(made))
            await transfer.send_part(described, staging / "config")
        manifest = ImageManifest(
            schema_version=2,
            media_type=OCI_MANIFEST,
            config=described,
            layers=(layer.descriptor,),
            annotations=found.annotations,
        )
        digest = await target.put_manifest(OCI_MANIFEST, msgspec.json.encode(manifest), as_reference=True)
    return ReverseReport(
        source=source,
        reference=str(destination),
        digest=digest,
        inodes=image.bootstrap.inode_count,
        sockets_left_out=layer.sockets,
        bytes_in=layer.plain_bytes,
        bytes_out=layer.descriptor.size_bytes,
        bytes_uploaded=transfer.result(digest).bytes_uploaded,
        duration_s=round(time.monotonic() - start, 3),
    )


@dataclass(frozen=True, slots=True)
class _SentLayer:
    descriptor: Descriptor
    diff_id: str
    plain_bytes: int
    sockets: int


async def _send_layer(
    image: OpenImage, path: Path, compression: LayerCompression, transfer: Transfer
) -> _SentLayer:
    """Makes the layer; it is on its way to the target meanwhile, and is there in the end."""
    layer = LayerFile(path, compression)
    archive = LayerTar(layer)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transfer.follow_blob, layer.growing, compression.media_type)
            async with chunk_stream(image, content_refs(image.bootstrap)) as chunks:
                await unpack(image.bootstrap, SettledChunks(chunks, layer), archive)
            archive.finish()
            identity = layer.finish()
    except BaseExceptionGroup as group:
        raise first_failure(group) from None
    finally:
        layer.close()
    descriptor = Descriptor(compression.media_type, identity.digest, identity.size_bytes)
    await transfer.send_part(descriptor, path, may_link=True)  # nobody writes to the file any more
    return _SentLayer(descriptor, layer.diff_id, layer.plain_bytes, archive.sockets)


def reverse_lines(report: ReverseReport) -> Iterator[str]:
    """The report as text."""
    if report.sockets_left_out:
        talk(f"{report.sockets_left_out} sockets were left out: a layer cannot hold them")
    yield f"{report.reference} ({report.digest})"
    yield (
        f"{report.inodes} files, a layer of {format_size(report.bytes_out)};"
        f" {format_size(report.bytes_uploaded)} sent; {report.duration_s:.1f} s"
    )
