"""blob.meta: where each chunk lies in the encoded blob and in the decoded one."""

import enum
import mmap
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from rafs.blob_table import BlobFeatures, check_features
from rafs.codec import Compressor
from rafs.record import BLOCK_SIZE, Buffer, FormatError, expect, round_up, take
from rafs.superblock import CHUNK_SIZE_MAX
from rafs.zran import ZRAN_CONTEXT, ZranContext

MAGIC = 0xB10BB10B
HEADER_SIZE = 4096
V1 = struct.Struct("<QQ")
V2 = struct.Struct("<QQQ")
BATCH_CONTEXT = struct.Struct("<II32s")

assert V1.size == 16
assert V2.size == 24
assert BATCH_CONTEXT.size == 40


class ChunkInfoFlags(enum.IntFlag, boundary=enum.KEEP):
    """Flags of a V2 chunk info."""

    COMPRESSED = 0x1
    ZRAN = 0x2
    BATCH = 0x4
    ENCRYPTED = 0x8
    HAS_CRC32 = 0x10


# Plain integers: a build packs one info a chunk, a read unpacks it, and the enum's operators are slow.
_COMPRESSED = int(ChunkInfoFlags.COMPRESSED)
_BATCH = int(ChunkInfoFlags.BATCH)
_HAS_CRC32 = int(ChunkInfoFlags.HAS_CRC32)
_ZRAN = int(ChunkInfoFlags.ZRAN)
_BATCH_MEMBER = int(ChunkInfoFlags.COMPRESSED | ChunkInfoFlags.BATCH) << 56


def pack_batch_member(
    compressed_offset: int,
    uncompressed_offset: int,
    uncompressed_size: int,
    batch_index: int,
    offset_in_batch: int,
) -> bytes:
    """The 24-byte form of a chunk that is encoded together with others. Offsets and sizes in bytes."""
    return V2.pack(
        uncompressed_offset // BLOCK_SIZE | (uncompressed_size - 1) << 32 | _BATCH_MEMBER,
        compressed_offset,
        batch_index << 32 | offset_in_batch,
    )


@dataclass(frozen=True, slots=True)
class ChunkInfo:
    """One chunk: bytes `compressed_*` of the blob become bytes `uncompressed_*` of the decoded file.

    `compressed_size` of a batch chunk is 0: its extent says how much to read. `crc32c` is of decoded bytes.
    A chunk in a gzip stream (`is_zran`) shares its extent as one of a batch does: `batch_index` is then the
    number of its context and `offset_in_batch` its place in what the context gives.
    """

    compressed_offset: int
    compressed_size: int
    uncompressed_offset: int
    uncompressed_size: int
    is_compressed: bool
    is_batch: bool = False
    batch_index: int = 0
    offset_in_batch: int = 0
    crc32c: int | None = None
    is_zran: bool = False

    @property
    def is_shared(self) -> bool:
        """Whether other chunks may lie in the same extent."""
        return self.is_batch or self.is_zran

    def pack_v1(self) -> bytes:
        """The 16-byte form, which knows neither batches nor checksums."""
        usize, csize = self.uncompressed_size - 1, self.compressed_size - 1
        u = (usize & 0xFFFFF) << 44 | (usize >> 20) << 8 | self.uncompressed_offset
        c = (csize & 0xFFFFF) << 44 | (csize >> 20) << 40 | self.compressed_offset
        return V1.pack(u, c)

    def pack_v2(self) -> bytes:
        """The 24-byte form."""
        if self.is_batch:
            return pack_batch_member(
                self.compressed_offset,
                self.uncompressed_offset,
                self.uncompressed_size,
                self.batch_index,
                self.offset_in_batch,
            )
        flags, extra = _COMPRESSED if self.is_compressed else 0, 0
        if self.is_zran:
            flags, extra = flags | _ZRAN, self.batch_index << 32 | self.offset_in_batch
        elif self.crc32c is not None:
            flags, extra = flags | _HAS_CRC32, self.crc32c
        u = self.uncompressed_offset // BLOCK_SIZE | (self.uncompressed_size - 1) << 32 | flags << 56
        return V2.pack(u, self.compressed_offset | self.compressed_size << 40, extra)

    @classmethod
    def unpack_v1(cls, raw: Buffer) -> Self:
        """Reads the 16-byte form; a chunk is compressed when its two sizes differ."""
        u, c = V1.unpack(raw)
        usize = (u >> 44 | (u >> 8 & 0xF) << 20) + 1
        csize = (c >> 44 | (c >> 40 & 0xF) << 20) + 1
        return cls(c & 0xFF_FFFF_FFFF, csize, u & 0xFFF_FFFF_F000, usize, csize != usize)

    @classmethod
    def unpack_v2(cls, raw: Buffer) -> Self:
        """Reads the 24-byte form."""
        u, c, extra = V2.unpack(raw)
        flags = u >> 56
        is_batch = bool(flags & _BATCH)
        is_zran = bool(flags & _ZRAN) and not is_batch
        is_shared = is_batch or is_zran
        return cls(
            c & 0xFF_FFFF_FFFF,
            c >> 40,
            (u & 0xFFFF_FFFF) * BLOCK_SIZE,
            (u >> 32 & 0xFF_FFFF) + 1,
            bool(flags & _COMPRESSED),
            is_batch,
            extra >> 32 if is_shared else 0,
            extra & 0xFFFF_FFFF if is_shared else 0,
            extra & 0xFFFF_FFFF if flags & _HAS_CRC32 and not is_shared else None,
            is_zran,
        )


