"""The tree that a bootstrap is written from: one row per name, in columns, so that millions fit in memory."""

import stat
from array import array
from collections.abc import Iterator
from typing import NamedTuple

from rafs.inode import fold_device, unfold_device


class Attributes(NamedTuple):
    """What an inode says about itself. `rdev` as from `os.makedev`, `size` in bytes.

    A tuple, because one is made for each of a million files.
    """

    mode: int
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime_s: int = 0
    mtime_ns: int = 0
    rdev: int = 0


class InodeTable:
    """Names and inodes of one tree.

    Row 0 is the root. The children of a directory are rows next to each other, added in one go in the order
    of their raw names; a hard link is a row whose `target` is the row of its inode. The order of rows
    is the order of inodes in the bootstrap. About 70 bytes a row beside the name.
    """

    def __init__(self, root: Attributes) -> None:
        self.mode = array("H")
        self.uid = array("I")
        self.gid = array("I")
        self.size = array("Q")
        self.mtime_s = array("q")
        self.mtime_ns = array("I")
        self.device = array("I")
        self.nlink = array("I")
        self.parent = array("I")
        self.target = array("I")
        self.first_child = array("I")
        self.child_count = array("I")
        self.chunk_start = array("Q")
        self.name_start = array("Q", (0,))
        self.names = bytearray()
        self.addresses = array("Q")
        self.symlinks: dict[int, bytes] = {}
        self.xattrs: dict[int, bytes] = {}
        self._append(b"", 0, root)

    def __len__(self) -> int:
        return len(self.mode)

    def name(self, row: int) -> bytes:
        """Name of a row in its directory; b"" for the root."""
        return bytes(self.names[self.name_start[row] : self.name_start[row + 1]])

    def path(self, row: int) -> bytes:
        """Absolute path of a row; the root is b"/"."""
        parts = []
        while row:
            parts.append(self.name(row))
            row = self.parent[row]
        return b"/" + b"/".join(reversed(parts))

    def children(self, row: int) -> range:
        """Rows in a directory, sorted by name."""
        first = self.first_child[row]
        return range(first, first + self.child_count[row])

    def begin_children(self, directory: int) -> None:
        """Opens `directory`: rows added until the next call are its children."""
        self.first_child[directory] = len(self)

    def add_child(self, directory: int, name: bytes, attributes: Attributes) -> int:
        """Adds a name to the directory opened last, and returns its row. Names must come sorted."""
        row = self._append(name, directory, attributes)
        self.child_count[directory] += 1
        if stat.S_ISDIR(attributes.mode):
            self.nlink[directory] += 1
        return row

    def link(self, row: int, target: int) -> None:
        """Makes `row` another name of the inode of row `target`, a regular file."""
        self.target[row] = target
        self.nlink[target] += 1

    def attributes(self, row: int) -> Attributes:
        """What a row was added with."""
        return Attributes(
            self.mode[row],
            self.uid[row],
            self.gid[row],
            self.size[row],
            self.mtime_s[row],
            self.mtime_ns[row],
            unfold_device(self.device[row]),
        )

    def inode_rows(self) -> Iterator[int]:
        """Rows that have an inode of their own, in order."""
        return (row for row, target in enumerate(self.target) if row == target)

    def place_chunks(self, row: int, count: int) -> int:
        """Reserves `count` addresses for a file and returns the number of the first in `addresses`."""
        start = len(self.addresses)
        self.chunk_start[row] = start
        self.addresses.extend(array("Q", bytes(8 * count)))
        return start

    def _append(self, name: bytes, parent: int, attributes: Attributes) -> int:
        row = len(self.mode)
        self.mode.append(attributes.mode)
        self.uid.append(attributes.uid)
        self.gid.append(attributes.gid)
        self.size.append(attributes.size)
        self.mtime_s.append(attributes.mtime_s)
        self.mtime_ns.append(attributes.mtime_ns)
        self.device.append(fold_device(attributes.rdev) if attributes.rdev else 0)
        self.nlink.append(2 if stat.S_ISDIR(attributes.mode) else 1)
        self.parent.append(parent)
        self.target.append(row)
        self.first_child.append(0)
        self.child_count.append(0)
        self.chunk_start.append(0)
        self.names += name
        self.name_start.append(len(self.names))
        return row
