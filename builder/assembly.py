"""The parts that an image is put together from, and their files in the work directory."""

import contextlib
from types import TracebackType
from typing import Self

from builder.blob_writer import BlobWriter
from builder.chunk_dict import ChunkDictionary
from builder.dedup import DedupIndex
from builder.journal import WorkDirectory
from builder.options import BuildOptions
from builder.row_spool import RowSpool


class Assembly:
    """One image under way. A context manager: leaving it closes the files and removes the temporary ones."""

    def __init__(self, options: BuildOptions, work: WorkDirectory, dictionary: ChunkDictionary) -> None:
        self.options = options
        self.work = work
        self.dictionary = dictionary
        self.dedup = DedupIndex(work.path / "dedup")
        self.rows = RowSpool(work.path / "rows")
        self.writer = BlobWriter(work, self.rows, options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.ExitStack() as stack:  # on a full disk each of them may fail; all are closed
            stack.callback(self.dedup.close)
            stack.callback(self.rows.close)
            stack.callback(self.writer.close)
