"""`nydus-py build`: a directory or a tar stream becomes an image in a registry, a layout or a directory."""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from backend.reference import Reference, absolute_reference
from backend.store import PublishResult, open_store
from builder.build import Build, BuildStatistics, BuiltImage
from builder.chunk_dict import DictionaryImage
from builder.options import BuildOptions, CompressionPolicy, InvalidOption
from builder.pipeline import PipelineCounters
from builder.worker import SourceUnreadable
from builder.zran_build import build_in_place
from tools.build_options import (
    BatchSizeOption,
    ChunkDictOption,
    ChunkSizeOption,
    CompressorOption,
    DigesterName,
    DigesterOption,
    LevelOption,
    PrefetchOption,
    ThreadsOption,
    build_options,
    fetch_dictionaries,
    usable_cores,
)
from tools.output import JsonOption, emit
from tools.progress import Bar, TransferProgress, progress_bar
from tools.runtime import run_async
from tools.settings import Settings, settings_of
from tools.sizes import format_size


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a build did. Sizes in bytes: `bytes_in` in the files, `bytes_out` in the blob."""

    reference: str
    digest: str
    inodes: int
    files: int
    chunks: int
    chunks_unique: int
    bytes_in: int
    bytes_unique: int
    bytes_out: int
    bootstrap_size_bytes: int
    blobs_uploaded: int
    blobs_skipped: int
    bytes_uploaded: int
    extents_reused: int
    duration_s: float


def run(
    ctx: typer.Context,
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A directory, a tar file, or - for a tar stream.")
    ],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Where the image goes.")],
    compressor: CompressorOption = CompressionPolicy.AUTO,
    level: LevelOption = 3,
    digester: DigesterOption = DigesterName.BLAKE3,
    chunk_size: ChunkSizeOption = "1MiB",
    batch_size: BatchSizeOption = "1MiB",
    chunk_dict: ChunkDictOption = None,
    prefetch: PrefetchOption = None,
    threads: ThreadsOption = None,
    no_copy: Annotated[
        bool,
        typer.Option(
            "--no-copy",
            help="SOURCE is a gzip layer: it becomes the image's blob as it is, only an index is made.",
        ),
    ] = False,
    work_dir: Annotated[
        Path | None, typer.Option(help="Where the blob is made.  [default: build/ in the cache directory]")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make an image from a directory or a tar stream (plain, gzip or zstd) and push it.

    An interrupted build goes on where it was when it is run again.
    """
    start = time.monotonic()
    settings = settings_of(ctx)
    destination = absolute_reference(target)
    _require_source(source)
    options = build_options(
        compressor, level, digester, chunk_size, batch_size, prefetch or (), usable_cores(threads)
    )
    if no_copy:
        if source == "-" or chunk_dict or os.path.isdir(source):
            raise InvalidOption(option="--no-copy", why="takes a gzip file, and no --chunk-dict")
        place = work_dir.absolute() if work_dir else settings.cache_dir / "build"
        image, published = _index_and_publish(Path(source), place, options, destination, settings)
    else:
        place = work_dir.absolute() if work_dir else _work_dir(settings, source, destination)
        dictionaries = fetch_dictionaries(chunk_dict or [], settings)
        image, published = _build_and_publish(
            Path(source), place, options, dictionaries, destination, settings
        )
    report = _report(target, image.statistics, published, time.monotonic() - start)
    emit(report, as_json=as_json, render=_lines)


def _build_and_publish(
    source: Path,
    place: Path,
    options: BuildOptions,
    dictionaries: tuple[DictionaryImage, ...],
    destination: Reference,
    settings: Settings,
) -> tuple[BuiltImage, PublishResult]:
    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar("building"))
        build = Build(place, options, dictionaries, lambda counters: _show(counters, bar))
        with build:
            image = build.run(source)
            stack.close()
            published = _publish(image, destination, settings)
            build.discard()
    return image, published


def _index_and_publish(
    source: Path, place: Path, options: BuildOptions, destination: Reference, settings: Settings
) -> tuple[BuiltImage, PublishResult]:
    place.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=place, prefix="index-") as work_dir:
        with progress_bar("indexing") as bar:
            image = build_in_place(source, Path(work_dir), options, lambda counters: _show(counters, bar))
        return image, _publish(image, destination, settings)


def _require_source(source: str) -> None:
    """Raises `SourceUnreadable` before anything is made for a source that is not there."""
    if source != "-" and not os.path.exists(source):
        raise SourceUnreadable(path=source, why="no such file or directory")


def _work_dir(settings: Settings, source: str, destination: Reference) -> Path:
    """The same directory for the same build, so that a second run finds what the first one finished."""
    origin = source if source == "-" else os.path.abspath(source)
    key = hashlib.sha256(os.fsencode(f"{origin}\0{destination}")).hexdigest()[:16]
    return settings.cache_dir / "build" / key


def _publish(image: BuiltImage, destination: Reference, settings: Settings) -> PublishResult:
    async def publish() -> PublishResult:
        async with open_store(destination, settings.registry_options()) as store:
            with progress_bar("pushing") as bar:
                return await store.publish(image.files, TransferProgress(bar))

    return run_async(publish)


def _show(counters: PipelineCounters, bar: Bar) -> None:
    bar.move_to(counters.bytes_in, None)
    saved = 1 - counters.bytes_unique / counters.bytes_in if counters.bytes_in else 0.0
    bar.note(f"{counters.files} files, {saved:.0%} dup")


def _report(target: str, built: BuildStatistics, published: PublishResult, duration_s: float) -> BuildReport:
    return BuildReport(
        reference=target,
        digest=published.digest,
        inodes=built.inodes,
        files=built.files,
        chunks=built.chunks,
        chunks_unique=built.chunks_unique,
        bytes_in=built.bytes_in,
        bytes_unique=built.bytes_unique,
        bytes_out=built.bytes_out,
        bootstrap_size_bytes=built.bootstrap_size,
        blobs_uploaded=published.blobs_uploaded,
        blobs_skipped=published.blobs_skipped,
        bytes_uploaded=published.bytes_uploaded,
        extents_reused=built.extents_reused,
        duration_s=round(duration_s, 3),
    )


def _lines(report: BuildReport) -> Iterator[str]:
    saved = 1 - report.bytes_unique / report.bytes_in if report.bytes_in else 0.0
    speed = report.bytes_in / report.duration_s if report.duration_s else 0.0
    yield f"{report.reference} ({report.digest})"
    yield (
        f"{report.files} files, {format_size(report.bytes_in)}, {saved:.1%} of it duplicates,"
        f" in {report.chunks_unique} chunks"
    )
    yield (
        f"blob {format_size(report.bytes_out)}, bootstrap {format_size(report.bootstrap_size_bytes)};"
        f" {format_size(report.bytes_uploaded)} sent"
    )
    yield f"{report.duration_s:.1f} s, {format_size(speed)}/s"