@dataclass(frozen=True, slots=True)
class Extent:
    """The run of a blob's bytes that is decoded as one unit: a chunk, a batch of them, a gzip context."""

    compressed_offset: int
    compressed_size: int
    uncompressed_size: int
    is_compressed: bool


@dataclass(frozen=True, slots=True)
class BatchContext:
    """Sizes of one batch, encoded and decoded, in bytes."""

    compressed_size: int
    uncompressed_size: int

    def pack(self) -> bytes:
        """The 40 bytes."""
        return BATCH_CONTEXT.pack(self.compressed_size, self.uncompressed_size, bytes(32))

    @classmethod
    def unpack(cls, raw: Buffer) -> Self:
        """Reads the 40 bytes."""
        return cls(*BATCH_CONTEXT.unpack(raw)[:2])


@dataclass(frozen=True, slots=True)
class BlobMetaHeader:
    """The 4096 bytes behind the chunk info array. Offsets and sizes in bytes."""

    features: BlobFeatures
    ci_compressor: int
    ci_entries: int
    ci_offset: int
    ci_compressed_size: int
    ci_uncompressed_size: int
    context_offset: int = 0
    context_size: int = 0
    context_count: int = 0

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<IIIIQQQQQI4032sI")

    def pack(self) -> bytes:
        """The 4096 bytes."""
        return self.LAYOUT.pack(
            MAGIC,
            self.features,
            self.ci_compressor,
            self.ci_entries,
            self.ci_offset,
            self.ci_compressed_size,
            self.ci_uncompressed_size,
            self.context_offset,
            self.context_size,
            self.context_count,
            bytes(4032),
            MAGIC,
        )

    @classmethod
    def unpack(cls, raw: Buffer, offset_bytes: int) -> Self:
        """Reads the header, which stands at `offset_bytes`; raises `FormatError` when it cannot be one."""
        name = "blob.meta header"
        magic, features, *fields = cls.LAYOUT.unpack(take(raw, 0, HEADER_SIZE, name))
        end_magic = fields.pop()
        fields.pop()
        expect(magic == MAGIC, name, offset_bytes, f"magic {MAGIC:#x}, found {magic:#x}")
        expect(end_magic == MAGIC, name, offset_bytes + 4092, f"magic {MAGIC:#x}, found {end_magic:#x}")
        header = cls(BlobFeatures(features), *fields)
        check_features(header.features, name, offset_bytes + 4)
        expect(
            header.ci_compressor in Compressor.__members__.values(),
            name,
            offset_bytes + 8,
            "a known algorithm",
        )
        contexts = header.context_size
        expected = header.ci_entries * header.entry_size + contexts
        expect(
            header.ci_uncompressed_size == expected,
            name,
            offset_bytes + 32,
            f"{expected} bytes for {header.ci_entries} chunks, found {header.ci_uncompressed_size}",
        )
        expect(
            contexts == 0 or header.context_offset == header.ci_entries * header.entry_size,
            name,
            offset_bytes + 40,
            f"contexts behind the array, found them at {header.context_offset}",
        )
        expect(
            header.context_count * BATCH_CONTEXT.size <= contexts,
            name,
            offset_bytes + 56,
            f"contexts inside {contexts} bytes, found {header.context_count}",
        )
        return header

    @property
    def entry_size(self) -> int:
        """Bytes of one chunk info."""
        return V2.size if self.features & BlobFeatures.CHUNK_INFO_V2 else V1.size


