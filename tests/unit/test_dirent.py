"""Directory blocks: the bytes of the format page, and heads that cannot be."""

import pytest

from rafs.dirent import Dirent, pack_directory, search_block, unpack_block
from rafs.record import FormatError
from tests.golden import golden

ENTRIES = [Dirent(b"!", 140, 1), Dirent(b".", 128, 2), Dirent(b"..", 128, 2), Dirent(b"name", 131, 1)]


def test_directory_of_the_format_page() -> None:
    block = golden("directory")
    assert list(unpack_block(block, 0)) == ENTRIES
    names = [entry.name for entry in ENTRIES]
    assert pack_directory(names, [140, 128, 128, 131], [1, 2, 2, 1]) == block
    for entry in ENTRIES:
        assert search_block(block, entry.name, 0) == entry
    for absent in (b"", b" ", b"-", b"...", b"nam", b"name2"):
        assert search_block(block, absent, 0) is None


def test_last_name_ends_at_a_nul() -> None:
    assert list(unpack_block(golden("directory").ljust(4096, b"\0"), 0)) == ENTRIES


@pytest.mark.parametrize("start", [0, 11, 13, 56, 60, 0xFFFF])
def test_impossible_number_of_entries(start: int) -> None:
    block = bytearray(golden("directory"))
    block[8:10] = start.to_bytes(2, "little")
    with pytest.raises(FormatError, match="names behind whole entries"):
        list(unpack_block(block, 0))


@pytest.mark.parametrize("start", [0, 47, 48, 50, 4096])
def test_impossible_start_of_a_name(start: int) -> None:
    block = bytearray(golden("directory"))
    block[20:22] = start.to_bytes(2, "little")
    with pytest.raises(FormatError, match="a name"):
        list(unpack_block(block, 0))


@pytest.mark.parametrize("size", range(12))
def test_block_shorter_than_an_entry(size: int) -> None:
    with pytest.raises(FormatError, match="12-byte entry"):
        list(unpack_block(bytes(size), 0))


def test_name_longer_than_any() -> None:
    block = pack_directory([b"n" * 256], [1], [1])
    with pytest.raises(FormatError, match=r"1\.\.255 bytes"):
        list(unpack_block(block, 0))
