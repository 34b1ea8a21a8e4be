"""The EROFS superblock (offset 1024) and the RAFS extension behind it (offset 1152)."""

import enum
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Self

from rafs.codec import Compressor
from rafs.digest import Digester
from rafs.record import BLOCK_SIZE, Buffer, expect, take

EROFS_MAGIC = 0xE0F5E1E2
COMPAT_RAFS_V6 = 0x4000_0000
INCOMPAT_CHUNKED_FILE = 0x4
INCOMPAT_DEVICE_TABLE = 0x8
INCOMPAT_REQUIRED = INCOMPAT_CHUNKED_FILE | INCOMPAT_DEVICE_TABLE
DEVICE_SLOT_INDEX = 11
"""Device slots start at 11 x 128 = 1408, right behind both superblocks."""
ROOT_NID = 128
BLOCK_SIZE_BITS = 12
CHUNK_SIZE_MIN = 0x1000
CHUNK_SIZE_MAX = 0x100_0000


class RafsFlags(enum.IntFlag, boundary=enum.KEEP):
    """`s_flags` of the extension. Unknown bits are kept, as readers of later images have to."""

    COMPRESSION_NONE = 0x1
    COMPRESSION_LZ4 = 0x2
    HASH_BLAKE3 = 0x4
    HASH_SHA256 = 0x8
    EXPLICIT_UID_GID = 0x10
    HAS_XATTR = 0x20
    COMPRESSION_GZIP = 0x40
    COMPRESSION_ZSTD = 0x80
    INLINED_CHUNK_DIGEST = 0x100
    TARFS_MODE = 0x200
    ENCRYPTION_NONE = 0x100_0000
    ENCRYPTION_AES_128_XTS = 0x200_0000


COMPRESSION_FLAGS = {
    Compressor.NONE: RafsFlags.COMPRESSION_NONE,
    Compressor.LZ4_BLOCK: RafsFlags.COMPRESSION_LZ4,
    Compressor.GZIP: RafsFlags.COMPRESSION_GZIP,
    Compressor.ZSTD: RafsFlags.COMPRESSION_ZSTD,
}
DIGEST_FLAGS = {Digester.BLAKE3: RafsFlags.HASH_BLAKE3, Digester.SHA256: RafsFlags.HASH_SHA256}


@dataclass(frozen=True, slots=True)
class Superblock:
    """The fields of the EROFS superblock that RAFS v6 uses; all others are zero in it."""

    inode_count: int
    blocks: int
    meta_block: int
    device_count: int
    root_nid: int = ROOT_NID
    feature_compat: int = COMPAT_RAFS_V6
    feature_incompat: int = INCOMPAT_REQUIRED

    OFFSET: ClassVar[int] = 1024
    SIZE: ClassVar[int] = 128
    # magic checksum compat blkszbits extslots root_nid inos epoch nsec blocks meta_blk xattr_blk
    # uuid volume incompat compr_algs extra_devices devt_slotoff reserved
    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<IIIBBHQQIIII16s16sIHHH38s")

    def pack(self) -> bytes:
        """The 128 bytes at offset 1024."""
        return self.LAYOUT.pack(
            EROFS_MAGIC,
            0,
            self.feature_compat,
            BLOCK_SIZE_BITS,
            0,
            self.root_nid,
            self.inode_count,
            0,
            0,
            self.blocks,
            self.meta_block,
            0,
            bytes(16),
            bytes(16),
            self.feature_incompat,
            0,
            self.device_count,
            DEVICE_SLOT_INDEX,
            bytes(38),
        )

    @classmethod
    def unpack(cls, data: Buffer) -> Self:
        """Reads the superblock out of a whole bootstrap; raises `FormatError` unless it is RAFS v6."""
        name, at = "EROFS superblock", cls.OFFSET
        fields = cls.LAYOUT.unpack(take(data, at, cls.SIZE, name))
        magic, checksum, compat, block_bits, slots, root_nid, inos, _, _, blocks, meta_block, xattr_block = (
            fields[:12]
        )
        incompat, compression, devices, slot_index = fields[14:18]
        expect(
            magic == EROFS_MAGIC,
            name,
            at,
            f"magic {EROFS_MAGIC:#x}, found {magic:#x}: not a RAFS v6 bootstrap",
        )
        expect(
            bool(compat & COMPAT_RAFS_V6),
            name,
            at + 8,
            f"the RAFS v6 bit {COMPAT_RAFS_V6:#x}: a plain EROFS image",
        )
        expect(checksum == 0, name, at + 4, f"checksum 0, found {checksum:#x}")
        expect(block_bits == BLOCK_SIZE_BITS, name, at + 12, f"blocks of 2^12 bytes, found 2^{block_bits}")
        expect(slots == 0, name, at + 13, f"no extension slots, found {slots}")
        expect(inos > 0, name, at + 16, "at least one inode")
        expect(xattr_block == 0, name, at + 44, f"no shared xattrs, found them at block {xattr_block}")
        expect(
            incompat == INCOMPAT_REQUIRED,
            name,
            at + 80,
            f"features {INCOMPAT_REQUIRED:#x}, found {incompat:#x}",
        )
        expect(compression == 0, name, at + 84, f"no compressed inodes, found algorithms {compression:#x}")
        expect(
            slot_index == DEVICE_SLOT_INDEX,
            name,
            at + 88,
            f"device slots at 11 x 128, found {slot_index} x 128",
        )
        expect(devices < 255, name, at + 86, f"fewer than 255 devices, found {devices}")
        expect(
            meta_block * BLOCK_SIZE < max(len(data), 1),
            name,
            at + 40,
            f"metadata inside the file, found block {meta_block}",
        )
        return cls(inos, blocks, meta_block, devices, root_nid, compat, incompat)


