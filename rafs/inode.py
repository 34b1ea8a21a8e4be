"""Inodes: 64-byte extended and 32-byte compact records, and how device numbers are folded into them."""

import os
import stat
import struct
from dataclasses import dataclass
from typing import ClassVar, Self

from rafs.record import Buffer, FormatError, take

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

_TYPE_MASK = 0o170000
_FLAT = (LAYOUT_FLAT_PLAIN, LAYOUT_FLAT_INLINE)
_ALLOWED_LAYOUTS: dict[int, tuple[int, ...]] = dict.fromkeys(FILE_TYPES, (*_FLAT, LAYOUT_CHUNK_BASED)) | {
    stat.S_IFREG: (LAYOUT_CHUNK_BASED,),
    stat.S_IFDIR: _FLAT,
    stat.S_IFLNK: _FLAT,
}


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
        first = take(data, offset_bytes, COMPACT_SIZE, "inode")
        i_format = first[0] | first[1] << 8
        layout = i_format >> 1 & 0x7
        if i_format >> 4:
            raise FormatError(f"inode {nid}", offset_bytes, f"a known inode format, found {i_format:#x}")
        if i_format & 1:
            inode = cls._unpack_extended(
                take(data, offset_bytes, EXTENDED_SIZE, "inode"), offset_bytes, nid, layout
            )
        else:
            inode = cls._unpack_compact(first, offset_bytes, nid, layout)
        inode._check()
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

    def _check(self) -> None:
        # One for each inode that is read: messages are made only when they are needed.
        allowed = _ALLOWED_LAYOUTS.get(self.mode & _TYPE_MASK)
        if allowed is None:
            expectation = f"a known file type, found mode {self.mode:#o}"
            raise FormatError(f"inode {self.nid}", self.offset_bytes + 4, expectation)
        if self.mtime_ns >= 1_000_000_000:
            expectation = f"nanoseconds below 10^9, found {self.mtime_ns}"
            raise FormatError(f"inode {self.nid}", self.offset_bytes + 40, expectation)
        if self.layout not in allowed:
            expectation = f"a data layout of {allowed}, found {self.layout}"
            raise FormatError(f"inode {self.nid}", self.offset_bytes, expectation)


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
