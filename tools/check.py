"""`nydus-py check`: every fault of an image that can be found, each with record, offset and expectation."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, ClassVar

import trio
import typer

from backend.contract import BlobNotFound, ShortRead
from backend.manifest import ImageManifest
from backend.reference import absolute_reference
from backend.store import ImageMetadata, ImageStore, NoChunkTable, open_store
from rafs.blob_table import BlobEntry, BlobFeatures
from rafs.blobmeta import BlobMeta
from rafs.bootstrap import Bootstrap
from rafs.check import Fault, check_blob_meta, check_bootstrap, check_extent, extents_of, is_decodable
from rafs.chunk import ChunkRef
from rafs.errors import NydusError
from rafs.record import FormatError
from tools.check_stored import config_faults, names_table, read_manifest, table_faults
from tools.image import OpenImage
from tools.output import JsonOption, emit
from tools.progress import Bar, progress_bar
from tools.run_stream import Run, run_stream
from tools.runtime import run_async
from tools.settings import Settings, settings_of
from tools.sizes import format_size
from tools.whole_blob import WholeBlobDigest

FAULTS_MAX = 1000
"""Where a check stops counting: an image with as many faults is beyond a list."""


class ImageFaulty(NydusError):
    """The check found faults; they are in its report."""

    message = "{reference}: {count} faults"
    exit_code: ClassVar[int] = 95


@dataclass(frozen=True, slots=True)
class FoundFault:
    """One fault. `file` is the bootstrap, a blob.meta or a blob; the offset is in bytes and into it."""

    file: str
    record: str
    offset_bytes: int
    expectation: str


@dataclass(slots=True)
class CheckReport:
    """What was looked at, and what was wrong."""

    reference: str
    digest: str
    deep: bool
    inodes: int = 0
    blobs: int = 0
    chunks: int = 0
    bytes_read: int = 0
    blobs_unread: int = 0
    faults: list[FoundFault] = field(default_factory=list)

    @property
    def is_full(self) -> bool:
        """Whether there are so many faults that looking on is no use."""
        return len(self.faults) >= FAULTS_MAX

    def add(self, file: str, faults: Iterator[Fault]) -> None:
        """Notes the faults of one file, as far as there is room."""
        for fault in faults:
            if self.is_full:
                return
            self.faults.append(FoundFault(file, fault.record, fault.offset_bytes, fault.expectation))


@dataclass(frozen=True, slots=True)
class RunResult:
    """What reading some neighbouring chunks has shown; `data` are the bytes of the blob at `offset`."""

    offset: int
    data: bytes
    faults: tuple[Fault, ...]


def run(
    ctx: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="REF", help="The image.")],
    deep: Annotated[
        bool, typer.Option("--deep", help="Also read every chunk and each whole blob, and compare digests.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Verify an image: manifest, metadata, and that its blobs are there.

    Faults are listed with record, offset and expectation, and the exit code is not 0.
    """
    settings = settings_of(ctx)
    settings.cache_dir.mkdir(parents=True, exist_ok=True)
    # Metadata that is in the cache already says nothing of what the store would give today.
    with TemporaryDirectory(dir=settings.cache_dir, prefix="check-") as fresh:
        report = run_async(lambda: check(reference, deep, settings, Path(fresh)))
    emit(report, as_json=as_json, render=_lines)
    if report.faults:
        raise ImageFaulty(reference=reference, count=len(report.faults))


async def check(reference: str, deep: bool, settings: Settings, images_dir: Path) -> CheckReport:
    """The report on one image, its metadata fetched into `images_dir`. Raises what keeps it from being."""
    report = CheckReport(reference, "", deep)
    async with open_store(absolute_reference(reference), settings.registry_options()) as store:
        try:
            metadata = await store.fetch_metadata(images_dir)
            report.digest = metadata.digest
            bootstrap = Bootstrap.open(metadata.bootstrap_path)
        except FormatError as error:
            report.add("bootstrap", iter([Fault.of(error)]))
            return report
        await _check_opened(OpenImage(store, metadata, bootstrap), report)
    return report


async def _check_opened(image: OpenImage, report: CheckReport) -> None:
    bootstrap = image.bootstrap
    report.inodes, report.blobs = bootstrap.inode_count, len(bootstrap.blobs)
    report.chunks = sum(blob.chunk_count for blob in bootstrap.blobs)
    await trio.to_thread.run_sync(_check_metadata, bootstrap, image.metadata, report)
    manifest = read_manifest(image.metadata)
    if manifest is not None:
        report.add("config", iter(await config_faults(image.store, manifest)))
    there = [blob for blob in bootstrap.blobs if await _is_there(blob, image.store, report)]
    if report.is_full:
        return
    broken = {fault.file for fault in report.faults}
    usable = [blob for blob in there if _meta_name(blob) not in broken]
    for blob in usable:
        if not names_table(manifest, blob):
            continue
        meta = BlobMeta.open(image.metadata.blob_meta_path(blob.blob_id))
        report.add(_meta_name(blob), iter(await table_faults(image.store, blob, meta)))
    if report.deep:
        readable = [blob for blob in usable if is_decodable(blob)]
        report.blobs_unread = len(bootstrap.blobs) - len(readable)
        with progress_bar("checking") as bar:
            bar.extend(sum(blob.data_end for blob in readable))
            for blob in readable:
                await _check_content(image, blob, manifest, report, bar)


