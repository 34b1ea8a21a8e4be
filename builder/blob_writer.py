"""The data blob of an image: encoded extents one behind the other, then the chunk infos and a header."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import xxhash

from builder.journal import JournalWriter
from builder.options import BuildOptions
from rafs.blob_table import CHUNKS_PER_BLOB_MAX, DECODED_SIZE_MAX, BlobEntry, BlobFeatures
from rafs.blobmeta import BatchContext, BlobMetaHeader, ChunkInfo, node_form, pack_batch_member
from rafs.chunk import ROW, ChunkFlags, ChunkRow
from rafs.codec import Compressor, compress
from rafs.record import BLOCK_SIZE, round_up
from rafs.writer import ImageTooLarge

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
    """A complete blob file, its table entry and the node-side blob.meta."""

    path: Path
    entry: BlobEntry
    meta: bytes


class BlobWriter:
    """Writes extents in the order in which they were placed; numbers and offsets are known before the bytes
    are.

    The blob's index in the image is 0: dictionary blobs come behind it.
    """

    def __init__(self, path: Path, journal: JournalWriter, options: BuildOptions) -> None:
        self._options = options
        self._journal = journal
        self._path = path
        self._file = path.open("xb", buffering=0)
        self._hash = hashlib.sha256()
        self._infos = bytearray()
        self._batches: list[BatchContext] = []
        self.rows: list[bytes] = []
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
        self._journal.append(extent.key, offset, size, decoded_size, checksum.intdigest())
        if len(extent.chunks) > 1:
            self._describe_batch(extent, offset)
            self._batches.append(BatchContext(size, decoded_size))
        else:
            self._describe_chunk(extent, offset, size)

    def finish(self) -> FinishedBlob | None:
        """Writes the chunk infos and the header; None when the blob holds nothing."""
        self._journal.flush()
        if not self.chunk_count:
            self._file.close()
            self._path.unlink()
            return None
        contexts = b"".join(batch.pack() for batch in self._batches)
        array = bytes(self._infos) + contexts
        encoded = compress(Compressor.ZSTD, array)
        header = BlobMetaHeader(
            self._features() & ~BlobFeatures.CAP_TAR_TOC,
            Compressor.ZSTD,
            self.chunk_count,
            self.compressed_size,
            len(encoded),
            len(array),
            len(self._infos) if contexts else 0,
            len(contexts),
            len(self._batches),
        )
        self._write(memoryview(encoded))
        self._write(memoryview(header.pack()))
        self._file.close()
        return FinishedBlob(self._path, self._entry(header), node_form(array, header))

    def close(self) -> None:
        """Closes the file after a failure; what it holds stays for the next build."""
        self._file.close()
        self._journal.close()

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
        return features | BlobFeatures.BATCH if self._batches else features

    def _describe_chunk(self, extent: PlacedExtent, offset: int, size: int) -> None:
        chunk = extent.chunks[0]
        compressed = size != chunk.size
        info = ChunkInfo(offset, size, extent.uncompressed_offset, chunk.size, compressed, crc32c=chunk.crc32)
        self._infos += info.pack_v2()
        row = ChunkRow(
            chunk.digest,
            0,
            ChunkFlags.HAS_CRC32 | ChunkFlags(compressed),
            size,
            chunk.size,
            offset,
            extent.uncompressed_offset,
            0,
            extent.first_chunk,
            chunk.crc32,
        )
        self.rows.append(row.pack())

    def _describe_batch(self, extent: PlacedExtent, offset: int) -> None:
        uncompressed_offset, in_batch, batch = extent.uncompressed_offset, 0, len(self._batches)
        for number, chunk in enumerate(extent.chunks, start=extent.first_chunk):
            size = chunk.size
            self._infos += pack_batch_member(offset, uncompressed_offset, size, batch, in_batch)
            self.rows.append(
                ROW.pack(chunk.digest, 0, _BATCH_ROW, 0, size, offset, uncompressed_offset, 0, number, 0)
            )
            uncompressed_offset += round_up(size, BLOCK_SIZE)
            in_batch += size

    def _write(self, data: memoryview) -> None:
        self._hash.update(data)
        self.compressed_size += len(data)
        while data:
            data = data[self._file.write(data) :]
