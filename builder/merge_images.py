"""Several Nydus images become one: the trees on top of each other, one bootstrap, the blobs as they are.

Nothing reaches the target before the merge has succeeded. A blob travels from the image that has it, or is
mounted where that is in the same registry.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from backend.image_config import merged_config, says_what_runs
from backend.manifest import (
    Descriptor,
    build_config,
)
from backend.platforms import this_platform
from backend.publish import Transfer
from backend.publishing import reporting_writes, staging_directory
from backend.store import BlobFile, ImageStore, OpenOrigin
from builder.merge import LayerMerge, LayersUnfit, MergedImage
from builder.nydus_source import NydusSource, in_order
from builder.prefetch_patterns import PrefetchPatterns
from builder.publish_merged import publish_merged
from rafs.bootstrap import Bootstrap
from rafs.record import FormatError


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What has been published: the manifest's digest, and what is in the image. `bytes_in` of its files."""

    digest: str
    blobs: int
    inodes: int
    bytes_in: int


async def merge_images(
    layers: Sequence[NydusSource],
    target: ImageStore,
    transfer: Transfer,
    open_origin: OpenOrigin,
    prefetch: PrefetchPatterns,
    work_dir: Path,
) -> MergeResult:
    """Merges `layers`, the lowest first, and publishes the image.

    Raises `LayersUnfit`, `ImageTooLarge`, and what the stores raise.
    """
    with staging_directory(work_dir) as staging:
        merged = await trio.to_thread.run_sync(_merge, layers, prefetch, staging)
        blobs = _blob_files(merged, layers)
        make_config = _config_maker(layers)
        digest = await publish_merged(merged, blobs, make_config, {}, target, transfer, open_origin)
    return MergeResult(digest, len(blobs), merged.inodes, merged.bytes_in)


def _merge(layers: Sequence[NydusSource], prefetch: PrefetchPatterns, staging: Path) -> MergedImage:
    with reporting_writes(staging), LayerMerge(staging) as merge:
        for number, layer in enumerate(layers, start=1):
            try:
                merge.add(layer.metadata.bootstrap_path)
            except FormatError as error:
                raise LayersUnfit(number=number, why=f"{layer.reference}: {error}") from error
        return merge.write(staging / "image.boot", prefetch)


def _blob_files(merged: MergedImage, layers: Sequence[NydusSource]) -> tuple[BlobFile, ...]:
    """The blobs of the image, each from the lowest layer that has it."""
    owners: dict[str, NydusSource] = {}
    for layer in layers:
        with Bootstrap.open(layer.metadata.bootstrap_path) as bootstrap:
            for entry in bootstrap.blobs:
                owners.setdefault(entry.blob_id, layer)
    return in_order(file for entry in merged.blobs for file in owners[entry.blob_id].blob_files(entry))


def _config_maker(layers: Sequence[NydusSource]) -> Callable[[Sequence[Descriptor], str], bytes]:
    """Makes the config from that of the highest image that says what is to run, else that has one."""
    known = [(layer.config, layer.reference) for layer in reversed(layers) if layer.config is not None]
    speaking = [(config, where) for config, where in known if says_what_runs(config, where)]
    chosen = next(iter(speaking or known), None)

    def make(blobs: Sequence[Descriptor], diff_id: str) -> bytes:
        if chosen is None:
            return build_config(this_platform(), blobs, diff_id)
        config, where = chosen
        return merged_config(config, [*(blob.digest for blob in blobs), diff_id], where)

    return make
