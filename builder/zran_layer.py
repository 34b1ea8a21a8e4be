"""An image of a gzip layer that stays as it is: only an index of it is made, in one pass over a stream."""

import hashlib
import io
import tarfile
import tempfile
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

from builder.dedup import DedupIndex
from builder.gzip_index import GzipIndexer
from builder.options import BuildOptions
from builder.pipeline import PipelineCounters
from builder.prefetch_patterns import PrefetchPatterns
from builder.row_spool import RowSpool
from builder.tar_tree import InvalidArchive, TarTree
from builder.tarball import members_of, skip_content
from builder.zran_writer import ZranWriter
from rafs.blob_table import BlobEntry
from rafs.codec import Compressor
from rafs.inode_table import InodeTable
from rafs.writer import BootstrapContent, write_bootstrap

_BEHIND = 4 << 20
"""Decoded bytes, beside a chunk's own, by which the inflater may be ahead of the start of a chunk."""


@dataclass(frozen=True, slots=True)
class ZranLayer:
    """What indexing a layer gives. Sizes in bytes.

    `entry`, `rafs_blob` and `meta` are None for a layer without content. The data blob is the layer, and its
    ID the layer's digest; `rafs_blob` is the file that `entry.meta_digest` names.
    """

    digest: str
    size: int
    bootstrap: Path
    inodes: int
    entry: BlobEntry | None
    rafs_blob: Path | None
    meta: Path | None
    counters: PipelineCounters


def index_layer(
    stream: BinaryIO,
    name: str,
    work_dir: Path,
    options: BuildOptions,
    on_progress: Callable[[PipelineCounters], None] = lambda counters: None,
    tar_tree: type[TarTree] = TarTree,
    on_content: Callable[[bytes], None] | None = None,
) -> ZranLayer:
    """Reads the gzip layer `stream` once, and writes an image of it into `work_dir`, which nobody else uses.

    `name` is the layer's in messages. With `on_content`, which gets the tar inside piece by piece, it is one
    of a container image. Of the options, chunk size, digester and prefetch patterns are used.
    Raises `BrokenGzip`, `InvalidArchive`, `CannotIndex`, `ImageTooLarge`, `NoZlib`, and what reading raises.
    """
    with ExitStack() as stack:
        source = _HashedStream(stream)
        indexer = stack.enter_context(GzipIndexer(source.read, name))
        dedup = DedupIndex(work_dir / "dedup")
        stack.callback(dedup.close)
        rows = RowSpool(work_dir / "rows")
        stack.callback(rows.close)
        windows = stack.enter_context(tempfile.TemporaryFile(dir=work_dir))
        writer = ZranWriter(indexer, rows, cast("BinaryIO", windows), options)
        tar = _Inflated(indexer, options.chunk_size + _BEHIND, on_content)
        reader = _LayerReader(tar, writer, dedup, options, on_progress)
        tree = stack.enter_context(tar_tree(name, work_dir / "tree"))
        table = reader.read(tree, name, is_layer=on_content is not None)
        rafs_blob, meta = work_dir / "rafs.blob", work_dir / "blob.meta"
        entry = writer.finish(source.hexdigest(), source.size, rafs_blob, meta)
        bootstrap = work_dir / "image.boot"
        inodes = write_bootstrap(
            bootstrap,
            BootstrapContent(
                table,
                [entry] if entry else [],
                rows.sorted_rows(),
                options.chunk_size,
                Compressor.GZIP,
                options.digester,
                PrefetchPatterns(options.prefetch).select(table),
            ),
        )
        reader.counters.bytes_out = source.size
        if entry is not None:  # as blobs are named everywhere
            rafs_blob = rafs_blob.rename(work_dir / entry.meta_digest.hex())
        return ZranLayer(
            source.hexdigest(),
            source.size,
            bootstrap,
            inodes,
            entry,
            rafs_blob if entry else None,
            meta if entry else None,
            reader.counters,
        )


class _HashedStream:
    """The layer as it comes, its digest taken on the way."""

    def __init__(self, stream: BinaryIO) -> None:
        self.size = 0
        self._stream = stream
        self._hash = hashlib.sha256()

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, none at the end."""
        data = self._stream.read(size)
        self._hash.update(data)
        self.size += len(data)
        return data

    def hexdigest(self) -> str:
        """Of all that was read, in hex."""
        return self._hash.hexdigest()


class _Inflated(io.RawIOBase):
    """The tar stream inside, for `tarfile`: forward only."""

    def __init__(self, indexer: GzipIndexer, behind: int, on_content: Callable[[bytes], None] | None) -> None:
        self._indexer = indexer
        self._behind = behind
        self._on_content = on_content
        self._piece = memoryview(b"")
        self._position = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, none at the end."""
        if not self._piece:
            self._indexer.forget(self._position - self._behind)
            self._piece = self._indexer.inflate()
            if self._on_content is not None:
                self._on_content(bytes(self._piece))
        data, self._piece = bytes(self._piece[:size]), self._piece[size:]
        self._position += len(data)
        return data


class _LayerReader:
    """Reads the members of a layer and hands the chunks of its files to the writer."""

    def __init__(
        self,
        tar: _Inflated,
        writer: ZranWriter,
        dedup: DedupIndex,
        options: BuildOptions,
        on_progress: Callable[[PipelineCounters], None],
    ) -> None:
        self.counters = PipelineCounters()
        self._stream = cast("IO[bytes]", tar)
        self._writer = writer
        self._dedup = dedup
        self._options = options
        self._on_progress = on_progress
        self._addresses = array("Q")

    def read(self, tree: TarTree, name: str, *, is_layer: bool) -> InodeTable:
        """The tree of the layer, with the address of each chunk; `is_layer` as in `members_of`."""
        for archive, _, member in members_of(self._stream, name, is_layer=is_layer):
            if member.issparse():
                why = f"{member.name!r} is a sparse entry: its holes are not in the layer, so that it has to"
                raise InvalidArchive(archive=name, why=f"{why} be converted without --no-copy")
            tree.add(member, len(self._addresses))
            if member.isreg():
                self._add_file(archive, member, name)
            else:
                skip_content(archive, member, name)
        table = tree.table()
        table.addresses = self._addresses
        return table

    def _add_file(self, archive: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> None:
        # The stream stands at the member's content: nothing was read but its header.
        stream = cast("BinaryIO", archive.fileobj)
        self.counters.files += 1
        for offset in range(0, member.size, self._options.chunk_size):
            wanted = min(self._options.chunk_size, member.size - offset)
            data = stream.read(wanted)
            if len(data) != wanted:
                why = f"it ends inside {member.name!r} at byte {offset + len(data)}"
                raise InvalidArchive(archive=name, why=why)
            self._add_chunk(data, member.offset_data + offset)
            self._on_progress(self.counters)

    def _add_chunk(self, data: bytes, start: int) -> None:
        counters = self.counters
        digest = self._options.digester.digest(data)
        if self._dedup.claim(digest):
            self._dedup.place(digest, *self._writer.add(digest, start, len(data)))
            counters.chunks_unique += 1
            counters.bytes_unique += len(data)
        self._addresses.append(self._dedup.address(digest))
        counters.chunks += 1
        counters.bytes_in += len(data)
