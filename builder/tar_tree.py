"""The tree that the members of an archive describe, in whatever order they come."""

import base64
import os
import re
import stat
import tarfile
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from builder.tar_acl import acl_xattrs
from rafs.errors import NydusError
from rafs.inode_table import Attributes, InodeTable
from rafs.xattr import is_storable, pack_xattrs

_KINDS = {
    tarfile.REGTYPE: stat.S_IFREG,
    tarfile.AREGTYPE: stat.S_IFREG,
    tarfile.CONTTYPE: stat.S_IFREG,
    tarfile.GNUTYPE_SPARSE: stat.S_IFREG,
    tarfile.LNKTYPE: stat.S_IFREG,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}
_PAX_XATTR = "SCHILY.xattr."
"""In these names GNU tar writes `=` as `%3D` and `%` as `%25`; others leave both out."""
_LIBARCHIVE_XATTR = "LIBARCHIVE.xattr."
_DECIMAL = re.compile(r"-?(\d+\.?\d*|\.\d+)", re.ASCII)
_SYMLINK_MAX = 4095


class InvalidArchive(NydusError):
    """An archive that cannot be read, or that describes no tree."""

    message = "{archive}: {why}"
    exit_code: ClassVar[int] = 55


@dataclass(slots=True)
class TarNode:
    """A file of the archive under one or more names. `first_address` counts in addresses."""

    attributes: Attributes
    symlink: bytes = b""
    xattrs: dict[bytes, bytes] | None = None
    children: dict[bytes, "TarNode"] | None = None
    first_address: int = 0
    row: int = -1


class TarTree:
    """Collects members; a later one replaces an earlier one of the same name, as when it is unpacked."""

    def __init__(self, archive: str) -> None:
        """`archive` is the name for messages."""
        self._archive = archive
        self.root = _new_directory()

    def add(self, member: tarfile.TarInfo) -> TarNode:
        """Adds a member; returns the node that its content belongs to. Raises `InvalidArchive`."""
        parts = self._split(member.name)
        if member.type == tarfile.LNKTYPE:
            target = self._find(self._split(member.linkname))
            if target is None or target.children is not None:
                raise InvalidArchive(
                    archive=self._archive,
                    why=f"{member.name!r} is a hard link to {member.linkname!r}, which is no file",
                )
            self._insert(parts, target)
            return target
        try:
            node = self._node(member)
        except (ValueError, OverflowError) as error:
            raise InvalidArchive(
                archive=self._archive, why=f"{member.name!r} has a broken header ({error})"
            ) from error
        if not parts:
            if node.children is None:
                raise InvalidArchive(archive=self._archive, why="its root is not a directory")
            self.root.attributes, self.root.xattrs = node.attributes, node.xattrs
            return self.root
        return self._insert(parts, node)

    def names(self) -> Iterator[tuple[bytes, TarNode]]:
        """Every name's absolute path with its node."""
        pending = [(b"", self.root)]
        while pending:
            path, node = pending.pop()
            for name, child in (node.children or {}).items():
                below = path + b"/" + name
                yield below, child
                if child.children:
                    pending.append((below, child))

    def fill(self, table: InodeTable) -> None:
        """Puts the tree into `table`, which has its root, in the order of a directory scan."""
        self.root.row = 0
        if self.root.xattrs:
            table.xattrs[0] = pack_xattrs(self.root.xattrs, "/")
        pending = [self.root]
        while pending:
            node = pending.pop()
            table.begin_children(node.row)
            directories = []
            for name, child in sorted((node.children or {}).items()):
                if self._add_row(table, node.row, name, child):
                    directories.append(child)
            pending += reversed(directories)

    def _add_row(self, table: InodeTable, parent: int, name: bytes, node: TarNode) -> bool:
        """Adds one name; says whether it is a directory. Only regular files keep their hard links."""
        row = table.add_child(parent, name, node.attributes)
        if stat.S_ISREG(node.attributes.mode) and node.row >= 0:
            table.link(row, node.row)
            return False
        node.row = row
        if node.xattrs:
            table.xattrs[row] = pack_xattrs(node.xattrs, os.fsdecode(table.path(row)))
        if stat.S_ISLNK(node.attributes.mode):
            table.symlinks[row] = node.symlink
        elif stat.S_ISREG(node.attributes.mode):
            table.chunk_start[row] = node.first_address
        return node.children is not None

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

    def _find(self, parts: list[bytes]) -> TarNode | None:
        node: TarNode | None = self.root
        for part in parts:
            if node is None or node.children is None:
                return None
            node = node.children.get(part)
        return node

    def _insert(self, parts: list[bytes], node: TarNode) -> TarNode:
        parent = self.root
        for part in parts[:-1]:
            children = parent.children
            assert children is not None
            below = children.get(part)
            if below is None or below.children is None:
                below = children[part] = _new_directory()
            parent = below
        assert parent.children is not None
        existing = parent.children.get(parts[-1])
        if existing is not None and existing.children is not None and node.children is not None:
            existing.attributes, existing.xattrs = node.attributes, node.xattrs
            return existing
        parent.children[parts[-1]] = node
        return node

    def _node(self, member: tarfile.TarInfo) -> TarNode:
        kind = _KINDS.get(member.type)
        if kind is None:
            raise InvalidArchive(
                archive=self._archive, why=f"{member.name!r} has unknown type {member.type!r}"
            )
        seconds, nanoseconds = _mtime(member)
        attributes = Attributes(
            kind | member.mode & 0o7777,
            _limited(member.uid, 1 << 32, "owner"),
            _limited(member.gid, 1 << 32, "group"),
            _limited(member.size, 1 << 63, "size") if kind == stat.S_IFREG else 0,
            seconds,
            nanoseconds,
            _device(member) if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0,
        )
        node = TarNode(attributes, xattrs=_xattrs(member) or None)
        if kind == stat.S_IFDIR:
            node.children = {}
        elif kind == stat.S_IFLNK:
            node.symlink = _target(member.linkname)
        return node


