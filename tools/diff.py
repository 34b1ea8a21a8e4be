"""`nydus-py diff`: what differs between two images, and what a host with one has to fetch for the other."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Annotated

import msgspec
import typer

from backend.extents import ExtentIndex
from backend.metadata import layers_of
from backend.store import ImageMetadata
from builder.diff import Aspect, Change, Difference, compare_trees
from builder.diff_fetch import BlobNeed, chunks_to_fetch
from rafs.blobmeta import BlobMeta
from rafs.bootstrap import Bootstrap
from tools.image import open_image
from tools.ls import TYPES
from tools.output import JsonOption, json_name, shown_name, write_bytes
from tools.runtime import run_async
from tools.settings import Settings, settings_of
from tools.sizes import format_size

_LINES_AT_ONCE = 4096
_SIGNS = {Change.ADDED: "A", Change.REMOVED: "D", Change.CHANGED: "M"}


@dataclass(frozen=True, slots=True)
class FileReport:
    """One name that differs; `size_bytes` of a regular file, else 0."""

    path: str
    change: str
    type: str
    size_bytes: int
    aspects: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DiffSummary:
    """The differences, counted. Sizes in bytes.

    `fetch_*` is what a host with the first image fetches for the second: chunks, decoded bytes, bytes as they
    travel, and the bootstrap layer (0 where both images have the same).
    """

    reference_a: str
    reference_b: str
    digest_a: str
    digest_b: str
    comparable_by_chunk: bool
    added: int
    removed: int
    changed: int
    changed_metadata_only: int
    not_comparable: int
    chunks: int
    fetch_chunks: int
    fetch_decoded_bytes: int
    fetch_encoded_bytes: int
    fetch_bootstrap_bytes: int
    blobs: tuple[BlobNeed, ...]


@dataclass(frozen=True, slots=True)
class _Image:
    reference: str
    metadata: ImageMetadata
    bootstrap: Bootstrap


@dataclass(slots=True)
class _Tally:
    """Counts differences on their way to the output."""

    changes: "Counter[Change]"
    metadata_only: int = 0
    not_comparable: int = 0

    def count(self, differences: Iterable[Difference]) -> Iterator[Difference]:
        for difference in differences:
            self.changes[difference.change] += 1
            self.metadata_only += difference.is_metadata_only
            self.not_comparable += Aspect.UNKNOWN_CONTENT in difference.aspects
            yield difference


def run(
    ctx: typer.Context,
    reference_a: Annotated[str, typer.Argument(metavar="REF_A", help="The image that a host has.")],
    reference_b: Annotated[str, typer.Argument(metavar="REF_B", help="The image that it shall have.")],
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Only the summary, without the list of files.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show which files differ between two images, and what a host with REF_A would fetch for REF_B.

    A is an added name, D one that is gone, M one that has changed. Chunks that REF_A has in any blob count
    as held; small files travel in batches, which count in full.
    """
    settings = settings_of(ctx)
    before, after = _open(reference_a, settings), _open(reference_b, settings)
    tally = _Tally(Counter())
    differences = tally.count(compare_trees(before.bootstrap, after.bootstrap))
    if as_json:
        write_bytes(b'{"files": [')
        _write(_json_rows([] if quiet else differences))
        write_bytes(b'\n],\n"summary": ')
    elif not quiet:
        _write(f"{_line(one)}\n".encode(errors="surrogateescape") for one in differences)
    for _ in differences:  # those that are not shown are counted all the same
        pass
    summary = _summary(before, after, tally)
    if as_json:
        write_bytes(msgspec.json.encode(summary) + b"}\n")
    else:
        write_bytes("".join(f"{line}\n" for line in _summary_lines(summary)).encode(errors="surrogateescape"))


def _open(reference: str, settings: Settings) -> _Image:
    async def fetch() -> _Image:
        async with open_image(reference, settings) as image:
            return _Image(reference, image.metadata, image.bootstrap)

    return run_async(fetch)


