"""A tree that is described path by path, in whatever order, in a database on disk.

As when an archive is unpacked: a later name replaces an earlier one, what is missing on the way is made, and
a symbolic link on the way is followed, without leaving the tree.
"""

import contextlib
import errno
import os
import sqlite3
import stat
import struct
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, NamedTuple, Self

from rafs.errors import NydusError
from rafs.inode_table import Attributes, InodeTable

ROOT = 0
IMPLIED_DIRECTORY = Attributes(stat.S_IFDIR | 0o755)
"""A directory that nothing describes."""
LINKS_MAX = 40
"""Symbolic links that one path may lead through, as in Linux."""
_ATTRIBUTES = struct.Struct("<HIIQqII")
_SCHEMA = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA cache_size = -16384;
CREATE TABLE names (
    parent INTEGER, name BLOB, node INTEGER, kind INTEGER, PRIMARY KEY (parent, name)
) WITHOUT ROWID;
CREATE TABLE nodes (
    id INTEGER PRIMARY KEY, attributes BLOB, symlink BLOB, xattrs BLOB, first_address INTEGER
);
BEGIN;
"""
_FIND = "SELECT node, kind FROM names WHERE parent = ? AND name = ?"
_IN = "SELECT node, kind FROM names WHERE parent = ?"
_INSERT = "INSERT OR IGNORE INTO names VALUES (?, ?, ?, ?)"
_REPLACE = "REPLACE INTO names VALUES (?, ?, ?, ?)"
_REMOVE = "DELETE FROM names WHERE parent = ? AND name = ?"
_EMPTY = "DELETE FROM names WHERE parent = ?"
_ADD_NODES = "REPLACE INTO nodes VALUES (?, ?, ?, ?, ?)"
_LINK_OF = "SELECT symlink FROM nodes WHERE id = ?"
_CHILDREN = """
    SELECT name, node, attributes, symlink, xattrs, first_address
    FROM names LEFT JOIN nodes ON id = node WHERE parent = ? ORDER BY name
