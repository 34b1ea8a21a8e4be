"""Chunks of an image written again, into one new blob."""

import contextlib
from array import array
from pathlib import Path
from types import TracebackType
from typing import Self

from builder.assembly import Assembly
from builder.blob_writer import FinishedBlob
from builder.build import reporting_full_disk
from builder.chunk_dict import ChunkDictionary
from builder.crew import Crew
from builder.journal import WorkDirectory
from builder.options import BuildOptions
from builder.path_tree import IMPLIED_DIRECTORY
from builder.pipeline import ChunkPipeline
from rafs.inode_table import InodeTable
from rafs.writer import BootstrapContent, write_bootstrap


class Repack:
    """Takes decoded chunks one by one. A context manager; leaving it ends the worker processes.

    Small chunks share units of compression, as small files of a build do.
    """

    def __init__(self, work_dir: Path, options: BuildOptions) -> None:
        """Raises `BuildRunning`, `DiskFull`."""
        self._options = options
        self._work_dir = work_dir
        with reporting_full_disk(work_dir), contextlib.ExitStack() as stack:
            work = WorkDirectory(work_dir)
            stack.callback(work.close)
            dictionary = ChunkDictionary((), options.chunk_size, options.digester, work_dir)
            stack.callback(dictionary.close)
            self._assembly = stack.enter_context(Assembly(options, work, dictionary))
            crew = stack.enter_context(Crew(options))
            self._open = stack.pop_all()
        self._addresses = array("Q")
        self._pipeline = ChunkPipeline(
            self._assembly, crew, self._addresses, lambda row, xattrs: None, lambda counters: None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def add(self, chunk: bytes) -> None:
        """The next chunk. Raises `DiskFull`, `ImageTooLarge`, `WorkerDied`."""
        with reporting_full_disk(self._work_dir):
            first_address = self._pipeline.reserve(len(chunk))
            for offset, view in self._pipeline.ranges(len(chunk), first_address):
                view[:] = chunk[offset : offset + len(view)]

    def finish(self) -> tuple[FinishedBlob, Path]:
        """The blob, and a bootstrap that has its chunk table and no file. Not without any chunk."""
        with reporting_full_disk(self._work_dir):
            self._pipeline.finish()
            blob = self._assembly.writer.finish()
            assert blob is not None, "there was a chunk"
            bootstrap = self._work_dir / "repacked.boot"
            content = BootstrapContent(
                InodeTable(IMPLIED_DIRECTORY),
                [blob.entry],
                self._assembly.rows.sorted_rows(),
                self._options.chunk_size,
                self._options.compression.codec,
                self._options.digester,
            )
            write_bootstrap(bootstrap, content)
        return blob, bootstrap
