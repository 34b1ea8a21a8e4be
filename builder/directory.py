"""A directory tree as a source: names sorted, every directory's children next to each other."""

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from builder.worker import SourceChanged, SourceUnreadable, read_xattrs
from rafs.inode_table import Attributes, InodeTable
from rafs.xattr import pack_xattrs


class FileStamp(NamedTuple):
    """A regular file that was found: where its content will come from, and how to tell that it changed."""

    row: int
    path: bytes
    size: int
    mtime_ns: int
    ctime_ns: int
    sparse: bool


@dataclass(slots=True)
class DirectorySource:
    """Scans `root` into an inode table. Mount points below it are entered like any directory.

    A generator does the scan, so that the content of what was found is read while the rest is still looked
    for. Names and links are taken as they are; nothing is followed, the root itself excepted.
    """

    root: Path

    def begin(self) -> InodeTable:
        """A table with the root only. Raises `SourceUnreadable` when the root is no readable directory."""
        try:
            status = os.stat(self.root)
        except OSError as error:
            raise _unreadable(os.fsencode(self.root), error) from error
        if not stat.S_ISDIR(status.st_mode):
            raise SourceUnreadable(path=self.root, why="not a directory")
        return InodeTable(_attributes(status))

    def scan(self, table: InodeTable) -> Iterator[FileStamp]:
        """Fills `table` and yields each regular file once, directories in pre-order, names in byte order."""
        links: dict[tuple[int, int], int] = {}
        pending = [(0, os.fsencode(self.root))]
        while pending:
            row, path = pending.pop()
            self._add_xattrs(table, row, path)
            names = self._names(path)
            table.begin_children(row)
            directories = []
            prefix = path if path.endswith(b"/") else path + b"/"
            for name in names:
                child_path = prefix + name
                status = self._status(child_path)
                attributes = _attributes(status)
                child = table.add_child(row, name, attributes)
                kind = stat.S_IFMT(status.st_mode)
                if kind == stat.S_IFDIR:
                    directories.append((child, child_path))
                elif kind == stat.S_IFREG:
                    stamp = self._regular(table, child, child_path, status, links)
                    if stamp is not None:
                        yield stamp
                else:
                    self._special(table, child, child_path, kind)
            directories.reverse()
            pending += directories

    def stamps(self, table: InodeTable, rows: Iterable[int]) -> Iterator[FileStamp]:
        """Stamps of regular files that were scanned, in another order; raises `SourceChanged` for one that
        changed.
        """
        root = os.fsencode(self.root)
        for row in rows:
            path = root + table.path(row)
            try:
                status = os.lstat(path)
            except OSError as error:
                raise _unreadable(path, error) from error
            if _attributes(status) != table.attributes(row):
                raise SourceChanged(path=os.fsdecode(path))
            yield _stamp(row, path, status)

    @staticmethod
    def _regular(
        table: InodeTable,
        row: int,
        path: bytes,
        status: os.stat_result,
        links: dict[tuple[int, int], int],
    ) -> FileStamp | None:
        if status.st_nlink > 1:
            first = links.setdefault((status.st_dev, status.st_ino), row)
            if first != row:
                table.link(row, first)
                return None
        return _stamp(row, path, status)

    def _special(self, table: InodeTable, row: int, path: bytes, kind: int) -> None:
        self._add_xattrs(table, row, path)
        if kind == stat.S_IFLNK:
            try:
                table.symlinks[row] = os.readlink(path)
            except OSError as error:
                raise _unreadable(path, error) from error

    @staticmethod
    def _add_xattrs(table: InodeTable, row: int, path: bytes) -> None:
        try:
            found = read_xattrs(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        if found:
            table.xattrs[row] = pack_xattrs(found, os.fsdecode(path))

    @staticmethod
    def _names(path: bytes) -> list[bytes]:
        """Names only: what is known of a whole directory at once, and it may have a million entries."""
        try:
            return sorted(os.listdir(path))
        except OSError as error:
            raise _unreadable(path, error) from error

    @staticmethod
    def _status(path: bytes) -> os.stat_result:
        try:
            return os.lstat(path)
        except OSError as error:
            raise _unreadable(path, error) from error


def _stamp(row: int, path: bytes, status: os.stat_result) -> FileStamp:
    sparse = status.st_blocks * 512 < status.st_size
    return FileStamp(row, path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, sparse)


def _attributes(status: os.stat_result) -> Attributes:
    seconds, nanoseconds = divmod(status.st_mtime_ns, 1_000_000_000)
    kind = stat.S_IFMT(status.st_mode)
    return Attributes(
        status.st_mode,
        status.st_uid,
        status.st_gid,
        status.st_size if kind == stat.S_IFREG else 0,
        seconds,
        nanoseconds,
        status.st_rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0,
    )


def _unreadable(path: bytes, error: OSError) -> SourceUnreadable:
    where = os.fsencode(error.filename) if isinstance(error.filename, str | bytes) else path
    return SourceUnreadable(path=os.fsdecode(where), why=error.strerror or str(error))