"""
_BUFFERED_NODES = 1000
_BUFFERED_BYTES = 4 << 20
_CACHED_DIRECTORIES = 4096
_CACHED_PATH_MAX = 4096

Parts = Sequence[bytes]
"""A path: the names from the root on; empty for the root itself."""


class PathInvalid(NydusError):
    """A path that leads nowhere in the tree."""

    message = "{path}: {why}"
    exit_code: ClassVar[int] = 58


class Found(NamedTuple):
    """What has a name: its node, and its file type as in `st_mode`."""

    node: int
    kind: int


class ChildRow(NamedTuple):
    """A name in a directory and its node as the database has them."""

    name: bytes
    node: int
    attributes: bytes | None
    symlink: bytes
    xattrs: bytes
    first_address: int


class PathTree:
    """Collects names and nodes. A context manager: leaving it removes the database.

    For any thread, one at a time. A node is a file under one or more names. Numbers of nodes from 1 on are
    the caller's, negative ones are directories that were implied. What no name leads to any more stays in
    the database and out of the table. Memory is 4 bytes a node and the page cache.
    """

    def __init__(self, path: Path) -> None:
        """`path` is that of the database. Raises `OSError`, as leaving the context does."""
        self._path = path
        path.unlink(missing_ok=True)
        path.touch()  # SQLite does not say why it cannot
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._root = (IMPLIED_DIRECTORY, b"")
        self._directories: dict[bytes, int] = {}
        self._nodes: list[tuple[int, bytes, bytes, bytes, int]] = []
        self._node_bytes = 0
        self._highest = 0
        self._implied = 0
        self._rows = array("I")
        try:
            self._database.executescript(_SCHEMA)
        except sqlite3.OperationalError as error:
            self._discard()
            raise self._disk_error(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()
        if isinstance(error, sqlite3.OperationalError):
            raise self._disk_error(error) from error

    def _discard(self) -> None:
        with contextlib.suppress(sqlite3.Error):  # its content is worth nothing now
            self._database.close()
        self._path.unlink(missing_ok=True)

    def _disk_error(self, error: sqlite3.OperationalError) -> OSError:
        number = errno.ENOSPC if error.sqlite_errorcode == sqlite3.SQLITE_FULL else errno.EIO
        return OSError(number, os.strerror(number), str(self._path))

    # -- names

    def put(self, parts: Parts, node: int, kind: int) -> int:
        """Gives a node its name, and returns the node: a directory that has the name already stays.

        Raises `PathInvalid` for the root, and for links without end on the way.
        """
        if not parts:
            raise PathInvalid(path="/", why="the root is not a directory")
        parent, name = self.directory(parts[:-1]), parts[-1]
        if self._database.execute(_INSERT, (parent, name, node, kind)).rowcount:
            return node
        known = self.child(parent, name)
        assert known is not None
        if stat.S_ISDIR(kind) and stat.S_ISDIR(known.kind):
            return known.node
        self._database.execute(_REPLACE, (parent, name, node, kind))
        if stat.S_ISDIR(known.kind) or stat.S_ISLNK(known.kind):
            self._directories.clear()
        return node

    def put_child(self, parent: int, name: bytes, node: int, kind: int) -> None:
        """Gives a node a name that is free in a directory."""
        self._database.execute(_INSERT, (parent, name, node, kind))

    def remove(self, parent: int, name: bytes) -> None:
        """Takes a name out of a directory, with everything below it."""
        self._database.execute(_REMOVE, (parent, name))
        self._directories.clear()

    def empty(self, directory: int) -> None:
        """Takes all names out of a directory."""
        self._database.execute(_EMPTY, (directory,))
        self._directories.clear()

    def find(self, parts: Parts) -> Found | None:
        """What is at a path; links on the way are followed, one at its end is not."""
        if not parts:
            return Found(ROOT, stat.S_IFDIR)
        parent = self._walk(parts[:-1])
        return None if parent is None else self.child(parent, parts[-1])

    def find_directory(self, parts: Parts) -> int | None:
        """The node of a directory, links followed, or None."""
        return self._walk(parts)

    def child(self, parent: int, name: bytes) -> Found | None:
        """What has that name in a directory."""
        row = self._database.execute(_FIND, (parent, name)).fetchone()
        return None if row is None else Found(*row)

    def children(self, directory: int) -> list[Found]:
        """What has a name in a directory."""
        return [Found(*row) for row in self._database.execute(_IN, (directory,))]

    def directory(self, parts: Parts) -> int:
        """The node of a directory, which is made where it is missing or something else, but for a link."""
        path = b"/".join(parts)
        node = self._directories.get(path)
        if node is not None:
            return node
        node = self._walk(parts, makes=True, replaces=True)
        assert node is not None
        if len(self._directories) >= _CACHED_DIRECTORIES:
            self._directories.clear()
        if len(path) <= _CACHED_PATH_MAX:
            self._directories[path] = node
        return node

    def directory_if_free(self, parts: Parts) -> int | None:
        """The node of a directory, which is made where nothing is in the way; None where something is."""
        return self._walk(parts, makes=True)

    def _walk(self, parts: Parts, *, makes: bool = False, replaces: bool = False) -> int | None:
        """The directory that a path leads to; None where there is none and none is to be made."""
        trail, links = [ROOT], 0
        pending = list(reversed(parts))
        while pending:
            name = pending.pop()
            if name == b"..":
                if len(trail) > 1:
                    trail.pop()
                continue
            found = self.child(trail[-1], name)
            if found is not None and stat.S_ISLNK(found.kind):
                links += 1
                if links > LINKS_MAX:
                    raise PathInvalid(path=os.fsdecode(name), why="too many symbolic links on the way")
                target = self._link_target(found.node)
                if target.startswith(b"/"):
                    del trail[1:]
                pending.extend(part for part in reversed(target.split(b"/")) if part not in (b"", b"."))
                continue
            if found is not None and stat.S_ISDIR(found.kind):
                trail.append(found.node)
                continue
            if not (makes if found is None else replaces):
                return None
            self._implied -= 1
            self._database.execute(_REPLACE, (trail[-1], name, self._implied, stat.S_IFDIR))
            trail.append(self._implied)
        return trail[-1]

    def _link_target(self, node: int) -> bytes:
        self._flush()
        (target,) = self._database.execute(_LINK_OF, (node,)).fetchone()
        return bytes(target)

    # -- nodes

    def describe(
        self,
        node: int,
        attributes: Attributes,
        *,
        symlink: bytes = b"",
        xattrs: bytes = b"",
        first_address: int = 0,
    ) -> None:
        """Says what a node is; `xattrs` are packed ones, `first_address` the number of its first chunk."""
        if node == ROOT:
            self._root = attributes, xattrs
            return
        self._highest = max(self._highest, node)
        self._nodes.append((node, _ATTRIBUTES.pack(*attributes), symlink, xattrs, first_address))
        self._node_bytes += len(symlink) + len(xattrs)
        if len(self._nodes) >= _BUFFERED_NODES or self._node_bytes >= _BUFFERED_BYTES:
            self._flush()

    @property
    def is_root_implied(self) -> bool:
        """Whether nothing has described the root."""
        return self._root[0] is IMPLIED_DIRECTORY

    def row(self, node: int) -> int:
        """The row that `table` gave a regular file's node; 0 when no name leads to it."""
        return self._rows[node] if node < len(self._rows) else 0

    def table(self) -> InodeTable:
        """The tree so far, in the order of a directory scan."""
        self._flush()
        attributes, xattrs = self._root
        table = InodeTable(attributes)
        if xattrs:
            table.xattrs[0] = xattrs
        self._rows = array("I", bytes(4 * (self._highest + 1)))
        pending = array("q", (ROOT, 0))
        while pending:
            row, node = pending.pop(), pending.pop()
            pending.extend(reversed(self._add_children(table, row, node)))
        return table

    def _add_children(self, table: InodeTable, parent: int, node: int) -> "array[int]":
        """Adds the names in a directory; returns row and node of each directory among them."""
        directories = array("q")
        table.begin_children(parent)
        for name, child, packed, symlink, xattrs, first_address in self._children(node):
            attributes = Attributes._make(_ATTRIBUTES.unpack(packed)) if packed else IMPLIED_DIRECTORY
            row = table.add_child(parent, name, attributes)
            kind = stat.S_IFMT(attributes.mode)
            if kind == stat.S_IFDIR:
                directories.extend((row, child))
            elif kind == stat.S_IFREG:  # nothing else keeps its hard links
                if self._rows[child]:
                    table.link(row, self._rows[child])
                    continue
                self._rows[child] = row
                table.chunk_start[row] = first_address
            elif kind == stat.S_IFLNK:
                table.symlinks[row] = symlink
            if xattrs:
                table.xattrs[row] = xattrs
        return directories

    def _children(self, node: int) -> Iterator[ChildRow]:
        """Rows of `_CHILDREN`, sorted by name; of an implied directory all but name and node are None."""
        return map(ChildRow._make, self._database.execute(_CHILDREN, (node,)))

    def _flush(self) -> None:
        self._database.executemany(_ADD_NODES, self._nodes)
        self._nodes.clear()
        self._node_bytes = 0
