"""Chunks in a bootstrap: the 8-byte addresses behind an inode, and the 80-byte rows of the chunk table."""

import enum
import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from rafs.record import BLOCK_SIZE, Buffer, expect, take

ADDRESS = struct.Struct("<HHI")
ADDRESS_SIZE = 8
ROW = struct.Struct("<32sIIIIQQQII")
ROW_SIZE = 80

assert ADDRESS.size == ADDRESS_SIZE
assert ROW.size == ROW_SIZE


class ChunkFlags(enum.IntFlag, boundary=enum.KEEP):
    """Flags of a chunk table row."""

    COMPRESSED = 0x1
    HOLE = 0x2
    ENCRYPTED = 0x4
    BATCH = 0x8
    HAS_CRC32 = 0x10


@dataclass(frozen=True, slots=True)
class ChunkRef:
    """Where one chunk of a file lies: its number in a blob and its byte offset in the decoded blob."""

    blob_index: int
    chunk_index: int
    uncompressed_offset: int

    def pack(self) -> bytes:
        """The 8-byte address."""
        return pack_address(self.blob_index, self.chunk_index, self.uncompressed_offset // BLOCK_SIZE)

    @classmethod
    def unpack(cls, data: Buffer, offset_bytes: int) -> Self:
        """The address at `offset_bytes`; raises `FormatError` for a hole, which RAFS v6 does not have."""
        low, device, block = ADDRESS.unpack(take(data, offset_bytes, ADDRESS_SIZE, "chunk address"))
        expect(device & 0xFF != 0, "chunk address", offset_bytes + 2, "a blob, found device 0 (a hole)")
        return cls((device & 0xFF) - 1, low | (device >> 8) << 16, block * BLOCK_SIZE)


def pack_address(blob_index: int, chunk_index: int, block: int) -> bytes:
    """The 8-byte address: the low 16 bits of the chunk number, blob + 1 and the high 8 bits, the block."""
    return address_word(blob_index, chunk_index, block).to_bytes(ADDRESS_SIZE, "little")


def address_word(blob_index: int, chunk_index: int, block: int) -> int:
    """The address as the number that its bytes are."""
    return chunk_index & 0xFFFF | blob_index + 1 << 16 | chunk_index >> 16 << 24 | block << 32


def address_parts(word: int) -> tuple[int, int]:
    """Blob and chunk number of an address."""
    return (word >> 16 & 0xFF) - 1, word & 0xFFFF | (word >> 24 & 0xFF) << 16


class BlobRenumbering:
    """What addresses become when their blobs get other indexes."""

    def __init__(self, new_index: Mapping[int, int]) -> None:
        """`new_index` by the old one."""
        self._shifts = {old + 1: new - old << 16 for old, new in new_index.items()}

    def apply(self, word: int) -> int:
        """The address in the new numbering; raises `KeyError` for a blob that is not in it."""
        return word + self._shifts[word >> 16 & 0xFF]


def row_order(row: bytes) -> tuple[bytes, int]:
    """Sort key of packed rows in a chunk table: the digest, then the blob."""
    return row[:32], row[32]


def at_blob(row: bytes, blob_index: int) -> bytes:
    """A packed row in an image where its blob has another index."""
    return row[:32] + blob_index.to_bytes(4, "little") + row[36:]


def lower_addresses(addresses: "array[int]") -> None:
    """Makes packed addresses count their blobs from one lower, in place: blob 0 turned out to be empty."""
    for position, address in enumerate(addresses):
        addresses[position] = address - (1 << 16)


def lower_rows(rows: bytes) -> bytes:
    """The same for packed rows, joined."""
    lowered = bytearray(rows)
    lowered[32::ROW_SIZE] = bytes(index - 1 for index in rows[32::ROW_SIZE])
    return bytes(lowered)


@dataclass(frozen=True, slots=True)
class ChunkRow:
    """A row of the chunk table. Sizes and offsets in bytes; `index` counts the chunks of the blob from 0."""

    digest: bytes
    blob_index: int
    flags: ChunkFlags
    compressed_size: int
    uncompressed_size: int
    compressed_offset: int
    uncompressed_offset: int
    file_offset: int
    index: int
    crc32: int

    SIZE: ClassVar[int] = ROW_SIZE

    def pack(self) -> bytes:
        """The 80 bytes of the row."""
        return ROW.pack(
            self.digest,
            self.blob_index,
            self.flags,
            self.compressed_size,
            self.uncompressed_size,
            self.compressed_offset,
            self.uncompressed_offset,
            self.file_offset,
            self.index,
            self.crc32,
        )

    @classmethod
    def unpack(cls, data: Buffer, offset_bytes: int) -> Self:
        """The row at `offset_bytes`."""
        fields = ROW.unpack(take(data, offset_bytes, ROW_SIZE, "chunk table row"))
        return cls(bytes(fields[0]), fields[1], ChunkFlags(fields[2]), *fields[3:])


class ChunkDigests(Sequence[bytes]):
    """Digests of one blob's chunks by chunk number, found through an index over the chunk table.

    The table is sorted by digest, so the index is made by one scan; 8 bytes of memory per chunk.
    """

    def __init__(self, table: Buffer, offsets: "array[int] | dict[int, int]", count: int) -> None:
        """`offsets` are those of the rows in `table`: an array with -1 for no row, or a sparse mapping."""
        self._table = table
        self._offsets = offsets
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]
        """32 bytes; raises `FormatError` when the table has no row for that chunk."""
        offset = self._require(index)
        return bytes(self._table[offset : offset + 32])

    def find(self, index: int) -> bytes | None:
        """32 bytes, or None for a chunk that the table does not have: one that no file uses."""
        offset = self._offset(index)
        return None if offset < 0 else bytes(self._table[offset : offset + 32])

    def row(self, index: int) -> ChunkRow:
        """The whole row of chunk `index`; raises `FormatError` when there is none."""
        return ChunkRow.unpack(self._table, self._require(index))

    def _offset(self, index: int) -> int:
        if not 0 <= index < self._count:
            return -1
        return self._offsets.get(index, -1) if isinstance(self._offsets, dict) else self._offsets[index]

    def _require(self, index: int) -> int:
        offset = self._offset(index)
        expect(offset >= 0, "chunk table", 0, f"a row for chunk {index}")
        return offset
