"""Inodes: 64-byte extended and 32-byte compact records, and how device numbers are folded into them."""

import os
import stat
import struct
from dataclasses import dataclass
from typing import ClassVar, Self

from rafs.record import Buffer, FormatError, expect, take

SLOT_SIZE = 32
"""Inodes lie on 32-byte slots; the nid is the slot's number."""
EXTENDED_SIZE = 64
COMPACT_SIZE = 32

LAYOUT_FLAT_PLAIN = 0
LAYOUT_FLAT_INLINE = 2
LAYOUT_CHUNK_BASED = 4

CHUNK_FORMAT_INDEXES = 0x20
CHUNK_FORMAT_BITS_MASK = 0x1F

# format xattr_icount mode nb size u ino uid gid mtime mtime_ns nlink reserved
EXTENDED = struct.Struct("<HHHHQIIIIqII16s")
# format xattr_icount mode nlink size reserved u ino uid gid reserved
COMPACT = struct.Struct("<HHHHIIIIHHI")
XATTR_HEADER_SIZE = 12

assert EXTENDED.size == EXTENDED_SIZE
assert COMPACT.size == COMPACT_SIZE

FILE_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}
"""Directory entry types of EROFS by the file type bits of `st_mode`."""


@dataclass(frozen=True, slots=True)
class Inode:
    """One inode as read. `offset_bytes` is its place in the bootstrap, `u` the raw union word."""

    nid: int
    offset_bytes: int
    header_size: int
    layout: int
    xattr_size: int
    mode: int
    size: int
    u: int
    ino: int
    uid: int
    gid: int
    mtime_s: int
    mtime_ns: int
    nlink: int

    TYPE_NAME: ClassVar[str] = "inode"

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        """Whether it is a symbolic link."""
        return stat.S_ISLNK(self.mode)

    @property
    def has_xattrs(self) -> bool:
        """Whether extended attributes follow the record."""
        return self.xattr_size > 0

    @property
    def rdev(self) -> int:
        """Device number of a character or block device as `os.makedev` makes it; 0 for other types."""
        if stat.S_ISCHR(self.mode) or stat.S_ISBLK(self.mode):
            return unfold_device(self.u)
        return 0

    @property
    def body_offset(self) -> int:
        """Where an inline tail starts: behind the record and its xattrs."""
        return self.offset_bytes + self.header_size + self.xattr_size

    @property
    def index_offset(self) -> int:
        """Where the chunk index array starts: the next multiple of 8."""
        return (self.body_offset + 7) & ~7

    @classmethod
    def unpack(cls, data: Buffer, offset_bytes: int, nid: int) -> Self:
        """The inode at `offset_bytes`; raises `FormatError` for an unknown form or file type."""
        name = f"inode {nid}"
        first = take(data, offset_bytes, COMPACT_SIZE, name)
        i_format = first[0] | first[1] << 8
        layout = i_format >> 1 & 0x7
        expect(i_format >> 4 == 0, name, offset_bytes, f"a known inode format, found {i_format:#x}")
        if i_format & 1:
            inode = cls._unpack_extended(
                take(data, offset_bytes, EXTENDED_SIZE, name), offset_bytes, nid, layout
            )
        else:
            inode = cls._unpack_compact(first, offset_bytes, nid, layout)
        inode._check(name)
        return inode

    @classmethod
    def _unpack_extended(cls, raw: Buffer, at: int, nid: int, layout: int) -> Self:
        _, icount, mode, _, size, u, ino, uid, gid, mtime, mtime_ns, nlink, _ = EXTENDED.unpack(raw)
        return cls(
            nid,
            at,
            EXTENDED_SIZE,
            layout,
            xattr_size(icount),
            mode,
            size,
            u,
            ino,
            uid,
            gid,
            mtime,
            mtime_ns,
            nlink,
        )

    @classmethod
    def _unpack_compact(cls, raw: Buffer, at: int, nid: int, layout: int) -> Self:
        _, icount, mode, nlink, size, _, u, ino, uid, gid, _ = COMPACT.unpack(raw)
        return cls(
            nid, at, COMPACT_SIZE, layout, xattr_size(icount), mode, size, u, ino, uid, gid, 0, 0, nlink
        )

    def _check(self, name: str) -> None:
        kind = stat.S_IFMT(self.mode)
        expect(
            kind in FILE_TYPES, name, self.offset_bytes + 4, f"a known file type, found mode {self.mode:#o}"
        )
        expect(
            self.mtime_ns < 1_000_000_000,
            name,
            self.offset_bytes + 40,
            f"nanoseconds below 10^9, found {self.mtime_ns}",
        )
        if kind == stat.S_IFREG:
            allowed: tuple[int, ...] = (LAYOUT_CHUNK_BASED,)
        elif kind in (stat.S_IFDIR, stat.S_IFLNK):
            allowed = (LAYOUT_FLAT_PLAIN, LAYOUT_FLAT_INLINE)
        else:
            allowed = (LAYOUT_FLAT_PLAIN, LAYOUT_FLAT_INLINE, LAYOUT_CHUNK_BASED)
        if self.layout not in allowed:
            raise FormatError(name, self.offset_bytes, f"a data layout of {allowed}, found {self.layout}")


def xattr_size(icount: int) -> int:
    """Bytes of inline xattrs by `i_xattr_icount`."""
    return XATTR_HEADER_SIZE + 4 * (icount - 1) if icount else 0


def fold_device(rdev: int) -> int:
    """A device number in the 32-bit form of Linux' new_encode_dev."""
    major, minor = os.major(rdev), os.minor(rdev)
    return (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12


def unfold_device(word: int) -> int:
    """The inverse of `fold_device`."""
    return os.makedev(word >> 8 & 0xFFF, word & 0xFF | word >> 12 & 0xFFF00)