@dataclass(frozen=True, slots=True)
class ExtendedSuperblock:
    """Where the RAFS tables lie. Offsets and sizes in bytes."""

    flags: RafsFlags
    blob_table_offset: int
    blob_table_size: int
    chunk_size: int
    chunk_table_offset: int
    chunk_table_size: int
    prefetch_table_offset: int
    prefetch_table_size: int

    OFFSET: ClassVar[int] = 1152
    SIZE: ClassVar[int] = 256
    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<QQIIQQQII200s")

    def pack(self) -> bytes:
        """The 256 bytes at offset 1152."""
        return self.LAYOUT.pack(
            self.flags,
            self.blob_table_offset,
            self.blob_table_size,
            self.chunk_size,
            self.chunk_table_offset,
            self.chunk_table_size,
            self.prefetch_table_offset,
            self.prefetch_table_size,
            0,
            bytes(200),
        )

    @classmethod
    def unpack(cls, data: Buffer) -> Self:
        """Reads the extension out of a whole bootstrap; raises `FormatError` for impossible tables."""
        name, at = "RAFS superblock", cls.OFFSET
        flags, *places = cls.LAYOUT.unpack(take(data, at, cls.SIZE, name))[:8]
        extended = cls(RafsFlags(flags), *places)
        extended._check_algorithms(name, at)
        extended._check_chunk_size(name, at)
        extended._check_tables(name, at, len(data))
        return extended

    @property
    def digester(self) -> Digester:
        """The algorithm of chunk digests."""
        return Digester.BLAKE3 if self.flags & RafsFlags.HASH_BLAKE3 else Digester.SHA256

    def _check_algorithms(self, name: str, at: int) -> None:
        compressions = sum(bool(self.flags & flag) for flag in COMPRESSION_FLAGS.values())
        digests = sum(bool(self.flags & flag) for flag in DIGEST_FLAGS.values())
        expect(compressions == 1, name, at, f"exactly one compression flag, found flags {int(self.flags):#x}")
        expect(digests == 1, name, at, f"exactly one digest flag, found flags {int(self.flags):#x}")

    def _check_chunk_size(self, name: str, at: int) -> None:
        size = self.chunk_size
        power_of_two = size & (size - 1) == 0
        expect(
            power_of_two and CHUNK_SIZE_MIN <= size <= CHUNK_SIZE_MAX,
            name,
            at + 20,
            f"a chunk size that is a power of two from 4096 to 16777216, found {size}",
        )

    def _check_tables(self, name: str, at: int, total: int) -> None:
        tables = (
            ("blob table", at + 8, self.blob_table_offset, self.blob_table_size, 256, BLOCK_SIZE),
            ("chunk table", at + 24, self.chunk_table_offset, self.chunk_table_size, 80, BLOCK_SIZE),
            ("prefetch table", at + 40, self.prefetch_table_offset, self.prefetch_table_size, 4, 1),
        )
        spans = []
        for table, field_at, offset, size, entry, alignment in tables:
            expect(
                size % entry == 0,
                name,
                field_at,
                f"a {table} of whole {entry}-byte entries, found {size} bytes",
            )
            if size == 0 or (table == "prefetch table" and offset == 0):
                continue  # images of 2022 carry a prefetch size without an offset
            expect(
                offset % alignment == 0,
                name,
                field_at,
                f"a {table} on a {alignment}-byte boundary, found {offset}",
            )
            expect(
                offset + size <= total,
                name,
                field_at,
                f"a {table} inside {total} bytes, found {offset}+{size}",
            )
            expect(
                offset >= at + self.SIZE, name, field_at, f"a {table} behind the superblocks, found {offset}"
            )
            spans.append((offset, offset + size, table, field_at))
        spans.sort()
        for (_, end, before, _), (start, _, after, field_at) in pairwise(spans):
            expect(end <= start, name, field_at, f"tables apart, found {after} inside {before}")


assert Superblock.LAYOUT.size == Superblock.SIZE
assert ExtendedSuperblock.LAYOUT.size == ExtendedSuperblock.SIZE
