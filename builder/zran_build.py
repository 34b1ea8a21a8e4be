"""A build that leaves its source as it is: the gzip layer itself is the data blob of the image."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from backend.store import BlobFile, ImageFiles
from builder.build import BuildStatistics, BuiltImage, reporting_full_disk
from builder.content_digest import ContentDigest
from builder.journal import WorkDirectory
from builder.layer_tree import LayerTree
from builder.options import BuildOptions
from builder.pipeline import PipelineCounters
from builder.worker import SourceUnreadable
from builder.zran_layer import ZranLayer, index_layer


def build_in_place(
    source: Path, work_dir: Path, options: BuildOptions, on_progress: Callable[[PipelineCounters], None]
) -> BuiltImage:
    """Indexes the gzip layer at `source` in one pass, into `work_dir`, which is empty.

    Raises what `index_layer` raises, `SourceUnreadable`, or `DiskFull` for the work directory.
    """
    try:
        file = source.open("rb")
    except OSError as error:
        raise SourceUnreadable(path=source, why=error.strerror) from error
    with file, reporting_full_disk(work_dir):
        layer = index_layer(file, str(source), work_dir, options, on_progress)
    return BuiltImage(_image_files(layer, source), _statistics(layer))


def index_stream(
    stream: BinaryIO,
    label: str,
    work_dir: Path,
    options: BuildOptions,
    on_progress: Callable[[PipelineCounters], None],
) -> BuiltImage:
    """Indexes one gzip layer of a container image, in a work directory that it locks.

    The bootstrap has the marks of `layer_marks`. Raises as `index_layer`, `BuildRunning`, `DiskFull`.
    """
    with (
        reporting_full_disk(work_dir),
        contextlib.closing(WorkDirectory(work_dir)),
        ContentDigest() as digest,
    ):
        layer = index_layer(stream, label, work_dir, options, on_progress, LayerTree, digest.update)
        return BuiltImage(_image_files(layer, None), _statistics(layer), digest.diff_id())


def _image_files(layer: ZranLayer, source: Path | None) -> ImageFiles:
    if layer.meta is None or layer.rafs_blob is None:
        return ImageFiles(layer.bootstrap, ())
    blob = BlobFile(layer.digest, layer.size, source, layer.meta)
    size, path = layer.rafs_blob.stat().st_size, layer.rafs_blob
    table = BlobFile(path.name, size, path, layer.meta, table_of=layer.digest)
    return ImageFiles(layer.bootstrap, (blob, table))


def _statistics(layer: ZranLayer) -> BuildStatistics:
    counters = layer.counters
    return BuildStatistics(
        layer.inodes,
        counters.files,
        counters.bytes_in,
        counters.bytes_unique,
        counters.bytes_out,
        os.stat(layer.bootstrap).st_size,
        counters.chunks,
        counters.chunks_unique,
        counters.extents_reused,
    )
