"""The tree that the members of an archive describe."""

import os
import stat
import tarfile
from pathlib import Path
from typing import ClassVar

from builder.path_tree import ROOT, PathInvalid, PathTree
from builder.tar_member import KINDS, read_attributes, read_target, read_xattrs
from rafs.errors import NydusError
from rafs.xattr import pack_xattrs


class InvalidArchive(NydusError):
    """An archive that cannot be read, or that describes no tree."""

    message = "{archive}: {why}"
    exit_code: ClassVar[int] = 55


class TarTree(PathTree):
    """Collects members; a later one replaces an earlier one of the same name, as when it is unpacked.

    The node of a member is its number, counted from 1.
    """

    def __init__(self, archive: str, path: Path) -> None:
        """`archive` is the name for messages, `path` that of the database."""
        super().__init__(path)
        self._archive = archive
        self._members = 0

    def add(self, member: tarfile.TarInfo, first_address: int = 0) -> None:
        """Adds the next member, whose content begins at that address. Raises `InvalidArchive`."""
        self._members += 1
        parts = self._split(member.name)
        try:
            if member.type == tarfile.LNKTYPE:
                self._add_link(member, parts)
            else:
                self._add_node(member, parts, first_address)
        except PathInvalid as error:
            why = f"{member.name!r} cannot be unpacked: {error}"
            raise InvalidArchive(archive=self._archive, why=why) from error

    def row_of_member(self, number: int) -> int:
        """The row that `table` gave the file of a member, counted from 0; 0 when no name leads to it."""
        return self.row(number + 1)

    def _add_node(self, member: tarfile.TarInfo, parts: list[bytes], first_address: int) -> None:
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
        kind = stat.S_IFMT(attributes.mode)
        packed = self._pack_xattrs(xattrs, parts) if xattrs else b""
        if not parts and stat.S_ISDIR(kind):
            node = ROOT
        else:
            node = self.put(parts, self._members, kind)
        self.describe(node, attributes, symlink=symlink, xattrs=packed, first_address=first_address)

    def _add_link(self, member: tarfile.TarInfo, parts: list[bytes]) -> None:
        """A hard link. Overridden where what it leads to may be in another archive."""
        found = self.find(self._split(member.linkname))
        if found is None or stat.S_ISDIR(found.kind):
            raise InvalidArchive(
                archive=self._archive,
                why=f"{member.name!r} is a hard link to {member.linkname!r}, which is no file",
            )
        self.put(parts, found.node, found.kind)

    def _pack_xattrs(self, xattrs: dict[bytes, bytes], parts: list[bytes]) -> bytes:
        return pack_xattrs(xattrs, os.fsdecode(b"/" + b"/".join(parts)))

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
