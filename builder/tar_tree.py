"""The tree that the members of an archive describe, in whatever order they come, in a database on disk."""

import contextlib
import errno
import os
import sqlite3
import stat
import struct
import tarfile
from array import array
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from builder.tar_member import KINDS, read_attributes, read_target, read_xattrs
from rafs.errors import NydusError
from rafs.inode_table import Attributes, InodeTable
from rafs.xattr import pack_xattrs

_ATTRIBUTES = struct.Struct("<HIIQqII")
_IMPLIED = Attributes(stat.S_IFDIR | 0o755)
"""A directory that no member describes."""
_ROOT = 0
_SCHEMA = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA cache_size = -16384;
CREATE TABLE names (
    parent INTEGER, name BLOB, node INTEGER, is_directory INTEGER, PRIMARY KEY (parent, name)
) WITHOUT ROWID;
CREATE TABLE nodes (
    id INTEGER PRIMARY KEY, attributes BLOB, symlink BLOB, xattrs BLOB, first_address INTEGER
);
BEGIN;
"""
_FIND = "SELECT node, is_directory FROM names WHERE parent = ? AND name = ?"
_INSERT = "INSERT OR IGNORE INTO names VALUES (?, ?, ?, ?)"
_REPLACE = "REPLACE INTO names VALUES (?, ?, ?, ?)"
_ADD_NODES = "REPLACE INTO nodes VALUES (?, ?, ?, ?, ?)"
_CHILDREN = """
    SELECT name, node, is_directory, attributes, symlink, xattrs, first_address
    FROM names LEFT JOIN nodes ON id = node WHERE parent = ? ORDER BY name
