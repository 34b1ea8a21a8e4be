"""`nydus-py convert`: a container image becomes a Nydus image, in a registry, a layout or an archive."""

import os
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import Annotated, cast

import trio
import typer

from backend.platforms import Platform, this_platform
from backend.publish import Transfer
from backend.reference import (
    DirReference,
    DockerArchiveReference,
    LayoutReference,
    Reference,
    RegistryReference,
    absolute_reference,
)
from backend.source_image import find_source
from backend.store import ImageStore, OciStore, PublishResult, open_store
from builder.build_cache import BuildCache
from builder.convert import ConvertOptions, ImageConverter
from builder.convert_publish import (
    Conversion,
    bring_originals,
    publish_index,
    publish_single,
    source_to_replace,
)
from builder.layer_cache import LayerCache
from builder.layer_eviction import evict_layers
from builder.oci_layer import LayerCompression
from builder.options import CompressionPolicy, InvalidOption
from builder.pipeline import PipelineCounters
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
from tools.convert_options import (
    AllPlatformsOption,
    BothOption,
    BuildCacheOption,
    LayerCompressionOption,
    NoCopyOption,
    ParallelOption,
    PlatformOption,
    ReverseOption,
    WithReferrerOption,
    parse_platform,
)
from tools.output import JsonOption, emit
from tools.progress import TransferProgress, progress_bar
from tools.reverse import ReverseOptions, reverse_image, reverse_lines
from tools.runtime import run_async
from tools.settings import Settings, settings_of
from tools.sizes import format_size

PARALLEL_MAX = 4
"""Layers at a time, where nobody says: each takes about 100 MB of memory."""


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What a conversion did. Sizes in bytes: `bytes_in` of all files in the converted images."""

    source: str
    reference: str
    digest: str
    platforms: tuple[str, ...]
    layers: int
    layers_converted: int
    inodes: int
    bytes_in: int
    blobs_uploaded: int
    blobs_skipped: int
    blobs_mounted: int
    bytes_uploaded: int
    duration_s: float


def run(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The container image.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Where the image goes.")],
    both: BothOption = False,
    with_referrer: WithReferrerOption = False,
    no_copy: NoCopyOption = False,
    reverse: ReverseOption = False,
    layer_compression: LayerCompressionOption = LayerCompression.GZIP,
    platform: PlatformOption = None,
    all_platforms: AllPlatformsOption = False,
    compressor: CompressorOption = CompressionPolicy.AUTO,
    level: LevelOption = 3,
    digester: DigesterOption = DigesterName.BLAKE3,
    chunk_size: ChunkSizeOption = "1MiB",
    batch_size: BatchSizeOption = "1MiB",
    chunk_dict: ChunkDictOption = None,
    prefetch: PrefetchOption = None,
    threads: ThreadsOption = None,
    parallel: ParallelOption = None,
    build_cache: BuildCacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Convert a container image (OCI or docker) layer by layer and push the result.

    Needs no root and no daemon. Layers that were converted before are not converted again, and an interrupted
    conversion goes on where it was when it is run again.
    """
    start = time.monotonic()
    settings = settings_of(ctx)
    origin, destination = absolute_reference(source), absolute_reference(target)
    cache = absolute_reference(build_cache) if build_cache else None
    if reverse:
        _check_places(destination)
        others = both or with_referrer or no_copy or all_platforms or bool(chunk_dict or build_cache)
        _expect_alone("--reverse", others)
        back = ReverseOptions(parse_platform(platform) if platform else this_platform(), layer_compression)
        made = run_async(lambda: reverse_image(source, destination, back, settings, start))
        emit(made, as_json=as_json, render=reverse_lines)
        return
    _check_places(origin, destination)
    _check_targets(destination, cache)
    _expect_alone("--no-copy", no_copy and bool(chunk_dict))
    cores = usable_cores(threads)
    options = ConvertOptions(
        build_options(compressor, level, digester, chunk_size, batch_size, prefetch or (), cores),
        parallel or min(PARALLEL_MAX, max(2, cores)),
        fetch_dictionaries(chunk_dict or [], settings),
        is_one_of_two=both,
        is_referrer=with_referrer,
        keeps_layers=no_copy,
    )
    wanted = _wanted_platform(platform, all_platforms=all_platforms)
    request = _Request(origin, destination, wanted, both, all_platforms, options, cache)
    report = run_async(lambda: _convert(request, settings, source, target, start))
    emit(report, as_json=as_json, render=_lines)


@dataclass(frozen=True, slots=True)
class _Request:
    origin: Reference
    destination: Reference
    platform: Platform | None
    both: bool
    all_platforms: bool
    options: ConvertOptions
    build_cache: Reference | None


