"""A build that leaves its source as it is: the gzip layer itself is the data blob of the image."""

import os
from collections.abc import Callable
from pathlib import Path

from backend.store import BlobFile, ImageFiles
from builder.build import BuildStatistics, BuiltImage, reporting_full_disk
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


def _image_files(layer: ZranLayer, source: Path) -> ImageFiles:
    if layer.meta is None:
        return ImageFiles(layer.bootstrap, ())
    blob = BlobFile(layer.digest, layer.size, source, layer.meta, rafs_blob=layer.rafs_blob)
    return ImageFiles(layer.bootstrap, (blob,))


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
