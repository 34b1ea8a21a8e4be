"""`nydus-py copy`: an image from one place to another."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import typer

from backend.copy import copy_image
from backend.reference import absolute_reference
from backend.store import PublishResult, open_store
from tools.output import JsonOption, emit
from tools.progress import TransferProgress, progress_bar
from tools.runtime import run_async
from tools.settings import settings_of
from tools.sizes import format_size


@dataclass(frozen=True, slots=True)
class CopyReport:
    """What travelled. Data blobs are counted; the bytes are those of everything."""

    source: str
    target: str
    digest: str
    blobs_uploaded: int
    blobs_skipped: int
    blobs_mounted: int
    bytes_uploaded: int


def run(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SRC", help="The image to copy.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="Where to.")],
    as_json: JsonOption = False,
) -> None:
    """Copy an image between registries, layouts, archives and directories; only missing blobs travel."""
    options = settings_of(ctx).registry_options()
    origin, destination = absolute_reference(source), absolute_reference(target)

    async def copy() -> PublishResult:
        async with open_store(origin, options) as reader, open_store(destination, options) as writer:
            with progress_bar("copying") as bar:
                return await copy_image(reader, writer, TransferProgress(bar))

    done = run_async(copy)
    report = CopyReport(
        source=source,
        target=target,
        digest=done.digest,
        blobs_uploaded=done.blobs_uploaded,
        blobs_skipped=done.blobs_skipped,
        blobs_mounted=done.blobs_mounted,
        bytes_uploaded=done.bytes_uploaded,
    )
    emit(report, as_json=as_json, render=_lines)


def _lines(report: CopyReport) -> Iterator[str]:
    there = report.blobs_skipped + report.blobs_mounted
    yield f"copied to {report.target} ({report.digest or 'no digest'})"
    sent = format_size(report.bytes_uploaded)
    yield f"{sent} sent; blobs: {report.blobs_uploaded} sent, {there} already there"
