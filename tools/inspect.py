"""`nydus-py inspect`: what an image consists of."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import typer

from rafs.blob_table import BlobEntry
from tools.image import OpenImage, open_image
from tools.output import JsonOption, emit
from tools.runtime import run_async
from tools.settings import settings_of
from tools.sizes import format_size


@dataclass(frozen=True, slots=True)
class BlobReport:
    """One data blob. Sizes in bytes: as it lies in the registry, and decoded."""

    id: str
    size_bytes: int
    decoded_size_bytes: int
    chunks: int
    compressor: str
    features: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ImageReport:
    """What `inspect` tells."""

    reference: str
    digest: str
    inodes: int
    chunk_size_bytes: int
    digester: str
    bootstrap_size_bytes: int
    blobs_size_bytes: int
    decoded_size_bytes: int
    chunks: int
    prefetch_files: int
    blobs: tuple[BlobReport, ...]


def run(
    ctx: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="REF", help="The image.")],
    as_json: JsonOption = False,
) -> None:
    """Show what an image consists of: digest, blobs, sizes, features, inodes and chunks."""
    settings = settings_of(ctx)

    async def inspect() -> ImageReport:
        async with open_image(reference, settings) as image:
            return report_of(reference, image)

    emit(run_async(inspect), as_json=as_json, render=_lines)


def report_of(reference: str, image: OpenImage) -> ImageReport:
    """Reads the report out of an image's metadata."""
    bootstrap = image.bootstrap
    blobs = tuple(_blob_report(blob) for blob in bootstrap.blobs)
    return ImageReport(
        reference=reference,
        digest=image.metadata.digest,
        inodes=bootstrap.inode_count,
        chunk_size_bytes=bootstrap.chunk_size,
        digester=bootstrap.digester.name.lower(),
        bootstrap_size_bytes=bootstrap.size_bytes,
        blobs_size_bytes=sum(blob.size_bytes for blob in blobs),
        decoded_size_bytes=sum(blob.decoded_size_bytes for blob in blobs),
        chunks=sum(blob.chunks for blob in blobs),
        prefetch_files=len(bootstrap.prefetch_nids),
        blobs=blobs,
    )


def _blob_report(blob: BlobEntry) -> BlobReport:
    return BlobReport(
        id=blob.blob_id,
        size_bytes=blob.compressed_size,
        decoded_size_bytes=blob.uncompressed_size,
        chunks=blob.chunk_count,
        compressor=blob.compressor.name.lower(),
        features=tuple(feature.name.lower() for feature in blob.features if feature.name),
    )


def _lines(report: ImageReport) -> Iterator[str]:
    ratio = report.blobs_size_bytes / report.decoded_size_bytes if report.decoded_size_bytes else 0.0
    yield f"image      {report.reference}"
    yield f"digest     {report.digest or '-'}"
    yield f"inodes     {report.inodes}"
    yield f"chunks     {report.chunks} of up to {format_size(report.chunk_size_bytes)}, {report.digester}"
    yield f"bootstrap  {format_size(report.bootstrap_size_bytes)}"
    yield (
        f"blobs      {len(report.blobs)}, {format_size(report.blobs_size_bytes)}"
        f" for {format_size(report.decoded_size_bytes)} of data ({ratio:.1%})"
    )
    if report.prefetch_files:
        yield f"prefetch   {report.prefetch_files} files first"
    for blob in report.blobs:
        yield f"  {blob.id}"
        yield (
            f"    {format_size(blob.size_bytes)}, {blob.chunks} chunks, {blob.compressor},"
            f" {', '.join(blob.features) or 'no features'}"
        )
