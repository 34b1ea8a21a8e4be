"""Device slots, which EROFS reads, and the blob table, which RAFS reads: one entry of each per blob."""

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from rafs.codec import Compressor
from rafs.digest import Digester
from rafs.record import BLOCK_SIZE, Buffer, FormatError, decode_hex_id, expect, round_up, take
from rafs.superblock import DEVICE_SLOT_INDEX

BLOBS_MAX = 254
"""The blob index in a chunk address is one byte, and 0 stands for the bootstrap itself."""
CHUNKS_PER_BLOB_MAX = (1 << 24) - 2
ENCODED_SIZE_MAX = 1 << 40
DECODED_SIZE_MAX = (1 << 44) - BLOCK_SIZE
"""A device slot counts blocks in 32 bits."""
FLAT_DEVICE_ALIGNMENT = 0x80000
"""Where blobs may start when bootstrap and decoded blobs are joined in one file ("flatdev")."""


class BlobFeatures(enum.IntFlag, boundary=enum.KEEP):
    """Features of a blob. An unknown low bit (of 16) makes the blob unreadable; high ones are hints."""

    ALIGNED = 0x1
    INLINED_FS_META = 0x2
    CHUNK_INFO_V2 = 0x4
    ZRAN = 0x8
    SEPARATE = 0x10
    INLINED_CHUNK_DIGEST = 0x20
    TARFS = 0x40
    BATCH = 0x80
    ENCRYPTED = 0x100
    IS_CHUNKDICT_GENERATED = 0x200
    SEPARATED_WITH_PREFETCH_FILES = 0x400
    EXTERNAL = 0x800
    HAS_TAR_HEADER = 0x1000_0000
    HAS_TOC = 0x2000_0000
    CAP_TAR_TOC = 0x4000_0000


KNOWN_INCOMPAT_FEATURES = 0x0FFF
INCOMPAT_MASK = 0xFFFF


def check_features(features: BlobFeatures, record: str, offset_bytes: int) -> None:
    """Raises `FormatError` for features that this reader does not know or that exclude each other."""
    unknown = features & INCOMPAT_MASK & ~KNOWN_INCOMPAT_FEATURES
    expect(not unknown, record, offset_bytes, f"known features only, found {int(features):#x}")
    expect(
        not features & 0x8000_0000, record, offset_bytes, f"no internal feature bit, found {int(features):#x}"
    )
    needs_v2 = features & (BlobFeatures.BATCH | BlobFeatures.ZRAN | BlobFeatures.ENCRYPTED)
    expect(
        not needs_v2 or bool(features & BlobFeatures.CHUNK_INFO_V2),
        record,
        offset_bytes,
        f"chunk info V2 with batch, zran or encryption, found {int(features):#x}",
    )


@dataclass(frozen=True, slots=True)
class DeviceSlot:
    """One external device of the EROFS image: the decoded bytes of one blob. Positions in blocks of 4096."""

    blob_id: str
    blocks: int
    mapped_block: int

    SIZE: ClassVar[int] = 128
    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<64sII56s")

    def pack(self) -> bytes:
        """The 128 bytes of the slot."""
        return self.LAYOUT.pack(self.blob_id.encode(), self.blocks, self.mapped_block, bytes(56))

    @classmethod
    def unpack(cls, data: Buffer, index: int) -> Self:
        """Slot `index` of a whole bootstrap."""
        name, at = f"device slot {index}", slot_offset(index)
        tag, blocks, mapped, _ = cls.LAYOUT.unpack(take(data, at, cls.SIZE, name))
        expect(blocks > 0, name, at + 64, "a device with at least one block")
        return cls(decode_hex_id(tag, name, at), blocks, mapped)


