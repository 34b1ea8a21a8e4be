"""`nydus-py convert --reverse`: a Nydus image becomes an ordinary one, of one gzipped layer.

The layer is on its way to the target while it is written; its file goes when it is there.
"""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import msgspec
import trio
from isal import isal_zlib

from backend.growing import GrowingFile
from backend.image_config import reversed_config
from backend.manifest import (
    LAYER_GZIP,
    OCI_CONFIG,
    OCI_MANIFEST,
    Descriptor,
    ImageManifest,
    this_platform,
)
from backend.metadata import find_image
from backend.ocidigest import digest_of
from backend.pieces import first_failure
from backend.publish import Transfer
from backend.publishing import reporting_writes, staging_directory
from backend.reference import Reference
from backend.source_image import read_small_blob
from backend.store import OciStore, open_store
from backend.upload import ContentIdentity
from builder.unpack import content_refs, unpack
from builder.unpack_tar import TarTarget
from tools.chunk_stream import chunk_stream
from tools.image import OpenImage, open_image
from tools.progress import TransferProgress, progress_bar
from tools.settings import Settings
from tools.sizes import format_size

GZIP_LEVEL = 2
_GZIP_WRAPPER = 31


@dataclass(frozen=True, slots=True)
class ReverseReport:
    """What was made. Sizes in bytes: `bytes_in` of the plain tar, `bytes_out` of the layer."""

    source: str
    reference: str
    digest: str
    inodes: int
    bytes_in: int
    bytes_out: int
    bytes_uploaded: int
    duration_s: float


class GrowingGzip:
    """A file that is gzipped while it is written, and grows in front of its reader."""

    def __init__(self, path: Path) -> None:
        self.growing = GrowingFile(path)
        self.size_bytes = self.plain_bytes = 0
        self._path = path
        self._file: IO[bytes] = path.open("wb", buffering=0)
        self._compressor = isal_zlib.compressobj(GZIP_LEVEL, wbits=_GZIP_WRAPPER)
        self._plain, self._packed = hashlib.sha256(), hashlib.sha256()

    def write(self, data: bytes) -> None:
        """Takes plain bytes. Raises `CannotWrite`."""
        self._plain.update(data)
        self.plain_bytes += len(data)
        self._append(self._compressor.compress(data))

    def flush(self) -> None:
        """Nothing to do: what the compressor holds back belongs to its next block."""

    def finish(self) -> ContentIdentity:
        """Writes the end; what the file is now."""
        self._append(self._compressor.flush())
        self._file.close()
        identity = ContentIdentity(f"sha256:{self._packed.hexdigest()}", self.size_bytes)
        self.growing.finish(identity)
        return identity

    @property
    def diff_id(self) -> str:
        """The digest of the plain bytes."""
        return f"sha256:{self._plain.hexdigest()}"

    def close(self) -> None:
        """Closes the file. Twice is harmless."""
        self._file.close()

    def _append(self, packed: bytes) -> None:
        self._packed.update(packed)
        view = memoryview(packed)
        with reporting_writes(self._path):
            while view:
                view = view[self._file.write(view) :]
        self.size_bytes += len(packed)
        self.growing.advance(self.size_bytes)


async def reverse_image(
    source: str, destination: Reference, settings: Settings, start: float
) -> ReverseReport:
    """Makes the ordinary image. Raises what stores raise, and what `unpack` raises."""
    async with (
        open_image(source, settings) as image,
        open_store(destination, settings.registry_options()) as writer,
    ):
        store, target = cast(OciStore, image.store), cast(OciStore, writer)
        found = await find_image(store, this_platform())
        config = await read_small_blob(store, found.manifest.config, source)
        with staging_directory(settings.cache_dir / "build") as staging, progress_bar("converting") as bar:
            transfer = Transfer(target, str(destination), TransferProgress(bar))
            layer, diff_id, plain_bytes = await _send_layer(image, staging / "layer", transfer)
            made = reversed_config(config, diff_id, source)
            (staging / "config").write_bytes(made)
            described = Descriptor(OCI_CONFIG, digest_of(made), len(made))
            await transfer.send_part(described, staging / "config")
        manifest = ImageManifest(
            schema_version=2,
            media_type=OCI_MANIFEST,
            config=described,
            layers=(layer,),
            annotations=found.manifest.annotations,
        )
        digest = await target.put_manifest(OCI_MANIFEST, msgspec.json.encode(manifest), as_reference=True)
    return ReverseReport(
        source=source,
        reference=str(destination),
        digest=digest,
        inodes=image.bootstrap.inode_count,
        bytes_in=plain_bytes,
        bytes_out=layer.size_bytes,
        bytes_uploaded=transfer.result(digest).bytes_uploaded,
        duration_s=round(time.monotonic() - start, 3),
    )


async def _send_layer(image: OpenImage, path: Path, transfer: Transfer) -> tuple[Descriptor, str, int]:
    """The layer's descriptor, its diff ID and the size of its tar in bytes."""
    with reporting_writes(path):
        layer = GrowingGzip(path)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transfer.follow_blob, layer.growing, LAYER_GZIP)
            archive = TarTarget(layer)
            async with chunk_stream(image, content_refs(image.bootstrap)) as chunks:
                await unpack(image.bootstrap, chunks, archive)
            archive.finish()
            identity = layer.finish()
    except BaseExceptionGroup as group:
        raise first_failure(group) from None
    finally:
        layer.close()
    descriptor = Descriptor(LAYER_GZIP, identity.digest, identity.size_bytes)
    await transfer.send_part(descriptor, path)
    return descriptor, layer.diff_id, layer.plain_bytes


def reverse_lines(report: ReverseReport) -> Iterator[str]:
    """The report as text."""
    yield f"{report.reference} ({report.digest})"
    yield (
        f"{report.inodes} files, a layer of {format_size(report.bytes_out)};"
        f" {format_size(report.bytes_uploaded)} sent; {report.duration_s:.1f} s"
    )
