"""The records of /dev/fuse, and answers of an image, without a kernel."""

import errno
import os
import stat
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fuse.devfuse.open_ledger import SLOTS, LedgerFull, OpenLedger, create_memory
from fuse.devfuse.replies import ABSENT, Refused, Replies
from fuse.devfuse.wire import ATTR, DIRENT, ENTRY_HEAD, Opcode
from fuse.filesystem import WrongFileType
from rafs.inode import unfold_device
from tests.mount_rig import Served, make_store, served
from tests.posix_tree import posix_tree
from tests.rafs_image import directory, file, symlink

HEAD = ENTRY_HEAD.size + ATTR.size


@pytest.fixture
async def image(tmp_path: Path) -> AsyncIterator[Served]:
    names = {b"f%03d" % number: file(b"x" * number) for number in range(300)}
    tree = directory({b"d": directory(names), b"x": file(b"1", {b"user.a": b"value"}), b"l": symlink(b"to")})
    async with served(tmp_path, make_store(tmp_path / "made", tree)) as live:
        yield live


def entries(data: bytes) -> list[tuple[bytes, int, int]]:
    """(name, offset of the next one, inode) of READDIRPLUS."""
    found, at = [], 0
    while at < len(data):
        ino, following, length, _ = DIRENT.unpack_from(data, at + HEAD)
        start = at + HEAD + DIRENT.size
        found.append((data[start : start + length], following, ino))
        at = start + (length + 7) // 8 * 8
    assert at == len(data)
    return found


def test_opcodes_are_those_of_the_kernel() -> None:
    # <linux/fuse.h>, enum fuse_opcode
    assert (Opcode.LOOKUP, Opcode.READ, Opcode.INIT, Opcode.READDIRPLUS) == (1, 15, 26, 44)


async def test_an_entry_says_what_stat_says(image: Served) -> None:
    data = Replies(image.filesystem).lookup(1, b"x")
    node, generation, entry_s, attr_s, *_ = ENTRY_HEAD.unpack_from(data)
    assert node == image.ino(b"/x")
    assert (generation, entry_s == attr_s > 10**8) == (0, True)
    ino, size, blocks, *_, mode, nlink, _, _, rdev, _, _ = ATTR.unpack_from(data, ENTRY_HEAD.size)
    assert (ino, size, blocks, nlink, rdev) == (node, 1, 1, 1, 0)
    assert stat.S_ISREG(mode)


async def test_a_name_that_is_not_there_is_so_for_ever(image: Served) -> None:
    assert Replies(image.filesystem).lookup(1, b"absent") == ABSENT
    assert ENTRY_HEAD.unpack_from(ABSENT)[0] == 0


@pytest.mark.parametrize("size", [400, 4096, 1 << 20])
async def test_a_listing_goes_on_where_it_ended(image: Served, size: int) -> None:
    replies, node = Replies(image.filesystem), image.ino(b"/d")
    names, place = [], 0
    while data := replies.readdirplus(node, place, size):
        assert len(data) <= size
        listed = entries(data)
        names += [name for name, _, _ in listed]
        place = listed[-1][1]
    assert sorted(names) == sorted([b".", b"..", *(b"f%03d" % number for number in range(300))])


async def test_any_process_gives_the_same_bytes(image: Served) -> None:
    first, second = Replies(image.filesystem), Replies(image.filesystem)
    node = image.ino(b"/d")
    half = entries(first.readdirplus(node, 0, 20_000))[-1][1]
    assert first.readdirplus(node, half, 1 << 20) == second.readdirplus(node, half, 1 << 20)


async def test_extended_attributes_and_their_sizes(image: Served) -> None:
    replies, node = Replies(image.filesystem), image.ino(b"/x")
    assert replies.getxattr(node, b"user.a", 100) == b"value"
    assert struct.unpack("=II", replies.getxattr(node, b"user.a", 0)) == (5, 0)
    assert replies.listxattr(node, 100) == b"user.a\0"
    for arguments, number in (((b"user.a", 2), errno.ERANGE), ((b"user.b", 9), errno.ENODATA)):
        with pytest.raises(Refused) as refused:
            replies.getxattr(node, *arguments)
        assert refused.value.number == number


async def test_an_image_without_extended_attributes_is_never_asked_again(tmp_path: Path) -> None:
    async with served(tmp_path, make_store(tmp_path / "made", directory({b"f": file(b"x")}))) as live:
        with pytest.raises(Refused) as refused:
            Replies(live.filesystem).listxattr(live.ino(b"/f"), 0)
        assert refused.value.number == errno.ENOSYS


async def test_links_and_wrong_types(image: Served) -> None:
    replies = Replies(image.filesystem)
    assert replies.readlink(image.ino(b"/l")) == b"to"
    with pytest.raises(WrongFileType):
        replies.readlink(image.ino(b"/x"))
    with pytest.raises(WrongFileType):
        replies.readdirplus(image.ino(b"/x"), 0, 4096)


async def test_device_numbers_are_in_the_kernels_form(tmp_path: Path) -> None:
    tree = posix_tree()
    async with served(tmp_path, make_store(tmp_path / "made", tree)) as live:
        replies = Replies(live.filesystem)
        devices = [inode for _, inode in live.bootstrap.walk() if inode.rdev]
        assert devices
        for inode in devices:
            data = replies.getattr(live.filesystem.inodes.ino_of(inode.nid))
            assert unfold_device(ATTR.unpack_from(data, 16)[-3]) == inode.rdev


def test_the_ledger_outlives_its_process() -> None:
    memory = create_memory()
    ledger = OpenLedger(memory)
    assert ledger.read(7) == (0, 0)
    ledger.write(7, 2, 0)
    ledger.write(9, 0, 33)
    ledger.write(7, 1, 0)
    successor = OpenLedger(memory)
    assert (successor.read(7), successor.read(9)) == ((1, 0), (0, 33))
    os.close(memory)


def test_a_full_ledger_says_so() -> None:
    memory = create_memory()
    ledger = OpenLedger(memory)
    for node in range(1, SLOTS + 1):
        ledger.write(node, 1, 0)
    ledger.write(5, 2, 0)
    with pytest.raises(LedgerFull):
        ledger.write(SLOTS + 1, 1, 0)
    os.close(memory)
