"""Chunk addresses and rows: the bytes of the format page, and digests by chunk number."""

import hashlib
from array import array

import pytest

from rafs.chunk import (
    ADDRESS,
    BlobRenumbering,
    ChunkDigests,
    ChunkFlags,
    ChunkRef,
    ChunkRow,
    address_parts,
    address_word,
    pack_address,
)
from rafs.record import FormatError
from tests.golden import golden

ROW = ChunkRow(
    hashlib.sha256(b"chunk").digest(),
    1,
    ChunkFlags.COMPRESSED | ChunkFlags.HAS_CRC32,
    1000,
    5000,
    4096,
    8192,
    0,
    3,
    0xDEADBEEF,
)


def test_address_of_the_format_page() -> None:
    ref = ChunkRef(1, 0x123456, 7 * 4096)
    assert ref.pack() == golden("chunk-address")
    assert ChunkRef.unpack(golden("chunk-address"), 0) == ref


def test_a_hole_is_refused() -> None:
    with pytest.raises(FormatError, match="a hole"):
        ChunkRef.unpack(b"\xff\xff\0\0\xff\xff\xff\xff", 0)


def test_row_of_the_format_page() -> None:
    assert ROW.pack() == golden("chunk-row")
    assert ChunkRow.unpack(golden("chunk-row"), 0) == ROW


@pytest.mark.parametrize("offsets", [array("q", (-1, -1, -1, 0)), {3: 0}])
def test_digests_by_chunk_number(offsets: "array[int] | dict[int, int]") -> None:
    digests = ChunkDigests(ROW.pack(), offsets, 4)
    assert len(digests) == 4
    assert digests[3] == digests.find(3) == ROW.digest
    assert digests.row(3) == ROW
    for absent in (0, 4, -1, 1 << 40):
        assert digests.find(absent) is None
        with pytest.raises(FormatError, match="a row for chunk"):
            digests[absent]
        with pytest.raises(FormatError, match="a row for chunk"):
            digests.row(absent)


@pytest.mark.parametrize("chunk", [0, 0xFFFF, 0x1_0000, 0x12_3456, 0xFF_FFFF])
@pytest.mark.parametrize("blob", [0, 1, 253])
@pytest.mark.parametrize("block", [0, 7, 0xFFFF_FFFF])
def test_an_address_is_a_number_too(blob: int, chunk: int, block: int) -> None:
    word = address_word(blob, chunk, block)
    assert word.to_bytes(8, "little") == pack_address(blob, chunk, block)
    fields = chunk & 0xFFFF, blob + 1 | chunk >> 16 << 8, block
    assert ADDRESS.unpack(pack_address(blob, chunk, block)) == fields
    assert (address_parts(word), word >> 32) == ((blob, chunk), block)
    for new in (0, blob, 100):
        assert BlobRenumbering({blob: new}).apply(word) == address_word(new, chunk, block)
    with pytest.raises(KeyError):
        BlobRenumbering({blob + 1: 0}).apply(word)