async def _convert(
    request: _Request, settings: Settings, source_text: str, target_text: str, start: float
) -> ConvertReport:
    registry_options = settings.registry_options()

    def open_origin(text: str) -> AbstractAsyncContextManager[ImageStore]:
        return open_store(absolute_reference(text), registry_options)

    async with AsyncExitStack() as stack:
        store = cast(OciStore, await stack.enter_async_context(open_store(request.origin, registry_options)))
        target = cast(
            OciStore, await stack.enter_async_context(open_store(request.destination, registry_options))
        )
        build_cache = None
        if request.build_cache is not None:
            place = await stack.enter_async_context(open_store(request.build_cache, registry_options))
            build_cache = BuildCache(cast(OciStore, place), open_origin)
            await build_cache.load()
        source = await find_source(store, request.platform)
        with progress_bar("converting") as bar:
            transfer = Transfer(target, str(request.destination), TransferProgress(bar))
            counted: dict[str, int] = {}

            def show(layer: str, counters: PipelineCounters) -> None:
                counted[layer] = counters.bytes_in
                bar.note(f"{format_size(sum(counted.values()))} read")

            layers = LayerCache(settings.cache_dir / "layers")
            await trio.to_thread.run_sync(evict_layers, layers, time.time())
            converter = ImageConverter(
                store,
                target,
                transfer,
                open_origin,
                layers,
                request.options,
                build_cache,
                show,
            )
            conversions = [
                Conversion(image, await converter.convert(image, settings.cache_dir / "build"))
                for image in source.images
            ]
            if build_cache is not None:  # before the tag: a command that fails leaves none
                await build_cache.save(converter.provided, converter.sources)
            if _is_same_image(request.origin, request.destination):
                source = await source_to_replace(store, source, request.platform, keeps_others=request.both)
            if request.both:
                is_same = _is_same_place(request.origin, request.destination)
                originals = await bring_originals(store, target, transfer, source, is_same_place=is_same)
                digest = await publish_index(target, source, conversions, originals)
            elif request.all_platforms and source.index is not None:
                digest = await publish_index(target, source, conversions, ())
            else:
                digest = await publish_single(target, conversions[0])
            await converter.note_published()
    return _report(source_text, target_text, conversions, transfer.result(digest), time.monotonic() - start)


def _wanted_platform(text: str | None, *, all_platforms: bool) -> Platform | None:
    """The platform to convert, None for all. Raises `InvalidOption`."""
    if all_platforms and text:
        raise InvalidOption(option="--all-platforms", why="and --platform exclude each other")
    if all_platforms:
        return None
    return parse_platform(text) if text else this_platform()


def _expect_alone(option: str, has_others: bool) -> None:
    if has_others:
        raise InvalidOption(option=option, why="does not go with options that say what is made")


def _check_places(*references: Reference) -> None:
    """Raises `InvalidOption` for a place that has no container images."""
    for reference in references:
        if isinstance(reference, DirReference):
            why = f"{reference} holds no container images; use a registry, oci:DIR or an archive"
            raise InvalidOption(option="convert", why=why)


def _check_targets(destination: Reference, cache: Reference | None) -> None:
    """Raises `InvalidOption` for a place that cannot take what is made."""
    if isinstance(destination, DockerArchiveReference):
        raise InvalidOption(option="convert", why=f"{destination} holds no Nydus images; use oci-archive:")
    if not isinstance(cache, RegistryReference | LayoutReference | None):
        raise InvalidOption(option="--build-cache", why=f"{cache} does not grow; use a registry or oci:DIR")


def _is_same_place(origin: Reference, destination: Reference) -> bool:
    """Whether both name images of one repository, or one layout."""
    if isinstance(origin, RegistryReference) and isinstance(destination, RegistryReference):
        return (origin.host, origin.repository) == (destination.host, destination.repository)
    if isinstance(origin, LayoutReference) and isinstance(destination, LayoutReference):
        return os.path.realpath(origin.directory) == os.path.realpath(destination.directory)
    return False


def _is_same_image(origin: Reference, destination: Reference) -> bool:
    """Whether what is made takes the place of what it is made of."""
    if isinstance(origin, RegistryReference) and isinstance(destination, RegistryReference):
        return _is_same_place(origin, destination) and origin.manifest_key == destination.tag
    if isinstance(origin, LayoutReference) and isinstance(destination, LayoutReference):
        return _is_same_place(origin, destination) and origin.tag == destination.tag
    return False


def _report(
    source: str, target: str, conversions: list[Conversion], published: PublishResult, duration_s: float
) -> ConvertReport:
    images = [conversion.converted for conversion in conversions]
    return ConvertReport(
        source=source,
        reference=target,
        digest=published.digest,
        platforms=tuple(str(conversion.source.platform) for conversion in conversions),
        layers=sum(image.layers for image in images),
        layers_converted=sum(image.layers_converted for image in images),
        inodes=sum(image.inodes for image in images),
        bytes_in=sum(image.bytes_in for image in images),
        blobs_uploaded=published.blobs_uploaded,
        blobs_skipped=published.blobs_skipped,
        blobs_mounted=published.blobs_mounted,
        bytes_uploaded=published.bytes_uploaded,
        duration_s=round(duration_s, 3),
    )


def _lines(report: ConvertReport) -> Iterator[str]:
    yield f"{report.reference} ({report.digest})"
    reused = report.layers - report.layers_converted
    yield (
        f"{', '.join(report.platforms)}: {report.layers} layers, {reused} of them known already;"
        f" {report.inodes} files, {format_size(report.bytes_in)}"
    )
    there = report.blobs_skipped + report.blobs_mounted
    yield (
        f"{format_size(report.bytes_uploaded)} sent; blobs: {report.blobs_uploaded} sent,"
        f" {there} already there; {report.duration_s:.1f} s"
    )