@dataclass(frozen=True, slots=True)
class BlobEntry:
    """What a bootstrap knows of one blob. Sizes and offsets in bytes."""

    blob_id: str
    index: int
    chunk_size: int
    chunk_count: int
    compressor: Compressor
    digester: Digester
    features: BlobFeatures
    compressed_size: int
    uncompressed_size: int
    toc_size: int
    ci_compressor: Compressor
    ci_offset: int
    ci_compressed_size: int
    ci_uncompressed_size: int
    toc_digest: bytes = bytes(32)
    meta_digest: bytes = bytes(32)
    meta_size: int = 0
    cipher_iv: int = 0
    cipher: int = 0

    SIZE: ClassVar[int] = 256
    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<64sIIIIIIQQIIQQQ32s32sQQI36s")

    @property
    def data_end(self) -> int:
        """Where the encoded chunk data ends in the blob."""
        if self.features & BlobFeatures.SEPARATE or not self.features & BlobFeatures.CAP_TAR_TOC:
            return self.compressed_size
        return self.ci_offset - (0x200 if self.features & BlobFeatures.HAS_TAR_HEADER else 0)

    def at_index(self, index: int) -> Self:
        """The same blob in an image where it has another index."""
        return replace(self, index=index)

    def pack(self) -> bytes:
        """The 256 bytes of the entry."""
        return self.LAYOUT.pack(
            self.blob_id.encode(),
            self.index,
            self.chunk_size,
            self.chunk_count,
            self.compressor,
            self.digester,
            self.features,
            self.compressed_size,
            self.uncompressed_size,
            self.toc_size,
            self.ci_compressor,
            self.ci_offset,
            self.ci_compressed_size,
            self.ci_uncompressed_size,
            self.toc_digest,
            self.meta_digest,
            self.meta_size,
            self.cipher_iv,
            self.cipher,
            bytes(36),
        )

    @classmethod
    def unpack(cls, data: Buffer, offset_bytes: int, index: int) -> Self:
        """Entry `index`, which stands at `offset_bytes`; raises `FormatError` for what cannot be true."""
        name = f"blob table entry {index}"
        fields = cls.LAYOUT.unpack(take(data, offset_bytes, cls.SIZE, name))
        blob_id = decode_hex_id(fields[0], name, offset_bytes)
        stored_index, chunk_size, chunk_count = fields[1:4]
        expect(stored_index == index, name, offset_bytes + 64, f"index {index}, found {stored_index}")
        features = BlobFeatures(fields[6])
        check_features(features, name, offset_bytes + 84)
        entry = cls(
            blob_id,
            index,
            chunk_size,
            chunk_count,
            _compressor(fields[4], name, offset_bytes + 76),
            _digester(fields[5], name, offset_bytes + 80),
            features,
            fields[7],
            fields[8],
            fields[9],
            _compressor(fields[10], name, offset_bytes + 108),
            fields[11],
            fields[12],
            fields[13],
            fields[14],
            fields[15],
            fields[16],
            fields[17],
            fields[18],
        )
        entry._check_sizes(name, offset_bytes)
        return entry

    def _check_sizes(self, name: str, at: int) -> None:
        expect(self.chunk_count <= 1 << 24, name, at + 72, f"at most 2^24 chunks, found {self.chunk_count}")
        expect(
            self.compressed_size <= ENCODED_SIZE_MAX,
            name,
            at + 88,
            f"at most 2^40 bytes, found {self.compressed_size}",
        )
        expect(
            self.uncompressed_size <= DECODED_SIZE_MAX,
            name,
            at + 96,
            f"less than 2^44 bytes, found {self.uncompressed_size}",
        )
        aligned = bool(self.features & BlobFeatures.ALIGNED)
        expect(
            aligned or bool(self.features & BlobFeatures.TARFS),
            name,
            at + 84,
            "decoded chunks on 4096-byte boundaries",
        )
        expect(
            not aligned or self.uncompressed_size % BLOCK_SIZE == 0,
            name,
            at + 96,
            f"a decoded size of whole blocks, found {self.uncompressed_size}",
        )


def _compressor(value: int, name: str, at: int) -> Compressor:
    if value not in Compressor.__members__.values():
        raise FormatError(name, at, f"a known compression algorithm (0..3), found {value}")
    return Compressor(value)


def _digester(value: int, name: str, at: int) -> Digester:
    if value not in Digester.__members__.values():
        raise FormatError(name, at, f"a known digest algorithm (0..1), found {value}")
    return Digester(value)


def slot_offset(index: int) -> int:
    """Where device slot `index` stands in a bootstrap."""
    return (DEVICE_SLOT_INDEX + index) * DeviceSlot.SIZE


def blob_table_offset(blob_count: int) -> int:
    """Where the blob table starts: the first block boundary behind the device slots."""
    return round_up(slot_offset(blob_count), BLOCK_SIZE)


def map_flat(bootstrap_size: int, blobs: Sequence[BlobEntry]) -> list[DeviceSlot]:
    """Slots of `blobs` as they would follow a bootstrap of that many bytes in one flat device."""
    slots, position = [], bootstrap_size
    for blob in blobs:
        position = round_up(position, FLAT_DEVICE_ALIGNMENT)
        # The field has 32 bits; a flat device past 16 TiB cannot be addressed, plain devices can.
        mapped = position // BLOCK_SIZE if position // BLOCK_SIZE < 1 << 32 else 0
        slots.append(DeviceSlot(blob.blob_id, blob.uncompressed_size // BLOCK_SIZE, mapped))
        position += blob.uncompressed_size
    return slots


assert DeviceSlot.LAYOUT.size == DeviceSlot.SIZE
assert BlobEntry.LAYOUT.size == BlobEntry.SIZE