assert BlobMetaHeader.LAYOUT.size == HEADER_SIZE


class BlobMeta:
    """Read access to a node-side blob.meta file: the array, padded to 4096 bytes, and the header."""

    def __init__(self, data: Buffer | mmap.mmap, name: str = "blob.meta") -> None:
        """Raises `FormatError` when `data` is not a blob.meta."""
        self.name = name
        self._mapping = data if isinstance(data, mmap.mmap) else None
        self._data = memoryview(data)
        at = len(data) - HEADER_SIZE
        self.header = BlobMetaHeader.unpack(take(self._data, at, HEADER_SIZE, "blob.meta header"), at)
        expected = round_up(self.header.ci_uncompressed_size, BLOCK_SIZE)
        expect(at == expected, "blob.meta", 0, f"{expected} bytes before the header, found {at}")
        self.count = self.header.ci_entries
        self._entry_size = self.header.entry_size
        self._unpack = ChunkInfo.unpack_v2 if self._entry_size == V2.size else ChunkInfo.unpack_v1

    @classmethod
    def open(cls, path: Path) -> Self:
        """Maps the file at `path`."""
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            expect(size >= HEADER_SIZE, "blob.meta", 0, f"at least {HEADER_SIZE} bytes, found {size}")
            return cls(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), path.name)

    def close(self) -> None:
        """Unmaps the file."""
        self._data.release()
        if self._mapping is not None:
            self._mapping.close()

    def chunk(self, index: int) -> ChunkInfo:
        """Chunk `index` of the blob; raises `FormatError` for one that is not there."""
        expect(0 <= index < self.count, "blob.meta", 0, f"a chunk below {self.count}, asked for {index}")
        at = index * self._entry_size
        return self._unpack(self._data[at : at + self._entry_size])

    def start_blocks(self) -> Iterable[int]:
        """Where each chunk starts in the decoded file, in blocks of 4096 bytes, by chunk number."""
        size = self.count * self._entry_size
        if self._entry_size == V2.size:  # the low 32 bits of an entry; six words each
            return self._data[:size].cast("I")[:: V2.size // 4]
        return (u >> 12 & 0xFFFF_FFFF for u in self._data[:size].cast("Q")[:: V1.size // 8])

    def entry_words(self) -> memoryview | None:
        """The 24-byte entries as three words of 64 bits each, for who looks at all; None for 16-byte ones."""
        return self._data[: self.count * V2.size].cast("Q") if self._entry_size == V2.size else None

    def batch_context(self, index: int) -> BatchContext:
        """Sizes of batch `index`."""
        return BatchContext.unpack(self._context(index))

    def contexts(self) -> Buffer:
        """The bytes of all contexts, and of what belongs to them behind the last one."""
        at = self.header.context_offset
        return self._data[at : at + self.header.context_size]

    def zran_context(self, index: int) -> ZranContext:
        """Gzip restart point `index`."""
        return ZranContext.unpack(self._context(index))

    def zran_dictionary(self, context: ZranContext) -> bytes:
        """The window that inflating at `context` starts with."""
        base = self.header.context_offset + self.header.context_count * ZRAN_CONTEXT.size
        at = base + context.dict_offset
        end = self.header.context_offset + self.header.context_size
        expect(at + context.dict_size <= end, "zran context", at, f"a dictionary before byte {end}")
        return bytes(self._data[at : at + context.dict_size])

    def extent(self, index: int) -> Extent:
        """The unit of decoding that holds chunk `index`."""
        return self.extent_of(self.chunk(index))

    def extent_of(self, chunk: ChunkInfo) -> Extent:
        """The unit of decoding that holds `chunk`; raises `FormatError` for an impossible one."""
        if chunk.is_shared and chunk.is_zran != bool(self.header.features & BlobFeatures.ZRAN):
            raise FormatError("chunk info", 0, "gzip contexts in a blob that has them, and batches in others")
        if chunk.is_zran:
            context = self.zran_context(chunk.batch_index)
            context.check(self.header.context_offset + chunk.batch_index * ZRAN_CONTEXT.size)
            return Extent(context.in_offset, context.in_len, context.out_len, is_compressed=True)
        if not chunk.is_batch:
            return Extent(
                chunk.compressed_offset, chunk.compressed_size, chunk.uncompressed_size, chunk.is_compressed
            )
        batch = self.batch_context(chunk.batch_index)
        if not 0 < batch.compressed_size <= batch.uncompressed_size <= CHUNK_SIZE_MAX:
            raise FormatError(
                "batch context",
                self.header.context_offset + chunk.batch_index * BATCH_CONTEXT.size,
                f"1 to {CHUNK_SIZE_MAX} bytes, not more encoded than decoded, "
                f"found {batch.compressed_size} for {batch.uncompressed_size}",
            )
        return Extent(
            chunk.compressed_offset,
            batch.compressed_size,
            batch.uncompressed_size,
            batch.compressed_size != batch.uncompressed_size,
        )

    def batch_range(self, index: int) -> range:
        """Numbers of the chunks that share an extent with chunk `index`, itself included.

        Chunks of a batch or of a gzip context are neighbours, in the order in which the builder filled it.
        """
        chunk = self.chunk(index)
        if not chunk.is_shared:
            return range(index, index + 1)
        first = last = index
        while first > 0 and self._in_batch(first - 1, chunk):
            first -= 1
        while last + 1 < self.count and self._in_batch(last + 1, chunk):
            last += 1
        return range(first, last + 1)

    def _in_batch(self, index: int, member: ChunkInfo) -> bool:
        chunk = self.chunk(index)
        return (chunk.is_batch, chunk.is_zran, chunk.batch_index) == (
            member.is_batch,
            member.is_zran,
            member.batch_index,
        )

    def _context(self, index: int) -> Buffer:
        if index >= self.header.context_count:
            raise FormatError(
                "blob.meta", 0, f"a context below {self.header.context_count}, asked for {index}"
            )
        at = self.header.context_offset + index * BATCH_CONTEXT.size
        return self._data[at : at + BATCH_CONTEXT.size]


def pack_array(chunks: Iterable[ChunkInfo], batches: Sequence[BatchContext] = ()) -> bytes:
    """The uncompressed array of V2 chunk infos with the batch contexts behind it."""
    return b"".join([*(c.pack_v2() for c in chunks), *(b.pack() for b in batches)])


def node_form(array: Buffer, header: BlobMetaHeader) -> bytes:
    """The node-side file: the uncompressed array padded to 4096 bytes, and the header."""
    return bytes(array) + bytes(-len(array) % BLOCK_SIZE) + header.pack()
