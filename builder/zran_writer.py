"""The chunk infos, contexts and windows of a layer that stays a gzip stream: all that its blob.meta holds.

Chunks come in the order of the stream. A context is closed when the next chunk would make it too large and a
later one can start nearer to it, and only then are its chunks described: each names the range of the whole
context.
"""

import hashlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO, ClassVar, NamedTuple

import zstandard

from builder.gzip_index import GzipIndexer, RestartPoint
from builder.options import BuildOptions
from builder.row_spool import RowSpool
from rafs.blob_table import (
    CHUNKS_PER_BLOB_MAX,
    DECODED_SIZE_MAX,
    ENCODED_SIZE_MAX,
    BlobEntry,
    BlobFeatures,
)
from rafs.blobmeta import HEADER_SIZE, BlobMetaHeader, ChunkInfo
from rafs.chunk import ChunkFlags, ChunkRow
from rafs.codec import Compressor
from rafs.errors import NydusError
from rafs.record import BLOCK_SIZE, round_up
from rafs.writer import ImageTooLarge
from rafs.zran import DECODED_MAX, ENCODED_MAX, ZranContext

_COPY_SIZE = 1 << 20
CONTEXT_ENCODED = 1 << 20
CONTEXT_DECODED = 2 << 20
"""Where a context ends, unless the block that it starts in goes on."""


class CannotIndex(NydusError):
    """A gzip stream in which single files cannot be reached without inflating far too much before them."""

    message = "byte {offset} of the unpacked layer: {why}; it has to be converted without --no-copy"
    exit_code: ClassVar[int] = 68


class _Chunk(NamedTuple):
    digest: bytes
    start: int
    size: int


