"""Device slots and blob table entries: the bytes of the format page, features, flat devices."""

from dataclasses import replace

import pytest

from rafs.blob_table import BlobEntry, BlobFeatures, DeviceSlot, blob_table_offset, map_flat, slot_offset
from rafs.codec import Compressor
from rafs.digest import Digester
from rafs.record import FormatError
from tests.golden import golden

BLOB_ID = "fa2c8cc4f28176bbeed4b736df569a34c79cd3723e9ec42f9674b4d46ac6b8b8"
ENTRY = BlobEntry(
    BLOB_ID,
    0,
    0x100000,
    2,
    Compressor.ZSTD,
    Digester.BLAKE3,
    BlobFeatures.ALIGNED | BlobFeatures.CHUNK_INFO_V2 | BlobFeatures.CAP_TAR_TOC,
    6000,
    20480,
    0,
    Compressor.ZSTD,
    1500,
    40,
    48,
)


def test_entry_is_that_of_the_format_page() -> None:
    assert ENTRY.pack() == golden("blob-entry")
    assert BlobEntry.unpack(golden("blob-entry"), 0, 0) == ENTRY


def test_slot_is_that_of_the_format_page() -> None:
    slot = DeviceSlot(BLOB_ID, 5, 128)
    assert slot.pack() == golden("device-slot")
    assert DeviceSlot.unpack(bytes(1408) + golden("device-slot"), 0) == slot


@pytest.mark.parametrize(
    ("offset", "wrong", "expectation"),
    [
        (0, b"G", "64 hexadecimal"),
        (0, b"\xff", "64 hexadecimal"),
        (64, b"\1", "index 0, found 1"),
        (72, b"\1\0\0\1", "at most 2^24"),
        (76, b"\4", "compression algorithm"),
        (80, b"\2", "digest algorithm"),
        (84, b"\4", "4096-byte boundaries"),
        (85, b"\x10", "known features"),
        (84, b"\x81", "V2 with batch"),
        (87, b"\x80", "no internal feature"),
        (94, b"\xff", "2^40"),
        (96, b"\1", "whole blocks"),
        (103, b"\xff", "2^44"),
        (108, b"\4", "compression algorithm"),
    ],
)
def test_each_wrong_field_is_named(offset: int, wrong: bytes, expectation: str) -> None:
    data = bytearray(ENTRY.pack())
    data[offset : offset + len(wrong)] = wrong
    with pytest.raises(FormatError) as caught:
        BlobEntry.unpack(data, 0, 0)
    assert expectation in caught.value.expectation


def test_a_blob_inside_which_its_bootstrap_is_has_a_placeholder() -> None:
    assert BlobEntry.unpack(replace(ENTRY, blob_id="x" * 64).pack(), 0, 0).blob_id == "x" * 64


@pytest.mark.parametrize(
    ("features", "end"),
    [
        (BlobFeatures.ALIGNED, 6000),
        (BlobFeatures.ALIGNED | BlobFeatures.CAP_TAR_TOC, 1500),
        (BlobFeatures.ALIGNED | BlobFeatures.CAP_TAR_TOC | BlobFeatures.HAS_TAR_HEADER, 988),
        (BlobFeatures.ALIGNED | BlobFeatures.CAP_TAR_TOC | BlobFeatures.SEPARATE, 6000),
    ],
)
def test_where_chunk_data_ends(features: BlobFeatures, end: int) -> None:
    assert replace(ENTRY, features=features).data_end == end


def test_blobs_in_a_flat_device_start_on_half_mebibytes() -> None:
    large = replace(ENTRY, uncompressed_size=(1 << 44) - 4096)
    slots = map_flat(20480, [ENTRY, ENTRY, large, ENTRY])
    assert [slot.mapped_block for slot in slots] == [128, 256, 384, 0]
    assert [slot.blocks for slot in slots] == [5, 5, (1 << 32) - 1, 5]


def test_tables_behind_the_slots() -> None:
    assert slot_offset(0) == 1408
    assert [blob_table_offset(count) for count in (1, 21, 22, 254)] == [4096, 4096, 8192, 36864]
