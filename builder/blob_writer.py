"""The data blob of an image: encoded extents one behind the other, then the chunk infos and a header."""

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import xxhash
import zstandard

from builder.journal import JournalWriter, WorkDirectory
from builder.options import BuildOptions
from builder.row_spool import RowSpool
from builder.writeback import EarlyWriteback
from rafs.blob_table import (
    CHUNKS_PER_BLOB_MAX,
    DECODED_SIZE_MAX,
    ENCODED_SIZE_MAX,
    BlobEntry,
    BlobFeatures,
)
from rafs.blobmeta import BATCH_CONTEXT, BatchContext, BlobMetaHeader, ChunkInfo, pack_batch_member
from rafs.chunk import ROW, ChunkFlags, ChunkRow
from rafs.codec import Compressor
from rafs.record import BLOCK_SIZE, round_up
from rafs.writer import ImageTooLarge

_COPY_SIZE = 1 << 20
_CHUNK_ENCODED_MAX = 0xFF_FFFF
"""A chunk info has 24 bits for it. A chunk of 16 MiB that is stored as it is becomes a batch of one."""
_BATCH_ROW = int(ChunkFlags.COMPRESSED | ChunkFlags.BATCH)


class NewChunk(NamedTuple):
    """A chunk that the image did not have: where it lies in its slot, and what identifies it. Bytes."""

    digest: bytes
    slot_offset: int
    size: int
    crc32: int
    batchable: bool


