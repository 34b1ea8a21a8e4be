"""The records and numbers of the FUSE protocol that a read-only image needs, from <linux/fuse.h> (7.31 on).

All records are in the byte order of the machine.
"""

import enum
import struct

PROTOCOL_MAJOR = 7
PROTOCOL_MINOR = 41
"""The newest minor version that this code knows the records of."""
PROTOCOL_MINOR_MIN = 31
"""Linux 5.4: FUSE_NO_OPENDIR_SUPPORT, FUSE_CACHE_SYMLINKS and FUSE_MAX_PAGES are there."""

IN_HEADER = struct.Struct("=IIQQIIIHH")
"""fuse_in_header: length, opcode, unique, node, uid, gid, pid, extension length, padding."""
OUT_HEADER = struct.Struct("=IiQ")
"""fuse_out_header: length, negative errno, unique."""
ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
"""fuse_attr: ino, size, blocks, three times, their nanoseconds, mode, nlink, uid, gid, rdev, blksize, 0."""
ENTRY_HEAD = struct.Struct("=QQQQII")
"""fuse_entry_out before its attributes: node, generation, how long entry and attributes are valid."""
ATTR_HEAD = struct.Struct("=QII")
"""fuse_attr_out before the attributes: seconds valid."""
DIRENT = struct.Struct("=QQII")
"""fuse_dirent before the name: inode, offset of the next one, length of the name, type."""
READ_IN = struct.Struct("=QQI")
"""fuse_read_in, also of READDIRPLUS, as far as it is looked at: handle, offset, size."""
OPEN_OUT = struct.Struct("=QIi")
"""fuse_open_out: handle, flags, backing id."""
RELEASE_IN = struct.Struct("=Q")
"""fuse_release_in as far as it is looked at: handle."""
GETXATTR_IN = struct.Struct("=II")
"""fuse_getxattr_in: size of the buffer, 0 to ask for the size."""
GETXATTR_OUT = struct.Struct("=II")
INTERRUPT_IN = struct.Struct("=Q")
"""fuse_interrupt_in: unique of the request that nobody waits for any more."""
STATFS_OUT = struct.Struct("=QQQQQIIIIIIIIII")
"""fuse_kstatfs: blocks, free, available, files, free files, sizes of block, name and fragment, 7 spare."""
INIT_IN = struct.Struct("=IIIII")
"""fuse_init_in as far as it is looked at: major, minor, readahead, flags, flags2."""
INIT_OUT = struct.Struct("=IIIIHHIIHHIIH22s")
"""fuse_init_out: major, minor, readahead, flags, background, congestion, write size, time granularity,
pages, alignment, flags2, stack depth, request timeout, unused."""

assert (IN_HEADER.size, OUT_HEADER.size, ATTR.size, DIRENT.size) == (40, 16, 88, 24)
assert (ENTRY_HEAD.size, ATTR_HEAD.size, OPEN_OUT.size, STATFS_OUT.size) == (40, 16, 16, 80)
assert INIT_OUT.size == 64


class Opcode(enum.IntEnum):
    """What the kernel asks."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    READLINK = 5
    OPEN = 14
    READ = 15
    STATFS = 17
    RELEASE = 18
    GETXATTR = 22
    LISTXATTR = 23
    INIT = 26
    OPENDIR = 27
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    READDIRPLUS = 44


class InitFlags(enum.IntFlag, boundary=enum.KEEP):
    """Flags of INIT; from bit 32 on they stand in flags2."""

    ASYNC_READ = 1 << 0
    EXPORT_SUPPORT = 1 << 4
    DO_READDIRPLUS = 1 << 13
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25
    INIT_EXT = 1 << 30
    PASSTHROUGH = 1 << 37
    HAS_RESEND = 1 << 39


class OpenFlags(enum.IntFlag):
    """Flags of the answer to OPEN."""

    KEEP_CACHE = 1 << 1
    NOFLUSH = 1 << 5
    PASSTHROUGH = 1 << 7


FUSE_DEV_IOC_BACKING_OPEN = 0x4010E501
BACKING_MAP = struct.Struct("=iIQ")
"""fuse_backing_map: descriptor, flags, padding."""

RESENT = 1 << 63
"""In the unique of a request that comes again after FUSE_NOTIFY_RESEND; it must stand in the answer too."""
READ_BUFFER_MIN = 8192
"""FUSE_MIN_READ_BUFFER: the kernel refuses to hand a request to a smaller buffer."""
