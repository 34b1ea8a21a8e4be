"""fanotify pre-content events (Linux 6.15): the system calls and the records, from <linux/fanotify.h>.

The kernel fails open: when the last descriptor of a group is closed, reads that wait and all later ones go
on, and find holes as zeros. So the supervisor holds the group as well.
"""

import ctypes
import errno
import os
import struct
from typing import NamedTuple

from fuse.supervisor.aftermath import METADATA, RESPONSE

FAN_CLOEXEC = 0x01
FAN_NONBLOCK = 0x02
FAN_CLASS_PRE_CONTENT = 0x08
FAN_UNLIMITED_QUEUE = 0x10
FAN_MARK_ADD = 0x01
FAN_MARK_REMOVE = 0x02
FAN_PRE_ACCESS = 0x0010_0000
FAN_ALLOW = 0x01
FAN_DENY = 0x02
FAN_EVENT_INFO_TYPE_RANGE = 6
AT_FDCWD = -100

RANGE = struct.Struct("=BBHIQQ")
"""struct fanotify_event_info_range: type, padding, length, padding, offset, count."""
EVENT_SIZE = METADATA.size + RANGE.size
"""A read of this many bytes gives one event, so that no more than one can be lost with its reader."""

assert METADATA.size == RANGE.size == 24


class Event(NamedTuple):
    """Somebody wants `size` bytes from `offset` of the file that `descriptor` has open, and waits."""

    mask: int
    descriptor: int
    offset: int
    size: int


def create_group() -> int:
    """A group for pre-content events, non-blocking. Raises `OSError`: EPERM, or EINVAL on older kernels."""
    flags = FAN_CLOEXEC | FAN_NONBLOCK | FAN_CLASS_PRE_CONTENT | FAN_UNLIMITED_QUEUE
    return _checked(_libc().fanotify_init(flags, os.O_RDWR | os.O_LARGEFILE | os.O_CLOEXEC), "fanotify_init")


def add_mark(group: int, descriptor: int) -> None:
    """Watches a file; what is opened later raises events. Raises `OSError`: EOPNOTSUPP on tmpfs, ..."""
    _mark(group, FAN_MARK_ADD, descriptor)


def remove_mark(group: int, descriptor: int) -> None:
    """Watches a file no longer. A file without a mark does not matter."""
    try:
        _mark(group, FAN_MARK_REMOVE, descriptor)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


def unpack_event(data: bytes | memoryview) -> Event:
    """The event that one read of `EVENT_SIZE` bytes gave; one without a range has the size 0."""
    length, _, _, header, mask, descriptor, _ = METADATA.unpack_from(data)
    if length != EVENT_SIZE or data[header] != FAN_EVENT_INFO_TYPE_RANGE:
        return Event(mask, descriptor, 0, 0)
    *_, offset, size = RANGE.unpack_from(data, header)
    return Event(mask, descriptor, offset, size)


def allow(descriptor: int) -> bytes:
    """The answer that lets the reader go on."""
    return RESPONSE.pack(descriptor, FAN_ALLOW)


def deny(descriptor: int, number: int = errno.EIO) -> bytes:
    """The answer that fails the reader with an errno: EIO, EPERM, EBUSY, EAGAIN, ENOSPC or EDQUOT."""
    return RESPONSE.pack(descriptor, FAN_DENY | number << 24)


def _mark(group: int, operation: int, descriptor: int) -> None:
    path = f"/proc/self/fd/{descriptor}".encode()
    result = _libc().fanotify_mark(group, operation, FAN_PRE_ACCESS, AT_FDCWD, path)
    _checked(result, "fanotify_mark")


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    # The mask has 64 bits; without its type it would be cut to an int.
    libc.fanotify_mark.argtypes = (
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_uint64,
        ctypes.c_int,
        ctypes.c_char_p,
    )
    return libc
