"""An image without what no file uses: blobs that are hardly used, or very small, give way to one new blob."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import trio

from backend.image_config import merged_config
from backend.manifest import (
    Descriptor,
    build_config,
)
from backend.platforms import this_platform
from backend.publish import Transfer
from backend.publishing import reporting_writes, staging_directory
from backend.store import BlobFile, ImageStore, OpenOrigin
from builder.blob_writer import FinishedBlob
from builder.merge import LayerMerge, MergedImage
from builder.nydus_source import NydusSource, in_order
from builder.options import BuildOptions
from builder.prefetch_patterns import PrefetchPaths
from builder.publish_merged import publish_merged
from builder.repack import Repack
from rafs.blob_table import BlobFeatures
from rafs.bootstrap import Bootstrap
from rafs.chunk import ChunkRef
from rafs.record import BLOCK_SIZE, round_up

_UNTOUCHABLE = BlobFeatures.ZRAN | BlobFeatures.TARFS | BlobFeatures.ENCRYPTED | BlobFeatures.EXTERNAL
_BATCH_BYTES = 4 << 20

OpenChunks = Callable[[Sequence[ChunkRef]], AbstractAsyncContextManager[AsyncIterator[bytes]]]
"""Opens the decoded, verified chunks that addresses name, in their order."""


@dataclass(frozen=True, slots=True)
class CompactOptions:
    """Which blobs give way: those used less than `min_used_ratio` (0..1), and several of fewer bytes than
    `small_blob_bytes`.
    """

    build: BuildOptions
    min_used_ratio: float
    small_blob_bytes: int


@dataclass(frozen=True, slots=True)
class CompactResult:
    """What has been published: the manifest's digest; blobs before and after; their bytes as they travel."""

    digest: str
    blobs_before: int
    blobs_after: int
    bytes_before: int
    bytes_after: int
    inodes: int


def blobs_to_repack(bootstrap: Bootstrap, sizes: dict[str, int], options: CompactOptions) -> list[int]:
    """Indexes of the blobs that give way; `sizes` in bytes by blob ID."""
    chosen, small = [], []
    used = used_bytes(bootstrap)
    for blob in bootstrap.blobs:
        if blob.features & _UNTOUCHABLE or not used[blob.index]:
            continue
        if used[blob.index] < options.min_used_ratio * blob.uncompressed_size:
            chosen.append(blob.index)
        elif sizes.get(blob.blob_id, blob.compressed_size) < options.small_blob_bytes:
            small.append(blob.index)
    # One small blob alone is as small when it is written again.
    return sorted(chosen + small) if chosen or len(small) > 1 else []


def used_bytes(bootstrap: Bootstrap) -> list[int]:
    """Of each blob, the decoded bytes that files use, in whole blocks as they lie.

    The files are read and not the chunk table: that of a build also has chunks of files that were replaced.
    """
    used = [0] * len(bootstrap.blobs)
    for ref in used_chunks(bootstrap, range(len(used))):
        size = bootstrap.chunk_digests(ref.blob_index).row(ref.chunk_index).uncompressed_size
        used[ref.blob_index] += round_up(size, BLOCK_SIZE)
    return used


def used_chunks(bootstrap: Bootstrap, blobs: Sequence[int]) -> list[ChunkRef]:
    """Addresses of the chunks of `blobs` that files use, in the order of the blobs."""
    wanted = set(blobs)
    found = {
        (ref.blob_index, ref.chunk_index, ref.uncompressed_offset)
        for _, inode in bootstrap.walk()
        if inode.is_file
        for ref in bootstrap.chunk_refs(inode)
        if ref.blob_index in wanted
    }
    return [ChunkRef(*place) for place in sorted(found)]


async def compact_image(
    source: NydusSource,
    target: ImageStore,
    transfer: Transfer,
    open_origin: OpenOrigin,
    open_chunks: OpenChunks,
    options: CompactOptions,
    work_dir: Path,
) -> CompactResult:
    """Publishes the compacted image. Raises what reading, building, merging and the stores raise."""
    with Bootstrap.open(source.metadata.bootstrap_path) as bootstrap:
        chosen = blobs_to_repack(bootstrap, source.sizes, options)
        refs = used_chunks(bootstrap, chosen)
        before = [blob.blob_id for blob in bootstrap.blobs]
    with staging_directory(work_dir) as staging:
        repacked = await _repack(refs, open_chunks, options.build, staging / "repack") if refs else None
        merged = await trio.to_thread.run_sync(_merge, source, repacked, staging)
        blobs = _blob_files(merged, source, repacked)
        make_config, annotations = _config_maker(source), source.annotations
        digest = await publish_merged(merged, blobs, make_config, annotations, target, transfer, open_origin)
    return CompactResult(
        digest,
        len(before),
        len(blobs),
        sum(source.sizes.get(blob_id, 0) for blob_id in before),
        sum(blob.size_bytes for blob in blobs),
        merged.inodes,
    )


async def _repack(
    refs: Sequence[ChunkRef], open_chunks: OpenChunks, options: BuildOptions, work_dir: Path
) -> tuple[FinishedBlob, Path]:
    repack = await trio.to_thread.run_sync(Repack, work_dir, options)
    with repack:
        batch: list[bytes] = []
        size_bytes = 0

        def add_all() -> None:
            for chunk in batch:
                repack.add(chunk)

        async with open_chunks(refs) as chunks:
            async for chunk in chunks:
                batch.append(chunk)
                size_bytes += len(chunk)
                if size_bytes >= _BATCH_BYTES:
                    await trio.to_thread.run_sync(add_all)
                    batch.clear()
                    size_bytes = 0
        await trio.to_thread.run_sync(add_all)
        return await trio.to_thread.run_sync(repack.finish)


def _merge(source: NydusSource, repacked: tuple[FinishedBlob, Path] | None, staging: Path) -> MergedImage:
    with reporting_writes(staging), LayerMerge(staging, has_marks=False) as merge:
        merge.add(source.metadata.bootstrap_path)
        if repacked is not None:
            merge.prefer(repacked[1])
        return merge.write(staging / "image.boot", PrefetchPaths(_prefetched(source)))


def _prefetched(source: NydusSource) -> list[bytes]:
    """Paths of the files in the prefetch table."""
    with Bootstrap.open(source.metadata.bootstrap_path) as bootstrap:
        nids = bootstrap.prefetch_nids
        paths = {inode.nid: path for path, inode in bootstrap.walk() if inode.nid in nids} if nids else {}
    return [paths[nid] for nid in nids if nid in paths]


def _blob_files(
    merged: MergedImage, source: NydusSource, repacked: tuple[FinishedBlob, Path] | None
) -> tuple[BlobFile, ...]:
    files: list[BlobFile] = []
    for entry in merged.blobs:
        if repacked is not None and entry.blob_id == repacked[0].entry.blob_id:
            blob = repacked[0]
            files.append(BlobFile(entry.blob_id, entry.compressed_size, blob.path, blob.meta))
        else:
            files += source.blob_files(entry)
    return in_order(files)


def _config_maker(source: NydusSource) -> Callable[[Sequence[Descriptor], str], bytes]:
    def make(blobs: Sequence[Descriptor], diff_id: str) -> bytes:
        if source.config is None:
            return build_config(this_platform(), blobs, diff_id)
        diff_ids = [*(blob.digest for blob in blobs), diff_id]
        return merged_config(source.config, diff_ids, source.reference, "nydus-py compact")

    return make
