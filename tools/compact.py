"""`nydus-py compact`: an image without chunks that no file uses, and with fewer small blobs."""

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, cast

import typer

from backend.platforms import this_platform
from backend.publish import Transfer
from backend.reference import absolute_reference
from backend.store import BlobTarget, ImageStore, PublishResult, open_store
from builder.compact import CompactOptions, CompactResult, compact_image
from builder.nydus_source import fetch_source
from builder.options import BuildOptions, CompressionPolicy, InvalidOption
from rafs.bootstrap import Bootstrap
from rafs.chunk import ChunkRef
from tools.build_options import CompressorOption, LevelOption, ThreadsOption, usable_cores
from tools.chunk_stream import chunk_stream
from tools.image import open_image
from tools.output import JsonOption, emit
from tools.progress import TransferProgress, progress_bar
from tools.runtime import run_async
from tools.settings import Settings, settings_of
from tools.sizes import format_size, size_option


@dataclass(frozen=True, slots=True)
class CompactReport:
    """What was made. Sizes in bytes, of blobs as they travel."""

    source: str
    reference: str
    digest: str
    inodes: int
    blobs_before: int
    blobs_after: int
    bytes_before: int
    bytes_after: int
    bytes_uploaded: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class _Choice:
    """What the command line says of blobs and of how the new one is made."""

    compressor: CompressionPolicy
    level: int
    threads: int
    min_used_ratio: float
    small_blob_bytes: int


def run(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(metavar="REF", help="The image.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Where the compacted image goes.")],
    min_used_ratio: Annotated[
        int, typer.Option(metavar="PERCENT", help="Write blobs again of which less is used.")
    ] = 80,
    small_blob_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Put blobs of less than this together.")
    ] = "10MiB",
    compressor: CompressorOption = CompressionPolicy.AUTO,
    level: LevelOption = 3,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write an image again without the chunks that no file uses; the tree stays the same.

    Chunks of blobs that are hardly used, and of several small blobs, move to one new blob. All other blobs
    stay as they are. The old image stays too.
    """
    start = time.monotonic()
    if not 0 <= min_used_ratio <= 100:
        raise InvalidOption(option="--min-used-ratio", why=f"from 0 to 100, not {min_used_ratio}")
    choice = _Choice(
        compressor,
        level,
        usable_cores(threads),
        min_used_ratio / 100,
        size_option("--small-blob-size", small_blob_size),
    )
    made, published = run_async(lambda: _compact(source, target, choice, settings_of(ctx)))
    report = CompactReport(
        source=source,
        reference=target,
        digest=made.digest,
        inodes=made.inodes,
        blobs_before=made.blobs_before,
        blobs_after=made.blobs_after,
        bytes_before=made.bytes_before,
        bytes_after=made.bytes_after,
        bytes_uploaded=published.bytes_uploaded,
        duration_s=round(time.monotonic() - start, 3),
    )
    emit(report, as_json=as_json, render=_lines)


async def _compact(
    source_text: str, target_text: str, choice: _Choice, settings: Settings
) -> tuple[CompactResult, PublishResult]:
    registry_options = settings.registry_options()
    destination = absolute_reference(target_text)

    def open_origin(text: str) -> AbstractAsyncContextManager[ImageStore]:
        return open_store(absolute_reference(text), registry_options)

    @asynccontextmanager
    async def open_chunks(refs: Sequence[ChunkRef]) -> AsyncIterator[AsyncIterator[bytes]]:
        async with open_image(source_text, settings) as image, chunk_stream(image, refs) as chunks:
            yield chunks

    async with open_origin(source_text) as store:
        source = await fetch_source(store, settings.images_dir, this_platform())
    with Bootstrap.open(source.metadata.bootstrap_path) as bootstrap:
        build = BuildOptions(
            chunk_size=bootstrap.chunk_size,
            batch_size=min(1 << 20, bootstrap.chunk_size),
            compression=choice.compressor,
            level=choice.level,
            digester=bootstrap.digester,
            threads=choice.threads,
        )
    options = CompactOptions(build, choice.min_used_ratio, choice.small_blob_bytes)
    with progress_bar("compacting") as bar:
        async with open_store(destination, registry_options) as writer:
            # Every store takes blobs; `ImageStore` is what a reader needs to know of it.
            transfer = Transfer(cast(BlobTarget, writer), str(destination), TransferProgress(bar))
            work_dir = settings.cache_dir / "build"
            made = await compact_image(source, writer, transfer, open_origin, open_chunks, options, work_dir)
    return made, transfer.result(made.digest)


def _lines(report: CompactReport) -> Iterator[str]:
    yield f"{report.reference} ({report.digest})"
    yield (
        f"{report.blobs_before} blobs of {format_size(report.bytes_before)} became {report.blobs_after}"
        f" of {format_size(report.bytes_after)}"
    )
    yield f"{format_size(report.bytes_uploaded)} sent; {report.duration_s:.1f} s"
