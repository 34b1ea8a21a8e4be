"""`nydus-py inspect`: what an image consists of."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, cast

import typer

from backend.manifest import SOURCE_LAYER_ANNOTATION, reference_blob_ids_of
from backend.metadata import find_companion, layers_of
from backend.reference import DirReference, absolute_reference
from backend.store import OciStore
from rafs.blob_table import BlobEntry
from rafs.chunk_usage import BlobUsage, chunk_usage
from tools.image import OpenImage, open_image
from tools.output import JsonOption, emit
from tools.runtime import run_async
from tools.settings import settings_of
from tools.sizes import format_size


@dataclass(frozen=True, slots=True)
class BlobReport:
    """One data blob. Sizes in bytes: as it lies in the registry, and decoded.

    `used_*` is what this image uses of it: chunks, decoded bytes, share of the decoded blob (0..1).
    `is_reference` says that a chunk dictionary gave it, `source_layer` which ordinary layer it is.
    """

    id: str
    size_bytes: int
    decoded_size_bytes: int
    chunks: int
    compressor: str
    features: tuple[str, ...]
    used_chunks: int
    used_decoded_bytes: int
    used_ratio: float
    is_reference: bool
    source_layer: str | None


@dataclass(frozen=True, slots=True)
class ImageReport:
    """What `inspect` tells. `companion` is the digest of the ordinary image beside it in one index."""

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
    companion: str | None


def run(
    ctx: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="REF", help="The image.")],
    as_json: JsonOption = False,
) -> None:
    """Show what an image consists of: digest, blobs, sizes, features, inodes and chunks."""
    settings = settings_of(ctx)

    async def inspect() -> ImageReport:
        async with open_image(reference, settings) as image:
            companion = None
            if not isinstance(absolute_reference(reference), DirReference):
                companion = await find_companion(cast(OciStore, image.store), image.metadata)
            return report_of(reference, image, companion)

    emit(run_async(inspect), as_json=as_json, render=_lines)


def report_of(reference: str, image: OpenImage, companion: str | None) -> ImageReport:
    """Reads the report out of an image's metadata."""
    bootstrap = image.bootstrap
    layers = layers_of(image.metadata)
    indexed = {table.annotations[SOURCE_LAYER_ANNOTATION] for table in layers.tables} if layers else set()
    references = reference_blob_ids_of(layers.bootstrap, reference) if layers else ()
    blobs = tuple(
        _blob_report(
            blob,
            usage,
            is_reference=blob.blob_id in references,
            source_layer=digest if (digest := f"sha256:{blob.blob_id}") in indexed else None,
        )
        for blob, usage in zip(bootstrap.blobs, chunk_usage(bootstrap), strict=True)
    )
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
        companion=companion,
    )


def _blob_report(
    blob: BlobEntry, usage: BlobUsage, *, is_reference: bool, source_layer: str | None
) -> BlobReport:
    return BlobReport(
        id=blob.blob_id,
        size_bytes=blob.compressed_size,
        decoded_size_bytes=blob.uncompressed_size,
        chunks=blob.chunk_count,
        compressor=blob.compressor.name.lower(),
        features=tuple(feature.name.lower() for feature in blob.features if feature.name),
        used_chunks=usage.chunks,
        used_decoded_bytes=usage.decoded_bytes,
        used_ratio=round(usage.ratio, 4),
        is_reference=is_reference,
        source_layer=source_layer,
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
    if report.companion:
        yield f"index      of this image and the ordinary one, {report.companion}"
    for blob in report.blobs:
        yield f"  {blob.id}"
        yield (
            f"    {format_size(blob.size_bytes)}, {blob.chunks} chunks, {blob.compressor},"
            f" {', '.join(blob.features) or 'no features'}"
        )
        if blob.used_chunks != blob.chunks:
            yield (
                f"    used: {blob.used_chunks} chunks, {format_size(blob.used_decoded_bytes)}"
                f" ({blob.used_ratio:.1%})"
            )
        if blob.is_reference:
            yield "    from a chunk dictionary"
        if blob.source_layer:
            yield f"    layer {blob.source_layer} as it is"