class ZranWriter:
    """Places the chunks of one gzip layer. Starts and sizes in bytes of the inflated stream."""

    def __init__(
        self, indexer: GzipIndexer, rows: RowSpool, windows: BinaryIO, options: BuildOptions
    ) -> None:
        """Rows of the chunk table go to `rows`, windows to a file: a tenth of the layer or so."""
        self.chunk_count = 0
        self.uncompressed_size = 0
        self._indexer = indexer
        self._rows = rows
        self._options = options
        self._infos = bytearray()
        self._contexts = bytearray()
        self._windows = windows
        self._windows_size = 0
        self._context_count = self._described = self._described_size = 0
        self._point: RestartPoint | None = None
        self._chunks: list[_Chunk] = []
        self._end = (0, 0)

    def add(self, digest: bytes, start: int, size: int) -> tuple[int, int]:
        """Takes the next chunk, inflated just now; returns its number and its block in the decoded blob.

        Raises `CannotIndex`, or `ImageTooLarge` past the format's limits.
        """
        end = self._indexer.encoded_end(start + size), start + size
        if self._point is None or not _fits(self._point, end, CONTEXT_ENCODED, CONTEXT_DECODED):
            point = self._indexer.point_before(start)
            # In a long block there is no later point: another context would be the same, once more.
            if point is None or self._point is None or point.in_offset != self._point.in_offset:
                self._close_context()
                self._point = point
            if self._point is None or not _fits(self._point, end, ENCODED_MAX, DECODED_MAX):
                raise CannotIndex(offset=start, why="its gzip stream has blocks of too many bytes")
        self._end = end
        self._chunks.append(_Chunk(digest, start, size))
        number, block = self.chunk_count, self.uncompressed_size // BLOCK_SIZE
        self.chunk_count += 1
        self.uncompressed_size += round_up(size, BLOCK_SIZE)
        if self.chunk_count > CHUNKS_PER_BLOB_MAX or self.uncompressed_size > DECODED_SIZE_MAX:
            raise ImageTooLarge(why=f"{self.chunk_count} chunks, {self.uncompressed_size} bytes in one blob")
        return number, block

    def finish(self, layer_digest: str, layer_size: int, rafs_blob: Path, meta: Path) -> BlobEntry | None:
        """Writes the RAFS blob and the node-side blob.meta, new files; None when there are no chunks.

        `layer_digest` is the SHA-256 of the gzip stream in hex: the data blob is the stream itself.
        """
        self._close_context()
        if not self.chunk_count:
            return None
        if layer_size > ENCODED_SIZE_MAX:
            raise ImageTooLarge(why=f"{layer_size} encoded bytes in one blob")
        context_size = len(self._contexts) + self._windows_size
        array_size = len(self._infos) + context_size
        encoded_size = self._write_array(rafs_blob, meta, array_size)
        features = (
            BlobFeatures.ALIGNED | BlobFeatures.CHUNK_INFO_V2 | BlobFeatures.ZRAN | BlobFeatures.SEPARATE
        )
        header = BlobMetaHeader(
            features,
            Compressor.ZSTD,
            self.chunk_count,
            0,
            encoded_size,
            array_size,
            len(self._infos),
            context_size,
            self._context_count,
        )
        with rafs_blob.open("r+b") as file:
            file.seek(encoded_size)
            file.write(header.pack())
            file.seek(0)
            meta_digest = hashlib.file_digest(file, "sha256").digest()
        with meta.open("ab") as file:
            file.write(bytes(-array_size % BLOCK_SIZE) + header.pack())
        return BlobEntry(
            layer_digest,
            0,
            self._options.chunk_size,
            self.chunk_count,
            Compressor.GZIP,
            self._options.digester,
            features | BlobFeatures.CAP_TAR_TOC,
            layer_size,
            self.uncompressed_size,
            0,
            Compressor.ZSTD,
            header.ci_offset,
            header.ci_compressed_size,
            header.ci_uncompressed_size,
            meta_digest=meta_digest,
            meta_size=encoded_size + HEADER_SIZE,
        )

    def _write_array(self, rafs_blob: Path, meta: Path, array_size: int) -> int:
        """Infos, contexts and windows, as they are and as one zstd frame, whose size it gives."""
        encoder = zstandard.ZstdCompressor().compressobj(size=array_size)
        self._windows.seek(0)
        windows: Iterator[bytes] = iter(lambda: self._windows.read(_COPY_SIZE), b"")
        parts: Iterator[bytes | bytearray] = chain((self._infos, self._contexts), windows)
        with meta.open("wb") as plain, rafs_blob.open("wb") as encoded:
            for part in parts:
                plain.write(part)
                encoded.write(encoder.compress(part))
            encoded.write(encoder.flush())
            return encoded.tell()

    def _close_context(self) -> None:
        point, chunks = self._point, self._chunks
        if point is None:
            return
        encoded_size = self._end[0] - point.in_offset
        for chunk in chunks:
            self._describe(chunk, point, encoded_size)
        context = ZranContext(
            point.in_offset,
            point.out_offset,
            self._windows_size,
            encoded_size,
            self._end[1] - point.out_offset,
            len(point.window),
            point.byte if point.bits else 0,
            point.bits,
        )
        self._contexts += context.pack()
        self._windows.write(point.window)
        self._windows_size += len(point.window)
        self._context_count += 1
        self._point, self._chunks = None, []

    def _describe(self, chunk: _Chunk, point: RestartPoint, encoded_size: int) -> None:
        info = ChunkInfo(
            point.in_offset,
            encoded_size,
            self._described_size,
            chunk.size,
            is_compressed=True,
            batch_index=self._context_count,
            offset_in_batch=chunk.start - point.out_offset,
            is_zran=True,
        )
        row = ChunkRow(
            chunk.digest,
            0,
            ChunkFlags.COMPRESSED,
            encoded_size,
            chunk.size,
            point.in_offset,
            self._described_size,
            0,
            self._described,
            0,
        )
        self._infos += info.pack_v2()
        self._rows.append(row.pack())
        self._described += 1
        self._described_size += round_up(chunk.size, BLOCK_SIZE)


def _fits(point: RestartPoint, end: tuple[int, int], encoded: int, decoded: int) -> bool:
    return end[0] - point.in_offset <= encoded and end[1] - point.out_offset <= decoded
