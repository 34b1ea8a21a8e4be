"""`nydus-py diff`: what a new version of an image changes, and what it costs a host that has the old one."""

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from builder.diff import Change, ChangedFile, changed_files, missing_chunks
from rafs.blobmeta import BlobMeta
from tools.image import OpenImage, open_image
from tools.output import JsonOption, emit, json_name, shown_name
from tools.runtime import run_async
from tools.settings import settings_of
from tools.sizes import format_size

_SIGNS = {Change.ADDED: "+", Change.REMOVED: "-", Change.CONTENT: "c", Change.METADATA: "m"}


@dataclass(frozen=True, slots=True)
class FileReport:
    """A file that differs: `added`, `removed`, `content` or `metadata`."""

    path: str
    change: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class DiffReport:
    """What differs. Bytes to fetch are those of a host that holds all chunks of the old image.

    `fetch_bytes` as they travel, of `total_bytes` for a host that has nothing.
    """

    old: str
    new: str
    added: int
    removed: int
    changed_content: int
    changed_metadata: int
    fetch_chunks: int
    fetch_decoded_bytes: int
    fetch_bytes: int
    total_chunks: int
    total_decoded_bytes: int
    total_bytes: int
    is_comparable: bool
    files: tuple[FileReport, ...]


def run(
    ctx: typer.Context,
    old: Annotated[str, typer.Argument(metavar="OLD", help="The image that a host has.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="The image that it would get.")],
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only the sums.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show which files differ, and the chunks and bytes that a host with the old image would fetch.

    + added, - removed, c other content, m other mode, owner, time or attributes.
    """
    settings = settings_of(ctx)

    async def compare() -> DiffReport:
        async with open_image(old, settings) as before, open_image(new, settings) as after:
            return _compare(old, before, new, after, with_files=not quiet)

    report = run_async(compare)
    emit(report, as_json=as_json, render=_lines)


def _compare(old: str, before: OpenImage, new: str, after: OpenImage, *, with_files: bool) -> DiffReport:
    counts: Counter[Change] = Counter()
    files = []
    for file in changed_files(before.bootstrap, after.bootstrap):
        counts[file.change] += 1
        if with_files:
            files.append(_file_report(file))

    def open_meta(blob_id: str) -> BlobMeta:
        return BlobMeta.open(after.metadata.blob_meta_path(blob_id))

    with tempfile.TemporaryDirectory(prefix="nydus-py-") as name:
        missing = missing_chunks(before.bootstrap, after.bootstrap, open_meta, Path(name))
    return DiffReport(
        old=old,
        new=new,
        added=counts[Change.ADDED],
        removed=counts[Change.REMOVED],
        changed_content=counts[Change.CONTENT],
        changed_metadata=counts[Change.METADATA],
        fetch_chunks=missing.chunks,
        fetch_decoded_bytes=missing.decoded_bytes,
        fetch_bytes=missing.encoded_bytes,
        total_chunks=missing.all_chunks,
        total_decoded_bytes=missing.all_decoded_bytes,
        total_bytes=missing.all_encoded_bytes,
        is_comparable=before.bootstrap.digester == after.bootstrap.digester
        and before.bootstrap.chunk_size == after.bootstrap.chunk_size,
        files=tuple(files),
    )


def _file_report(file: ChangedFile) -> FileReport:
    return FileReport(json_name(file.path), file.change.value, file.size_bytes)


def _lines(report: DiffReport) -> Iterator[str]:
    for file in report.files:
        yield f"{_SIGNS[Change(file.change)]} {shown_name(file.path.encode())}"
    yield (
        f"{report.added} added, {report.removed} removed, {report.changed_content} with other content,"
        f" {report.changed_metadata} with other metadata"
    )
    share = report.fetch_bytes / report.total_bytes if report.total_bytes else 0.0
    yield (
        f"to fetch: {report.fetch_chunks} of {report.total_chunks} chunks,"
        f" {format_size(report.fetch_bytes)} of {format_size(report.total_bytes)} ({share:.1%});"
        f" {format_size(report.fetch_decoded_bytes)} decoded"
    )
    if not report.is_comparable:
        yield "the images were cut or digested in different ways: what is equal in them cannot be told"