def _meta_name(blob: BlobEntry) -> str:
    return f"blob.meta of {blob.blob_id}"


def _check_metadata(bootstrap: Bootstrap, metadata: ImageMetadata, report: CheckReport) -> None:
    report.add("bootstrap", check_bootstrap(bootstrap))
    for blob in bootstrap.blobs:
        file = _meta_name(blob)
        try:
            meta = BlobMeta.open(metadata.blob_meta_path(blob.blob_id))
            report.add(file, check_blob_meta(blob, meta, bootstrap.chunk_digests(blob.index)))
        except NoChunkTable:
            if blob.chunk_count:
                report.add(file, iter([Fault("blob.meta", 0, "a chunk table, found none")]))
        except FormatError as error:
            report.add(file, iter([Fault.of(error)]))


async def _is_there(blob: BlobEntry, store: ImageStore, report: CheckReport) -> bool:
    """Whether the store has the blob, up to its last byte."""
    reader = store.open_blob(blob.blob_id, blob.compressed_size)
    try:
        if blob.compressed_size:
            await reader.read_range(blob.compressed_size - 1, 1)
    except (BlobNotFound, ShortRead) as error:
        fault = Fault("blob", blob.compressed_size - 1, f"a last byte here: {error}")
        report.add(f"blob {blob.blob_id}", iter([fault]))
        return False
    finally:
        with trio.CancelScope(shield=True):
            await reader.aclose()
    return True


async def _check_content(
    image: OpenImage, blob: BlobEntry, manifest: ImageManifest | None, report: CheckReport, bar: Bar
) -> None:
    """Reads and verifies every chunk of a blob, and the digest of all of it where that is its name."""
    file = f"blob {blob.blob_id}"
    reader = image.store.open_blob(blob.blob_id, blob.compressed_size)
    whole = WholeBlobDigest(reader) if _is_named_by_digest(blob, manifest) else None
    try:
        async with run_stream(image, _extents(image.metadata, blob), check_run) as results:
            async for result in results:
                report.bytes_read += len(result.data)
                report.add(file, iter(result.faults))
                bar.advance(len(result.data))
                bar.note(f"{len(report.faults)} faults")
                if report.is_full:
                    return
                if whole is not None:
                    await whole.take(result.offset, result.data)
        if whole is not None:
            found = await whole.finish(_size_of(blob, manifest) or await reader.size())
            if found != f"sha256:{blob.blob_id}":
                wanted = f"sha256:{blob.blob_id} of the whole blob, found {found}"
                report.add(file, iter([Fault("blob", 0, wanted)]))
    except FormatError as error:
        report.add(file, iter([Fault.of(error)]))
    except ShortRead as error:
        report.add(file, iter([Fault("blob", blob.data_end, f"all of its bytes: {error}")]))
    finally:
        with trio.CancelScope(shield=True):
            await reader.aclose()


def _is_named_by_digest(blob: BlobEntry, manifest: ImageManifest | None) -> bool:
    """Whether the blob's ID is the SHA-256 of its file.

    Stores with manifests name every blob so. In a bare directory nydus-image leaves the array of digests
    out of the hash of a blob with a table of contents.
    """
    return manifest is not None or not blob.features & BlobFeatures.HAS_TOC


def _size_of(blob: BlobEntry, manifest: ImageManifest | None) -> int | None:
    layers = manifest.layers if manifest is not None else ()
    return next((layer.size_bytes for layer in layers if layer.hex == blob.blob_id), None)


def _extents(metadata: ImageMetadata, blob: BlobEntry) -> Iterator[ChunkRef]:
    """The first chunk of each unit of decoding."""
    if blob.chunk_count:
        meta = BlobMeta.open(metadata.blob_meta_path(blob.blob_id))
        yield from (ChunkRef(blob.index, chunks[0], 0) for chunks in extents_of(meta))


def check_run(run: Run, data: bytes) -> list[RunResult]:
    """Verifies the extents that start with the chunks of a run. Runs in a thread."""
    blob = run.blob
    faults: list[Fault] = []
    for first in run.chunks:
        encoded = run.encoded(data, blob.meta.extent(first))
        faults += check_extent(blob.entry, blob.meta, blob.digests, blob.meta.batch_range(first), encoded)
    return [RunResult(run.offset, data, tuple(faults))]


def _lines(report: CheckReport) -> Iterator[str]:
    for fault in report.faults:
        yield f"{fault.file}: {fault.record} at offset {fault.offset_bytes}: {fault.expectation}"
    if report.is_full:
        yield f"... stopped at {FAULTS_MAX} faults"
    if report.blobs_unread:
        why = "encrypted, parts of OCI layers, missing or faulty"
        yield f"{report.blobs_unread} blobs are {why}: their chunks were not read"
    read = f", {format_size(report.bytes_read)} of chunks read" if report.deep else ""
    verdict = f"{len(report.faults)} faults" if report.faults else "no faults"
    yield f"{report.inodes} inodes, {report.chunks} chunks in {report.blobs} blobs{read}: {verdict}"
