"""One build: a source becomes a bootstrap and a data blob in a work directory."""

import contextlib
import errno
import os
import shutil
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from backend.publishing import DiskFull
from backend.store import BlobFile, ImageFiles
from builder.assembly import Assembly
from builder.blob_writer import FinishedBlob
from builder.chunk_dict import ChunkDictionary, DictionaryImage
from builder.content_digest import ContentDigest
from builder.crew import Crew
from builder.directory import DirectorySource
from builder.journal import WorkDirectory
from builder.options import BuildOptions
from builder.pipeline import ChunkPipeline, PipelineCounters
from builder.prefetch_patterns import PrefetchPatterns, first_ones_first
from builder.tar_tree import TarTree
from builder.tarball import STANDARD_INPUT, TarSource
from rafs.chunk import lower_addresses, lower_rows
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
    """The files of the image, in the work directory until they are published.

    `diff_id` is that of the layer which the image is made of, "" where it is made of something else.
    """

    files: ImageFiles
    statistics: BuildStatistics
    diff_id: str = ""


@dataclass(frozen=True, slots=True)
class _Tree:
    """A source that was read: its tree, the rows of the prefetch table, what went through the pipeline."""

    table: InodeTable
    prefetch: list[int]
    counters: PipelineCounters


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
        tar_tree: type[TarTree] = TarTree,
    ) -> None:
        """Raises `BuildRunning` for a directory in use, `DictionaryMismatch` for an unfit dictionary,
        `DiskFull` when the work directory has no room for their indexes.
        """
        self._options = options
        self._patterns = PrefetchPatterns(options.prefetch)
        self._on_progress = on_progress
        self._tar_tree = tar_tree
        with reporting_full_disk(work_dir), contextlib.ExitStack() as stack:
            self._work = WorkDirectory(work_dir)
            stack.callback(self._work.close)
            self._dictionary = ChunkDictionary(dictionaries, options.chunk_size, options.digester, work_dir)
            stack.callback(self._dictionary.close)
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    @property
    def blob_path(self) -> Path:
        """The blob's file, to which `run` only appends."""
        return self._work.blob_path

    def discard(self) -> None:
        """Removes the work directory."""
        shutil.rmtree(self._work.path, ignore_errors=True)

    def run(self, source: Path, label: str = "") -> BuiltImage:
        """Builds from a directory, a tar file, or `-` for a tar stream on standard input.

        `label` names an archive in messages in place of its path. Raises `SourceUnreadable`,
        `SourceChanged`, `InvalidArchive`, `XattrUnsupported`, `ImageTooLarge`, `WorkerDied`, or `DiskFull`
        for the work directory.
        """
        return self._run(source, label, None)

    def run_layer(self, label: str) -> BuiltImage:
        """Builds from a layer on standard input, and takes its diff ID. `label` and errors as in `run`."""
        with ContentDigest() as digest:
            built = self._run(Path(STANDARD_INPUT), label, digest)
            return replace(built, diff_id=digest.diff_id())

    def _run(self, source: Path, label: str, digest: ContentDigest | None) -> BuiltImage:
        with (
            reporting_full_disk(self._work.path),
            Assembly(self._options, self._work, self._dictionary) as assembly,
        ):
            with Crew(self._options) as crew:
                if source.is_dir():
                    tree = self._load_directory(source, assembly, crew)
                else:
                    archive = TarSource(source, self._work.path / "stdin", label, digest)
                    tree = self._load_tar(archive, assembly, crew)
            blob = assembly.writer.finish()
            return self._finish(tree, assembly, blob)

    def _load_directory(self, root: Path, assembly: Assembly, crew: Crew) -> _Tree:
        source = DirectorySource(root)
        table = source.begin()

        def keep_xattrs(row: int, xattrs: dict[bytes, bytes]) -> None:
            table.xattrs[row] = pack_xattrs(xattrs, os.fsdecode(bytes(root) + table.path(row)))

        pipeline = ChunkPipeline(assembly, crew, table.addresses, keep_xattrs, self._on_progress)
        prefetch: list[int] = []
        stamps = source.scan(table)
        if self._patterns:
            rows = array("I", (stamp.row for stamp in stamps))
            prefetch = self._patterns.select(table)
            stamps = source.stamps(table, first_ones_first(rows, prefetch))
        for stamp in stamps:
            first = table.chunk_start[stamp.row] = pipeline.reserve(stamp.size)
            pipeline.add_file(stamp, first)
        pipeline.finish()
        return _Tree(table, prefetch, pipeline.counters)

    def _load_tar(self, source: TarSource, assembly: Assembly, crew: Crew) -> _Tree:
        addresses = array("Q")
        pipeline = ChunkPipeline(assembly, crew, addresses, lambda row, xattrs: None, self._on_progress)
        with self._tar_tree(source.name, self._work.path / "tree") as tree:
            table, prefetch = source.read(pipeline, tree, self._patterns)
        table.addresses = addresses
        pipeline.finish()
        return _Tree(table, prefetch, pipeline.counters)

    def _finish(self, tree: _Tree, assembly: Assembly, blob: FinishedBlob | None) -> BuiltImage:
        used = self._dictionary.used_blobs
        rows = assembly.rows.sorted_rows()
        entries = [] if blob is None else [blob.entry]
        if blob is None:  # all chunks are those of dictionaries, whose blobs then count from 0
            lower_addresses(tree.table.addresses)
            rows = map(lower_rows, rows)
        entries += [other.entry.at_index(index) for index, other in enumerate(used, start=len(entries))]
        bootstrap = self._work.path / "image.boot"
        content = BootstrapContent(
            tree.table,
            entries,
            rows,
            self._options.chunk_size,
            self._options.compression.codec,
            self._options.digester,
            tree.prefetch,
        )
        inodes = write_bootstrap(bootstrap, content)
        files = [] if blob is None else [self._own_blob(blob)]
        files += [
            BlobFile(other.entry.blob_id, other.entry.compressed_size, None, other.meta, other.reference)
            for other in used
        ]
        counters = tree.counters
        statistics = BuildStatistics(
            inodes,
            counters.files,
            counters.bytes_in,
            counters.bytes_unique,
            0 if blob is None else blob.entry.compressed_size,
            bootstrap.stat().st_size,
            counters.chunks,
            counters.chunks_unique,
            counters.extents_reused,
        )
        return BuiltImage(ImageFiles(bootstrap, tuple(files), gives_blobs_away=True), statistics)

    def _own_blob(self, blob: FinishedBlob) -> BlobFile:
        meta = self._work.path / f"{blob.entry.blob_id}.blob.meta"
        blob.meta.rename(meta)
        return BlobFile(blob.entry.blob_id, blob.entry.compressed_size, blob.path, meta, None)


@contextlib.contextmanager
def reporting_full_disk(work_dir: Path) -> Iterator[None]:
    """Raises `DiskFull` where a write to the work directory finds no space.

    Other `OSError`s pass: they may be the source's. Reading never runs out of space, so these cannot.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = "the build's work directory (--work-dir or --cache-dir gives it another place)"
        why = f"{error.strerror} in {place}"
        raise DiskFull(where=work_dir, why=why) from error
