"""Inodes: the bytes of the format page, both forms, device numbers."""

import os
import stat

import pytest

from rafs.chunk import ChunkRef
from rafs.inode import Inode, fold_device, unfold_device, xattr_size
from rafs.record import FormatError
from tests.golden import golden


def test_file_of_the_format_page() -> None:
    data = golden("inode-file")
    inode = Inode.unpack(data, 0, 128)
    assert inode.is_file
    assert (inode.mode, inode.size, inode.nlink) == (0o104755, 5000, 2)
    assert (inode.uid, inode.gid, inode.ino) == (70000, 1000, 2)
    assert (inode.mtime_s, inode.mtime_ns) == (-1, 500)
    assert (inode.u, inode.rdev, inode.has_xattrs) == (0x28, 0, False)
    assert ChunkRef.unpack(data, inode.index_offset) == ChunkRef(0, 1, 3 * 4096)


def test_compact_file_of_the_format_page() -> None:
    inode = Inode.unpack(golden("inode-compact"), 0, 1)
    assert (inode.mode, inode.size, inode.nlink, inode.ino) == (0o100644, 0, 1, 7)
    assert inode.header_size == 32
    assert (inode.mtime_s, inode.mtime_ns) == (0, 0)


def test_device_of_the_format_page() -> None:
    inode = Inode.unpack(golden("inode-device"), 0, 1)
    assert stat.S_ISCHR(inode.mode)
    assert inode.rdev == os.makedev(259, 70000)


@pytest.mark.parametrize(
    ("major", "minor"), [(0, 0), (1, 3), (255, 255), (4095, 0), (0, 256), (259, 70_000), (4095, 0xFFFFF)]
)
def test_device_numbers_fold_both_ways(major: int, minor: int) -> None:
    assert unfold_device(fold_device(os.makedev(major, minor))) == os.makedev(major, minor)


@pytest.mark.parametrize(
    ("offset", "wrong", "expectation"),
    [
        (0, b"\x11", "known inode format"),
        (1, b"\1", "known inode format"),
        (0, b"\1", "data layout"),
        (0, b"\3", "data layout"),
        (5, b"\x31", "known file type"),
        (5, b"\x41", "data layout"),
        (43, b"\xff", "nanoseconds"),
    ],
)
def test_each_wrong_field_is_named(offset: int, wrong: bytes, expectation: str) -> None:
    data = bytearray(golden("inode-file"))
    data[offset : offset + len(wrong)] = wrong
    with pytest.raises(FormatError) as caught:
        Inode.unpack(data, 0, 128)
    assert expectation in caught.value.expectation


def test_sizes_of_xattrs_by_their_count() -> None:
    assert [xattr_size(count) for count in (0, 1, 2, 65535)] == [0, 12, 16, 262148]