def _new_directory() -> TarNode:
    return TarNode(Attributes(stat.S_IFDIR | 0o755), children={})


def _mtime(member: tarfile.TarInfo) -> tuple[int, int]:
    """Seconds and nanoseconds. The decimal text of a PAX header is exact, the float made of it is not."""
    text = member.pax_headers.get("mtime")
    if text is None:
        return _seconds(int(member.mtime)), 0
    if not _DECIMAL.fullmatch(text):
        raise ValueError(f"time {text!r}")
    whole, _, fraction = text.partition(".")
    nanoseconds = int((fraction + "000000000")[:9])
    seconds = int(whole) if whole not in ("", "-") else 0
    if text.startswith("-") and nanoseconds:
        return _seconds(seconds - 1), 1_000_000_000 - nanoseconds
    return _seconds(seconds), nanoseconds


def _seconds(seconds: int) -> int:
    if not -(1 << 63) <= seconds < 1 << 63:
        raise ValueError(f"time {seconds}")
    return seconds


def _limited(value: int, limit: int, what: str) -> int:
    if not 0 <= value < limit:
        raise ValueError(f"{what} {value}")
    return value


def _device(member: tarfile.TarInfo) -> int:
    """Limits are those of the 12 and 20 bits that the kernel and RAFS have."""
    return os.makedev(
        _limited(member.devmajor, 1 << 12, "device major"), _limited(member.devminor, 1 << 20, "device minor")
    )


def _target(linkname: str) -> bytes:
    target = os.fsencode(linkname)
    if not 0 < len(target) <= _SYMLINK_MAX or b"\0" in target:
        raise ValueError(f"a link target of {len(target)} bytes")
    return target


def _xattrs(member: tarfile.TarInfo) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    for key, value in member.pax_headers.items():
        if key.startswith(_PAX_XATTR):
            name = os.fsencode(key[len(_PAX_XATTR) :].replace("%3D", "=").replace("%25", "%"))
            content = value.encode("utf-8", "surrogateescape")
        elif key.startswith(_LIBARCHIVE_XATTR):
            name = urllib.parse.unquote_to_bytes(key[len(_LIBARCHIVE_XATTR) :])
            content = base64.b64decode(value + "==")
        else:
            continue
        if is_storable(name):
            found.setdefault(name, content)
    for name, content in acl_xattrs(member.pax_headers):
        found.setdefault(name, content)
    return found