def _summary(before: _Image, after: _Image, tally: _Tally) -> DiffSummary:
    def extents_of(blob_id: str) -> ExtentIndex:
        return ExtentIndex(BlobMeta.open(after.metadata.blob_meta_path(blob_id)))

    needs = chunks_to_fetch(before.bootstrap, after.bootstrap, extents_of)
    old, new = before.bootstrap, after.bootstrap
    return DiffSummary(
        reference_a=before.reference,
        reference_b=after.reference,
        digest_a=before.metadata.digest,
        digest_b=after.metadata.digest,
        comparable_by_chunk=(old.chunk_size, old.digester) == (new.chunk_size, new.digester),
        added=tally.changes[Change.ADDED],
        removed=tally.changes[Change.REMOVED],
        changed=tally.changes[Change.CHANGED],
        changed_metadata_only=tally.metadata_only,
        not_comparable=tally.not_comparable,
        chunks=sum(need.chunks for need in needs),
        fetch_chunks=sum(need.chunks_missing for need in needs),
        fetch_decoded_bytes=sum(need.decoded_bytes for need in needs),
        fetch_encoded_bytes=sum(need.encoded_bytes for need in needs),
        fetch_bootstrap_bytes=_bootstrap_bytes(before.metadata, after.metadata),
        blobs=needs,
    )


def _bootstrap_bytes(before: ImageMetadata, after: ImageMetadata) -> int:
    """Size of the second image's bootstrap layer as it travels; 0 when the first image has the same.

    An image without a manifest has no layer: there it is the size of the files that would be in it.
    """
    digest, size_bytes = _bootstrap_layer(after)
    return 0 if digest == _bootstrap_layer(before)[0] else size_bytes


def _bootstrap_layer(metadata: ImageMetadata) -> tuple[str, int]:
    """Digest and size in bytes of the bootstrap layer, or of the files that would be in one."""
    layers = layers_of(metadata)
    if layers is not None:
        return layers.bootstrap.digest, layers.bootstrap.size_bytes
    files = [metadata.bootstrap_path, *(file.path for file in metadata.blob_meta_paths)]
    return metadata.digest, sum(path.stat().st_size for path in files)


def _write(pieces: Iterator[bytes]) -> None:
    """Writes many short pieces, some thousand at a time."""
    while piece := b"".join(islice(pieces, _LINES_AT_ONCE)):
        write_bytes(piece)


def _json_rows(differences: Iterable[Difference]) -> Iterator[bytes]:
    separator = b"\n"
    for one in differences:
        report = FileReport(
            json_name(one.path),
            one.change.value,
            _type(one),
            one.size_bytes,
            tuple(aspect.value for aspect in one.aspects),
        )
        yield separator + msgspec.json.encode(report)
        separator = b",\n"


def _type(difference: Difference) -> str:
    return TYPES[difference.mode & 0o170000]


def _line(difference: Difference) -> str:
    why = ", ".join(aspect.value for aspect in difference.aspects)
    return f"{_SIGNS[difference.change]} {shown_name(difference.path)}{f' ({why})' if why else ''}"


def _summary_lines(summary: DiffSummary) -> Iterator[str]:
    yield (
        f"files      {summary.added} added, {summary.removed} removed, {summary.changed} changed"
        f" ({summary.changed_metadata_only} of them in metadata only)"
    )
    if not summary.comparable_by_chunk:
        yield (
            "note       the images differ in chunk size or digester: not comparable by chunk,"
            f" {summary.not_comparable} files may or may not have changed"
        )
    yield (
        f"to fetch   {summary.fetch_chunks} of {summary.chunks} chunks:"
        f" {format_size(summary.fetch_encoded_bytes)} for {format_size(summary.fetch_decoded_bytes)} of data"
    )
    yield f"bootstrap  {format_size(summary.fetch_bootstrap_bytes)}"
    for need in summary.blobs:
        if need.chunks_missing:
            yield (
                f"  {need.blob_id}\n    {need.chunks_missing} of {need.chunks} chunks,"
                f" {format_size(need.encoded_bytes)}"
            )
