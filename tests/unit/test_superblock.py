"""Superblocks: the bytes of the format page, and each promise that a reader insists on."""

import struct

import pytest

from rafs.record import FormatError
from rafs.superblock import ExtendedSuperblock, RafsFlags, Superblock
from tests.golden import golden

SUPERBLOCK = Superblock(9, 5, 2, 1)
EXTENDED = ExtendedSuperblock(
    RafsFlags.COMPRESSION_ZSTD
    | RafsFlags.HASH_BLAKE3
    | RafsFlags.EXPLICIT_UID_GID
    | RafsFlags.HAS_XATTR
    | RafsFlags.ENCRYPTION_NONE,
    blob_table_offset=4096,
    blob_table_size=256,
    chunk_size=0x100000,
    chunk_table_offset=16384,
    chunk_table_size=160,
    prefetch_table_offset=4352,
    prefetch_table_size=4,
)


def whole_file() -> bytearray:
    return bytearray(1024) + SUPERBLOCK.pack() + EXTENDED.pack() + bytes(20480 - 1408)


def test_superblock_is_that_of_the_format_page() -> None:
    assert SUPERBLOCK.pack() == golden("superblock")
    assert Superblock.unpack(bytes(1024) + golden("superblock") + bytes(20480)) == SUPERBLOCK


def test_extension_is_that_of_the_format_page() -> None:
    assert EXTENDED.pack() == golden("extension")
    assert ExtendedSuperblock.unpack(whole_file()) == EXTENDED


@pytest.mark.parametrize(
    ("offset", "wrong", "expectation"),
    [
        (0, b"\0", "magic"),
        (4, b"\1", "checksum 0"),
        (11, b"\0", "RAFS v6 bit"),
        (12, b"\x09", "2^12"),
        (13, b"\1", "no extension slots"),
        (16, bytes(8), "at least one inode"),
        (40, b"\xff", "inside the file"),
        (44, b"\1", "no shared xattrs"),
        (80, b"\x0e", "features 0xc"),
        (84, b"\1", "no compressed inodes"),
        (86, b"\xff", "fewer than 255"),
        (88, b"\x09", "11 x 128"),
    ],
)
def test_each_wrong_field_of_a_superblock_is_named(offset: int, wrong: bytes, expectation: str) -> None:
    data = whole_file()
    data[1024 + offset : 1024 + offset + len(wrong)] = wrong
    with pytest.raises(FormatError) as caught:
        Superblock.unpack(data)
    assert expectation in caught.value.expectation
    assert 1024 <= caught.value.offset_bytes < 1152


@pytest.mark.parametrize(
    ("offset", "wrong", "expectation"),
    [
        (0, struct.pack("<Q", 0x84 | 0x1), "one compression"),
        (0, struct.pack("<Q", 0x04), "one compression"),
        (0, struct.pack("<Q", 0x8C), "one digest"),
        (0, struct.pack("<Q", 0x80), "one digest"),
        (8, struct.pack("<Q", 4097), "4096-byte boundary"),
        (8, struct.pack("<Q", 0), "behind the superblocks"),
        (16, struct.pack("<I", 255), "whole 256-byte"),
        (20, struct.pack("<I", 0x800), "power of two"),
        (20, struct.pack("<I", 0x3000), "power of two"),
        (20, struct.pack("<I", 0x2000000), "power of two"),
        (20, struct.pack("<I", 0), "power of two"),
        (24, struct.pack("<Q", 4096), "tables apart"),
        (24, struct.pack("<Q", 1 << 63), "inside"),
        (32, struct.pack("<Q", 81), "whole 80-byte"),
        (32, struct.pack("<Q", 80 << 50), "inside"),
        (48, struct.pack("<I", 6), "whole 4-byte"),
    ],
)
def test_each_wrong_field_of_the_extension_is_named(offset: int, wrong: bytes, expectation: str) -> None:
    data = whole_file()
    data[1152 + offset : 1152 + offset + len(wrong)] = wrong
    with pytest.raises(FormatError) as caught:
        ExtendedSuperblock.unpack(data)
    assert expectation in caught.value.expectation
    assert 1152 <= caught.value.offset_bytes < 1408


def test_prefetch_size_without_offset_is_read_over() -> None:
    data = whole_file()
    struct.pack_into("<QI", data, 1152 + 40, 0, 400)
    assert ExtendedSuperblock.unpack(data).prefetch_table_size == 400


def test_unknown_flags_are_kept() -> None:
    data = whole_file()
    data[1152 + 3] |= 0x80
    assert int(ExtendedSuperblock.unpack(data).flags) & 0x8000_0000
