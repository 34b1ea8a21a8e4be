"""Answers about an image's metadata, ready to be written to /dev/fuse.

Everything is valid for ever: the image never changes, and node ids are inode numbers, which follow from the
image alone. So whichever process answers, the kernel gets the same bytes. Free of state but for a few
directories that are being listed; safe for several threads.
"""

import errno
from collections import OrderedDict

from fuse.devfuse.wire import ATTR, ATTR_HEAD, DIRENT, ENTRY_HEAD, GETXATTR_OUT, STATFS_OUT
from fuse.filesystem import ImageFilesystem
from fuse.inodetable import NSEC, Attributes, Directory
from rafs.inode import fold_device

FOREVER_S = 10 * 365 * 86400
LARGE_FILE_BYTES = 1 << 20
DIRECTORIES_MAX = 32
"""A directory is asked for once more behind its end, and then the kernel keeps it."""
ABSENT = ENTRY_HEAD.pack(0, 0, FOREVER_S, FOREVER_S, 0, 0) + bytes(ATTR.size)
"""The entry of a name that is not there: node 0, for ever."""


class Refused(Exception):
    """The answer is this errno."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Replies:
    """The bodies of answers. Methods raise `Refused`, and `NydusError`s for a broken image."""

    def __init__(self, filesystem: ImageFilesystem) -> None:
        self._filesystem = filesystem
        self._directories: OrderedDict[int, Directory] = OrderedDict()

    def lookup(self, parent: int, name: bytes) -> bytes:
        """fuse_entry_out; of a name that is not there as well."""
        found = self._filesystem.lookup(parent, name)
        return ABSENT if found is None else entry(found)

    def getattr(self, node: int) -> bytes:
        """fuse_attr_out."""
        return ATTR_HEAD.pack(FOREVER_S, 0, 0) + attributes(self._filesystem.attributes(node))

    def readlink(self, node: int) -> bytes:
        """The target."""
        return self._filesystem.readlink(node)

    def readdirplus(self, node: int, place: int, size: int) -> bytes:
        """fuse_direntplus records from `place` on, as many as fit into `size` bytes; b"" behind the last."""
        records: list[bytes] = []
        for name, found, following in self._directory(node).list_from(place):
            length = len(name)
            head = DIRENT.pack(found.ino, following, length, found.mode >> 12)
            record = entry(found) + head + name + bytes(-length % 8)
            size -= len(record)
            if size < 0:
                break
            records.append(record)
        return b"".join(records)

    def getxattr(self, node: int, name: bytes, size: int) -> bytes:
        """The value, or its size when `size` is 0."""
        self._need_xattrs()
        value = self._filesystem.get_xattr(node, name)
        if value is None:
            raise Refused(errno.ENODATA)
        return _sized(value, size)

    def listxattr(self, node: int, size: int) -> bytes:
        """The names, each with a NUL, or their size when `size` is 0."""
        self._need_xattrs()
        names = self._filesystem.list_xattrs(node)
        return _sized(b"".join(name + b"\0" for name in names), size)

    def statfs(self) -> bytes:
        """fuse_statfs_out."""
        size = self._filesystem.size()
        return STATFS_OUT.pack(
            size.blocks,
            0,
            0,
            size.files,
            0,
            size.block_size,
            size.name_max,
            size.block_size,
            *(0,) * 7,
        )

    def _need_xattrs(self) -> None:
        if not self._filesystem.has_xattrs:
            raise Refused(errno.ENOSYS)  # the kernel never asks again

    def _directory(self, node: int) -> Directory:
        known = self._directories.get(node)
        if known is None:
            known = self._directories[node] = self._filesystem.open_directory(node)
            if len(self._directories) > DIRECTORIES_MAX:
                self._directories.popitem(last=False)
        return known


def entry(found: Attributes) -> bytes:
    """fuse_entry_out of an inode."""
    return ENTRY_HEAD.pack(found.ino, 0, FOREVER_S, FOREVER_S, 0, 0) + attributes(found)


def attributes(found: Attributes) -> bytes:
    """fuse_attr of an inode."""
    size = found.size
    seconds, rest = divmod(found.mtime_ns, NSEC)
    seconds &= 0xFFFF_FFFF_FFFF_FFFF  # the kernel takes it for a signed number: before 1970
    # Readers take the block size as their buffer size: a large one pays for large files only.
    block_size = 131072 if size >= LARGE_FILE_BYTES else 4096
    return ATTR.pack(
        found.ino,
        size,
        (size + 511) >> 9,
        seconds,
        seconds,
        seconds,
        rest,
        rest,
        rest,
        found.mode,
        found.nlink,
        found.uid,
        found.gid,
        fold_device(found.rdev) if found.rdev else 0,  # FUSE speaks new_encode_dev() too
        block_size,
        0,
    )


def _sized(value: bytes, size: int) -> bytes:
    if size == 0:
        return GETXATTR_OUT.pack(len(value), 0)
    if len(value) > size:
        raise Refused(errno.ERANGE)
    return value
