"""Inodes of an image as a kernel file system wants them, made fast enough for a listing of a million files.

Inode numbers are nids, which is also what kernel EROFS shows; the root is 1, as FUSE demands. They follow
from the image alone, so they are the same on every mount for ever.
"""

import itertools
import stat
import struct
from collections.abc import Iterator

import msgspec

from rafs.bootstrap import Bootstrap
from rafs.dirent import DIRENT, DIRENT_SIZE, NAME_MAX, count_entries, unpack_block
from rafs.inode import EXTENDED, FILE_TYPES, SLOT_SIZE, Inode, unfold_device

ROOT_INO = 1
LOW_NIDS = 1 << 62
"""Added to nids 0 and 1, which nydus tools never use, because 0 and 1 mean something else to FUSE."""

NSEC = 1_000_000_000
_EXTENDED_FORMATS = frozenset({0x1, 0x5, 0x9})
_KINDS = frozenset(FILE_TYPES)
_BLOCK_SHIFT = 9
"""A directory block has less than 2^9 entries: 4096 / (12 + 1)."""
_DEVICES = frozenset({stat.S_IFCHR, stat.S_IFBLK})


class Attributes(msgspec.Struct, frozen=True, gc=False):
    """What `stat` shows. `size` in bytes, `rdev` as from `os.makedev`.

    A struct of msgspec, because one is made for each of a million files: twice as fast as a named tuple.
    """

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    rdev: int
    mtime_ns: int


class InodeAccess:
    """Inodes and directories of a bootstrap by inode number."""

    def __init__(self, bootstrap: Bootstrap) -> None:
        self.bootstrap = bootstrap
        self._data = bootstrap.data
        self._base = bootstrap.meta_offset
        self._root_nid = bootstrap.root_nid

    def ino_of(self, nid: int) -> int:
        """The inode number of a nid."""
        if nid == self._root_nid:
            return ROOT_INO
        return nid if nid > ROOT_INO else nid + LOW_NIDS

    def nid_of(self, ino: int) -> int:
        """The nid of an inode number."""
        if ino == ROOT_INO:
            return self._root_nid
        return ino if ino < LOW_NIDS else ino - LOW_NIDS

    def inode(self, ino: int) -> Inode:
        """The inode with that number; raises `FormatError` when there is none."""
        return self.bootstrap.inode(self.nid_of(ino))

    def attributes(self, nid: int) -> Attributes:
        """What `stat` shows of a nid; raises `FormatError`.

        One call in C does for nearly all inodes; any doubt is left to the reader in `rafs`.
        """
        try:
            i_format, _, mode, _, size, u, _, uid, gid, mtime, mtime_ns, nlink, _ = EXTENDED.unpack_from(
                self._data, self._base + nid * SLOT_SIZE
            )
        except (struct.error, OverflowError):
            return self._attributes_of(self.bootstrap.inode(nid))
        kind = mode & 0o170000
        if i_format not in _EXTENDED_FORMATS or kind not in _KINDS or mtime_ns >= NSEC:
            return self._attributes_of(self.bootstrap.inode(nid))
        rdev = unfold_device(u) if kind in _DEVICES else 0
        ino = nid if nid > ROOT_INO and nid != self._root_nid else self.ino_of(nid)
        return Attributes(ino, mode, nlink, uid, gid, size, rdev, mtime * NSEC + mtime_ns)

    def _attributes_of(self, inode: Inode) -> Attributes:
        mtime_ns = inode.mtime_s * NSEC + inode.mtime_ns
        return Attributes(
            self.ino_of(inode.nid),
            inode.mode,
            inode.nlink,
            inode.uid,
            inode.gid,
            inode.size,
            inode.rdev,
            mtime_ns,
        )


class Directory:
    """An open directory: its blocks, and listing from any place in it.

    The place behind an entry is a number that depends on nothing but the image: the entry's block and its
    number in the block, plus 1. So a listing can go on anywhere, as `seekdir` demands, without state.
    """

    def __init__(self, inodes: InodeAccess, inode: Inode) -> None:
        self._inodes = inodes
        self._blocks = list(inodes.bootstrap.data_blocks(inode))
        # A listing is asked for again where the last reply ended, if only to hear that there is no more.
        self._latest: tuple[int, list[tuple[bytes, int]]] = (-1, [])

    def list_from(self, place: int) -> Iterator[tuple[bytes, Attributes, int]]:
        """(name, attributes, place behind it) from `place` (0: the start) on, "." and ".." among them."""
        attributes = self._inodes.attributes
        first_block, skip = place >> _BLOCK_SHIFT, place & ((1 << _BLOCK_SHIFT) - 1)
        for number in range(first_block, len(self._blocks)):
            base = (number << _BLOCK_SHIFT) + 1
            names = self._names(number)
            for index, (name, nid) in enumerate(names[skip:], skip):
                yield name, attributes(nid), base + index
            skip = 0

    def _names(self, number: int) -> list[tuple[bytes, int]]:
        if self._latest[0] != number:
            self._latest = (number, _names(*self._blocks[number]))
        return self._latest[1]


def _names(block: memoryview, offset_bytes: int) -> list[tuple[bytes, int]]:
    """(name, nid) of a directory block; any doubt is left to the reader in `rafs`."""
    heads_end = count_entries(block, offset_bytes) * DIRENT_SIZE
    raw = bytes(block)
    heads = list(DIRENT.iter_unpack(raw[:heads_end]))
    start = heads_end
    found = []
    for (nid, offset, _, _), following in itertools.pairwise(heads):
        end = following[1]
        if offset != start or not start < end <= start + NAME_MAX:
            return _names_checked(block, offset_bytes)
        found.append((raw[start:end], nid))
        start = end
    nid, offset, _, _ = heads[-1]
    last = raw[start:].split(b"\0", 1)[0]
    if offset != start or not 1 <= len(last) <= NAME_MAX:
        return _names_checked(block, offset_bytes)
    found.append((last, nid))
    return found


def _names_checked(block: memoryview, offset_bytes: int) -> list[tuple[bytes, int]]:
    return [(entry.name, entry.nid) for entry in unpack_block(block, offset_bytes)]