@dataclass(frozen=True, slots=True)
class PlacedExtent:
    """Chunks that are encoded together, with the number and the decoded offset of the first."""

    chunks: Sequence[NewChunk]
    first_chunk: int
    uncompressed_offset: int
    key: bytes

    @property
    def decoded_size(self) -> int:
        """Bytes before encoding."""
        return sum(chunk.size for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class FinishedBlob:
    """A complete blob file, its table entry and the node-side blob.meta file."""

    path: Path
    entry: BlobEntry
    meta: Path


class BlobWriter:
    """Writes extents in the order in which they were placed; numbers and offsets are known before the bytes
    are.

    The blob's index in the image is 0: dictionary blobs come behind it.
    """

    def __init__(self, work: WorkDirectory, rows: RowSpool, options: BuildOptions) -> None:
        """Creates the files of this build in `work`; rows of the chunk table go to `rows`."""
        self._options = options
        self._rows = rows
        self._path = work.blob_path
        self._meta_path = work.path / "blob.meta"
        self._journal = JournalWriter(work.journal_path)
        self._file = self._path.open("xb", buffering=0)
        self._infos = self._meta_path.open("w+b")
        self._writeback = EarlyWriteback(self._file.fileno())
        self._hash = hashlib.sha256()
        self._contexts = bytearray()
        self.chunk_count = 0
        self.uncompressed_size = 0
        self.compressed_size = 0

    def place(self, chunks: Sequence[NewChunk], key: bytes) -> PlacedExtent:
        """Gives an extent its place in the decoded blob. Raises `ImageTooLarge` past the format's limits."""
        extent = PlacedExtent(chunks, self.chunk_count, self.uncompressed_size, key)
        self.chunk_count += len(chunks)
        for chunk in chunks:
            self.uncompressed_size += round_up(chunk.size, BLOCK_SIZE)
        if self.chunk_count > CHUNKS_PER_BLOB_MAX or self.uncompressed_size > DECODED_SIZE_MAX:
            raise ImageTooLarge(why=f"{self.chunk_count} chunks, {self.uncompressed_size} bytes in one blob")
        return extent

    def append(self, extent: PlacedExtent, encoded: Sequence[memoryview]) -> None:
        """Writes an extent's bytes, given in parts. It is compressed when they are fewer than its own."""
        offset, decoded_size = self.compressed_size, extent.decoded_size
        checksum = xxhash.xxh3_64()
        size = 0
        for part in encoded:
            self._write(part)
            checksum.update(part)
            size += len(part)
        if self.compressed_size > ENCODED_SIZE_MAX:
            raise ImageTooLarge(why=f"{self.compressed_size} encoded bytes in one blob")
        self._journal.append(extent.key, offset, size, decoded_size, checksum.intdigest())
        if len(extent.chunks) > 1 or size > _CHUNK_ENCODED_MAX:
            self._describe_batch(extent, offset)
            self._contexts += BatchContext(size, decoded_size).pack()
        else:
            self._describe_chunk(extent, offset, size)

    def finish(self) -> FinishedBlob | None:
        """Writes the chunk infos and the header; None when the blob holds nothing."""
        self._journal.flush()
        if not self.chunk_count:
            self.close()
            return None
        array_size = self._infos.tell() + len(self._contexts)
        context_offset = self._infos.tell() if self._contexts else 0
        self._infos.write(self._contexts)
        data_size = self.compressed_size
        self._compress_infos(array_size)
        header = BlobMetaHeader(
            self._features() & ~BlobFeatures.CAP_TAR_TOC,
            Compressor.ZSTD,
            self.chunk_count,
            data_size,
            self.compressed_size - data_size,
            array_size,
            context_offset,
            len(self._contexts),
            len(self._contexts) // BATCH_CONTEXT.size,
        )
        self._write(memoryview(header.pack()))
        self._infos.write(bytes(-array_size % BLOCK_SIZE) + header.pack())
        self.close()
        return FinishedBlob(self._path, self._entry(header), self._meta_path)

    def close(self) -> None:
        """Closes the files; after a failure what they hold stays for the next build."""
        with contextlib.ExitStack() as stack:  # on a full disk each of them may fail; all are closed
            stack.callback(self._journal.close)
            stack.callback(self._infos.close)
            stack.callback(self._file.close)

    def _compress_infos(self, array_size: int) -> None:
        """Appends the array to the blob as one zstd frame, a piece at a time: it may be large."""
        encoder = zstandard.ZstdCompressor().compressobj(size=array_size)
        self._infos.seek(0)
        while block := self._infos.read(_COPY_SIZE):
            self._write(memoryview(encoder.compress(block)))
        self._write(memoryview(encoder.flush()))

    def _entry(self, header: BlobMetaHeader) -> BlobEntry:
        return BlobEntry(
            self._hash.hexdigest(),
            0,
            self._options.chunk_size,
            self.chunk_count,
            self._options.compression.codec,
            self._options.digester,
            self._features(),
            self.compressed_size,
            self.uncompressed_size,
            0,
            Compressor(header.ci_compressor),
            header.ci_offset,
            header.ci_compressed_size,
            header.ci_uncompressed_size,
        )

    def _features(self) -> BlobFeatures:
        features = BlobFeatures.ALIGNED | BlobFeatures.CHUNK_INFO_V2 | BlobFeatures.CAP_TAR_TOC
        return features | BlobFeatures.BATCH if self._contexts else features

    def _describe_chunk(self, extent: PlacedExtent, offset: int, size: int) -> None:
        chunk = extent.chunks[0]
        compressed = size != chunk.size
        # Small files have none, also when one is alone in its batch.
        crc32 = None if chunk.batchable else chunk.crc32
        info = ChunkInfo(offset, size, extent.uncompressed_offset, chunk.size, compressed, crc32c=crc32)
        self._infos.write(info.pack_v2())
        row = ChunkRow(
            chunk.digest,
            0,
            ChunkFlags(compressed) if crc32 is None else ChunkFlags.HAS_CRC32 | ChunkFlags(compressed),
            size,
            chunk.size,
            offset,
            extent.uncompressed_offset,
            0,
            extent.first_chunk,
            crc32 or 0,
        )
        self._rows.append(row.pack())

    def _describe_batch(self, extent: PlacedExtent, offset: int) -> None:
        uncompressed_offset, in_batch = extent.uncompressed_offset, 0
        batch = len(self._contexts) // BATCH_CONTEXT.size
        infos, rows = [], []
        for number, chunk in enumerate(extent.chunks, start=extent.first_chunk):
            size = chunk.size
            infos.append(pack_batch_member(offset, uncompressed_offset, size, batch, in_batch))
            rows.append(
                ROW.pack(chunk.digest, 0, _BATCH_ROW, 0, size, offset, uncompressed_offset, 0, number, 0)
            )
            uncompressed_offset += round_up(size, BLOCK_SIZE)
            in_batch += size
        self._infos.write(b"".join(infos))
        self._rows.append(b"".join(rows))

    def _write(self, data: memoryview) -> None:
        self._hash.update(data)
        self.compressed_size += len(data)
        while data:
            data = data[self._file.write(data) :]
        self._writeback.advance(self.compressed_size)