"""
_BUFFERED_NODES = 1000
_BUFFERED_BYTES = 4 << 20
_CACHED_DIRECTORIES = 4096
_CACHED_PATH_MAX = 4096


class InvalidArchive(NydusError):
    """An archive that cannot be read, or that describes no tree."""

    message = "{archive}: {why}"
    exit_code: ClassVar[int] = 55


class TarTree:
    """Collects members; a later one replaces an earlier one of the same name, as when it is unpacked.

    A context manager: leaving it removes the database. A node is a file under one or more names; its number
    is that of its member from 1 on, and negative for a directory that was implied first. What no name leads
    to any more stays in the database and out of the table. Memory is 4 bytes a member and the page cache.
    """

    def __init__(self, archive: str, path: Path) -> None:
        """`archive` is the name for messages, `path` that of the database."""
        self._archive = archive
        self._path = path
        path.unlink(missing_ok=True)
        self._database = sqlite3.connect(path, isolation_level=None)
        self._root = (_IMPLIED, b"")
        self._directories: dict[bytes, int] = {}
        self._nodes: list[tuple[int, bytes, bytes, bytes, int]] = []
        self._node_bytes = 0
        self._members = 0
        self._implied = 0
        self._rows = array("I")
        self._database.executescript(_SCHEMA)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(sqlite3.Error):  # its content is worth nothing now
            self._database.close()
        self._path.unlink(missing_ok=True)
        if isinstance(error, sqlite3.OperationalError):
            number = errno.ENOSPC if error.sqlite_errorcode == sqlite3.SQLITE_FULL else errno.EIO
            raise OSError(number, os.strerror(number), str(self._path)) from error

    def add(self, member: tarfile.TarInfo, first_address: int = 0) -> None:
        """Adds the next member, whose content begins at that address. Raises `InvalidArchive`."""
        self._members += 1
        parts = self._split(member.name)
        if member.type == tarfile.LNKTYPE:
            self._put(parts, self._link_target(member), is_directory=False)
            return
        if member.type not in KINDS:
            raise InvalidArchive(
                archive=self._archive, why=f"{member.name!r} has unknown type {member.type!r}"
            )
        try:
            attributes = read_attributes(member)
            xattrs = read_xattrs(member) if member.pax_headers else None
            symlink = read_target(member) if member.type == tarfile.SYMTYPE else b""
        except (ValueError, OverflowError) as error:
            raise InvalidArchive(
                archive=self._archive, why=f"{member.name!r} has a broken header ({error})"
            ) from error
        is_directory = member.type == tarfile.DIRTYPE
        packed = pack_xattrs(xattrs, os.fsdecode(b"/" + b"/".join(parts))) if xattrs else b""
        if is_directory and not parts:
            self._root = attributes, packed
            return
        node = self._put(parts, self._members, is_directory)
        self._nodes.append((node, _ATTRIBUTES.pack(*attributes), symlink, packed, first_address))
        self._node_bytes += len(symlink) + len(packed)
        if len(self._nodes) >= _BUFFERED_NODES or self._node_bytes >= _BUFFERED_BYTES:
            self._flush()

    def table(self) -> InodeTable:
        """The tree of all members so far, in the order of a directory scan."""
        self._flush()
        attributes, xattrs = self._root
        table = InodeTable(attributes)
        if xattrs:
            table.xattrs[0] = xattrs
        self._rows = array("I", bytes(4 * (self._members + 1)))
        pending = array("q", (_ROOT, 0))
        while pending:
            row, node = pending.pop(), pending.pop()
            pending.extend(reversed(self._add_children(table, row, node)))
        return table

    def row(self, number: int) -> int:
        """The row that `table` gave the file of a member, counted from 0; 0 when no name leads to it."""
        return self._rows[number + 1]

    def _add_children(self, table: InodeTable, parent: int, node: int) -> "array[int]":
        """Adds the names in a directory; returns row and node of each directory among them."""
        directories = array("q")
        table.begin_children(parent)
        for name, child, is_directory, packed, symlink, xattrs, first_address in self._database.execute(
            _CHILDREN, (node,)
        ):
            attributes = Attributes._make(_ATTRIBUTES.unpack(packed)) if packed else _IMPLIED
            row = table.add_child(parent, name, attributes)
            kind = stat.S_IFMT(attributes.mode)
            if is_directory:
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

    def _split(self, name: str) -> list[bytes]:
        parts = [part for part in os.fsencode(name).split(b"/") if part not in (b"", b".")]
        if b".." in parts:
            raise InvalidArchive(archive=self._archive, why=f"member {name!r} leads out of the tree")
        if "\0" in name:
            raise InvalidArchive(archive=self._archive, why=f"member {name!r} has a NUL byte in its name")
        if any(len(part) > 255 for part in parts):
            raise InvalidArchive(
                archive=self._archive, why=f"member {name!r} has a name of more than 255 bytes"
            )
        return parts

    def _link_target(self, member: tarfile.TarInfo) -> int:
        parent, found = _ROOT, None
        for part in self._split(member.linkname):
            if found is not None and not found[1]:
                found = None
                break
            found = self._find(parent, part)
            if found is None:
                break
            parent = found[0]
        if found is None or found[1]:
            raise InvalidArchive(
                archive=self._archive,
                why=f"{member.name!r} is a hard link to {member.linkname!r}, which is no file",
            )
        return found[0]

    def _put(self, parts: list[bytes], node: int, is_directory: bool) -> int:
        """Gives a node its name, and returns the node: a directory that has it already stays."""
        if not parts:
            raise InvalidArchive(archive=self._archive, why="its root is not a directory")
        parent, name = self._directory(parts[:-1]), parts[-1]
        if self._database.execute(_INSERT, (parent, name, node, is_directory)).rowcount:
            return node
        known, was_directory = self._find(parent, name) or (node, False)
        if is_directory and was_directory:
            return known
        self._database.execute(_REPLACE, (parent, name, node, is_directory))
        if was_directory:
            self._directories.clear()
        return node

    def _directory(self, parts: list[bytes]) -> int:
        """The node of a directory, which is made where it is missing or something else."""
        path = b"/".join(parts)
        node = self._directories.get(path)
        if node is not None:
            return node
        node = _ROOT
        for part in parts:
            found = self._find(node, part)
            if found is None or not found[1]:
                self._implied -= 1
                self._database.execute(_REPLACE, (node, part, self._implied, True))
                node = self._implied
            else:
                node = found[0]
        if len(self._directories) >= _CACHED_DIRECTORIES:
            self._directories.clear()
        if len(path) <= _CACHED_PATH_MAX:
            self._directories[path] = node
        return node

    def _find(self, parent: int, name: bytes) -> tuple[int, bool] | None:
        found: tuple[int, bool] | None = self._database.execute(_FIND, (parent, name)).fetchone()
        return found

    def _flush(self) -> None:
        self._database.executemany(_ADD_NODES, self._nodes)
        self._nodes.clear()
        self._node_bytes = 0
