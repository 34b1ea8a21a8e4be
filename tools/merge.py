"""`nydus-py merge`: several Nydus images on top of each other become one image."""

import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Annotated, cast

import typer

from backend.platforms import this_platform
from backend.publish import Transfer
from backend.reference import absolute_reference
from backend.store import BlobTarget, ImageStore, PublishResult, open_store
from builder.merge_images import MergeResult, merge_images
from builder.nydus_source import fetch_source
from builder.prefetch_patterns import PrefetchPatterns
from tools.build_options import PrefetchOption
from tools.output import JsonOption, emit
from tools.progress import TransferProgress, progress_bar
from tools.runtime import run_async
from tools.settings import Settings, settings_of
from tools.sizes import format_size


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was made. Sizes in bytes: `bytes_in` of all files in the image."""

    reference: str
    digest: str
    layers: int
    blobs: int
    inodes: int
    bytes_in: int
    blobs_uploaded: int
    blobs_skipped: int
    blobs_mounted: int
    bytes_uploaded: int
    duration_s: float


def run(
    ctx: typer.Context,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Where the image goes.")],
    layers: Annotated[
        list[str], typer.Argument(metavar="LAYER_REF...", help="Nydus images, the lowest first.")
    ],
    prefetch: PrefetchOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put Nydus images on top of each other and push what they are together.

    A file of a higher image replaces that of a lower one. Whiteouts and opaque directories are those of
    overlayfs. Env, Cmd and so on are those of the highest image that has any. Blobs stay as they are; a chunk
    that several images have is taken from the lowest one.
    """
    start = time.monotonic()
    patterns = PrefetchPatterns(tuple(prefetch or ()))
    settings = settings_of(ctx)
    made, published = run_async(lambda: _merge(target, layers, patterns, settings))
    report = MergeReport(
        reference=target,
        digest=made.digest,
        layers=len(layers),
        blobs=made.blobs,
        inodes=made.inodes,
        bytes_in=made.bytes_in,
        blobs_uploaded=published.blobs_uploaded,
        blobs_skipped=published.blobs_skipped,
        blobs_mounted=published.blobs_mounted,
        bytes_uploaded=published.bytes_uploaded,
        duration_s=round(time.monotonic() - start, 3),
    )
    emit(report, as_json=as_json, render=_lines)


async def _merge(
    target: str, texts: list[str], prefetch: PrefetchPatterns, settings: Settings
) -> tuple[MergeResult, PublishResult]:
    options = settings.registry_options()
    destination = absolute_reference(target)

    def open_origin(text: str) -> AbstractAsyncContextManager[ImageStore]:
        return open_store(absolute_reference(text), options)

    layers = []
    for text in texts:
        async with open_origin(text) as store:
            layers.append(await fetch_source(store, settings.images_dir, this_platform()))
    with progress_bar("merging") as bar:
        async with open_store(destination, options) as writer:
            # Every store takes blobs; `ImageStore` is what a reader needs to know of it.
            transfer = Transfer(cast(BlobTarget, writer), str(destination), TransferProgress(bar))
            made = await merge_images(
                layers, writer, transfer, open_origin, prefetch, settings.cache_dir / "build"
            )
    return made, transfer.result(made.digest)


def _lines(report: MergeReport) -> Iterator[str]:
    yield f"{report.reference} ({report.digest})"
    yield f"{report.layers} layers, {report.inodes} files, {format_size(report.bytes_in)}"
    there = report.blobs_skipped + report.blobs_mounted
    yield (
        f"{format_size(report.bytes_uploaded)} sent; blobs: {report.blobs_uploaded} sent,"
        f" {there} already there; {report.duration_s:.1f} s"
    )
