"""One build: a source becomes a bootstrap and a data blob in a work directory."""

import shutil
import stat
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from backend.store import BlobFile, ImageFiles
from builder.blob_writer import BlobWriter, FinishedBlob
from builder.chunk_dict import ChunkDictionary, DictionaryImage
from builder.crew import Crew
from builder.directory import DirectorySource
from builder.journal import JournalWriter, WorkDirectory
from builder.options import BuildOptions
from builder.pipeline import ChunkPipeline, PipelineCounters
from builder.prefetch_patterns import PrefetchPatterns
from builder.tarball import TarSource
from rafs.chunk import drop_blob_zero
from rafs.inode_table import InodeTable
from rafs.writer import BootstrapContent, write_bootstrap
from rafs.xattr import pack_xattrs

ProgressCallback = Callable[[PipelineCounters], None]


@dataclass(frozen=True, slots=True)
class BuildStatistics:
    """What a build did; sizes in bytes, `bytes_in` as in the files, `bytes_out` as in the blob."""

    inodes: int
    files: int
    bytes_in: int
    bytes_unique: int
    bytes_out: int
    bootstrap_size: int
    chunks: int
    chunks_unique: int
    extents_reused: int


@dataclass(frozen=True, slots=True)
class BuiltImage:
    """The files of the image, in the work directory until they are published."""

    files: ImageFiles
    statistics: BuildStatistics


class Build:
    """A build in a work directory that it locks.

    A context manager. Leaving it unlocks the directory and leaves its files, from which the next build of the
    same source goes on; `discard` removes them once the image is published.
    """

    def __init__(
        self,
        work_dir: Path,
        options: BuildOptions,
        dictionaries: tuple[DictionaryImage, ...] = (),
        on_progress: ProgressCallback = lambda counters: None,
    ) -> None:
        """Raises `BuildRunning` for a directory in use, `DictionaryMismatch` for an unfit dictionary."""
        self._options = options
        self._patterns = PrefetchPatterns(options.prefetch)
        self._dictionary = ChunkDictionary(dictionaries, options.chunk_size, options.digester)
        self._on_progress = on_progress
        self._work = WorkDirectory(work_dir)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._work.close()

    def discard(self) -> None:
        """Removes the work directory."""
        shutil.rmtree(self._work.path, ignore_errors=True)

    def run(self, source: Path) -> BuiltImage:
        """Builds from a directory, a tar file, or `-` for a tar stream on standard input.

        Raises `SourceUnreadable`, `SourceChanged`, `InvalidArchive`, `XattrUnsupported`, `ImageTooLarge`,
        `WorkerDied`, or `OSError` when the work directory is full.
        """
        journal = JournalWriter(self._work.journal_path)
        writer = BlobWriter(self._work.blob_path, journal, self._options)
        try:
            with Crew(self._options) as crew:
                load = self._load_directory if source.is_dir() else self._load_tar
                table, prefetch, counters = load(source, crew, writer)
            blob = writer.finish()
        finally:
            writer.close()
        return self._finish(table, prefetch, counters, writer.rows, blob)

    def _load_directory(
        self, root: Path, crew: Crew, writer: BlobWriter
    ) -> tuple[InodeTable, list[int], PipelineCounters]:
        source = DirectorySource(root)
        table = source.begin()

        def keep_xattrs(row: int, xattrs: dict[bytes, bytes]) -> None:
            table.xattrs[row] = pack_xattrs(xattrs, str(root) + table.path(row).decode("utf-8", "replace"))

        pipeline = self._pipeline(crew, writer, table.addresses, keep_xattrs)
        stamps = source.scan(table)
        prefetch: list[int] = []
        if self._patterns:
            by_row = {stamp.row: stamp for stamp in stamps}
            prefetch = self._patterns.select(table, by_row)
            stamps = iter([by_row.pop(row) for row in prefetch] + list(by_row.values()))
        for stamp in stamps:
            first = table.chunk_start[stamp.row] = pipeline.reserve(stamp.size)
            pipeline.add_file(stamp, first)
        pipeline.finish()
        return table, prefetch, pipeline.counters

    def _load_tar(
        self, path: Path, crew: Crew, writer: BlobWriter
    ) -> tuple[InodeTable, list[int], PipelineCounters]:
        addresses = array("Q")
        pipeline = self._pipeline(crew, writer, addresses, lambda row, xattrs: None)
        patterns = self._patterns
        is_hot = (lambda path: patterns.rank(path) is not None) if patterns else None
        tree = TarSource(path, self._work.path / "stdin").read(pipeline, is_hot)
        pipeline.finish()
        table = InodeTable(tree.root.attributes)
        table.addresses = addresses
        tree.fill(table)
        files = [row for row in table.inode_rows() if stat.S_ISREG(table.mode[row])]
        return table, patterns.select(table, files) if patterns else [], pipeline.counters

    def _pipeline(
        self,
        crew: Crew,
        writer: BlobWriter,
        addresses: "array[int]",
        on_xattrs: Callable[[int, dict[bytes, bytes]], None],
    ) -> ChunkPipeline:
        return ChunkPipeline(
            self._options, crew, self._dictionary, writer, self._work, addresses, on_xattrs, self._on_progress
        )

    def _finish(
        self,
        table: InodeTable,
        prefetch: list[int],
        counters: PipelineCounters,
        own_rows: list[bytes],
        blob: FinishedBlob | None,
    ) -> BuiltImage:
        dictionary = self._dictionary
        used = dictionary.used_blobs
        rows = own_rows + dictionary.rows
        if blob is None:  # all chunks are those of dictionaries, whose blobs then count from 0
            rows = drop_blob_zero(table.addresses, rows)
        first = 0 if blob is None else 1
        entries = [] if blob is None else [blob.entry]
        entries += [other.entry.at_index(first + number) for number, other in enumerate(used)]
        bootstrap = self._work.path / "image.boot"
        content = BootstrapContent(
            table,
            entries,
            rows,
            self._options.chunk_size,
            self._options.compression.codec,
            self._options.digester,
            prefetch,
        )
        inodes = write_bootstrap(bootstrap, content)
        files = [] if blob is None else [self._own_blob(blob)]
        files += [
            BlobFile(other.entry.blob_id, other.entry.compressed_size, None, other.meta, other.reference)
            for other in used
        ]
        return BuiltImage(
            ImageFiles(bootstrap, tuple(files)),
            BuildStatistics(
                inodes,
                counters.files,
                counters.bytes_in,
                counters.bytes_unique,
                0 if blob is None else blob.entry.compressed_size,
                bootstrap.stat().st_size,
                counters.chunks,
                counters.chunks_unique,
                counters.extents_reused,
            ),
        )

    def _own_blob(self, blob: FinishedBlob) -> BlobFile:
        meta = self._work.path / f"{blob.entry.blob_id}.blob.meta"
        meta.write_bytes(blob.meta)
        return BlobFile(blob.entry.blob_id, blob.entry.compressed_size, blob.path, meta, None)
