"""The tree of one layer of a container image: what it adds, and marks for what it does to lower layers.

Whiteouts are those of the OCI image specification (`.wh.NAME`, `.wh..wh..opq`); they hide only what lower
layers have, wherever in the layer they stand.
"""

import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

from builder.layer_marks import HAS_LINKS, IMPLIED, LINK, OPAQUE, WHITEOUT_PREFIX, YES, is_reserved
from builder.path_tree import ROOT, ChildRow, Parts
from builder.tar_tree import InvalidArchive, TarTree
from rafs.inode_table import Attributes, InodeTable
from rafs.xattr import pack_xattrs, unpack_xattrs

_OPAQUE_NAME = b".wh..wh..opq"
_AUFS_PREFIX = b".wh..wh."
"""Files of aufs itself, which old builders left in layers."""


class LayerTree(TarTree):
    """Collects the members of a layer."""

    def __init__(self, archive: str, path: Path) -> None:
        """See `TarTree`."""
        super().__init__(archive, path)
        self._opaque: set[int] = set()
        self._replacing: set[int] = set()
        self._has_links = False
        self._hidden: list[tuple[int, bytes]] = []

    def add(self, member: tarfile.TarInfo, first_address: int = 0) -> None:
        """See `TarTree`."""
        parts = self._split(member.name)
        if any(part.startswith(WHITEOUT_PREFIX) for part in parts):
            self._members += 1
            self._add_whiteout(member, parts)
        else:
            super().add(member, first_address)

    def put(self, parts: Parts, node: int, kind: int) -> int:
        """See `PathTree`; what was a file for a moment has removed a directory of lower layers."""
        before = self.find(parts) if stat.S_ISDIR(kind) else None
        node = super().put(parts, node, kind)
        if before is not None and not stat.S_ISDIR(before.kind):
            self._opaque.add(node)
        return node

    def table(self) -> InodeTable:
        """The tree so far, with its marks."""
        self._add_hidden()
        table = super().table()
        marks = self._marks(ROOT, is_implied=self.is_root_implied)
        if self._has_links:
            marks[HAS_LINKS] = YES
        if marks:
            table.xattrs[0] = _with(table.xattrs.get(0, b""), marks)
        return table

    def _add_whiteout(self, member: tarfile.TarInfo, parts: list[bytes]) -> None:
        name = parts[-1]
        if name == _OPAQUE_NAME:
            directory = self.directory_if_free(parts[:-1])
            if directory is not None:  # a file of this layer hides what is below it anyway
                self._opaque.add(directory)
        elif any(part.startswith(_AUFS_PREFIX) for part in parts):
            return
        elif not name.startswith(WHITEOUT_PREFIX):
            why = f"{member.name!r} lies in a whiteout, which is no directory"
            raise InvalidArchive(archive=self._archive, why=why)
        else:
            hidden = name.removeprefix(WHITEOUT_PREFIX)
            if hidden in (b"", b".", b".."):
                why = f"the whiteout {member.name!r} names nothing that could be hidden"
                raise InvalidArchive(archive=self._archive, why=why)
            directory = self.directory_if_free(parts[:-1])
            if directory is not None:
                self._hidden.append((directory, hidden))

    def _add_hidden(self) -> None:
        """Whiteouts of names that the layer has not itself; a directory that it has hides what is below."""
        free = []
        for parent, name in self._hidden:
            own = self.child(parent, name)
            if own is None or (stat.S_ISDIR(own.kind) and not self._has_content(own.node)):
                free.append((parent, name))
            elif stat.S_ISDIR(own.kind):
                self._opaque.add(own.node)
                self._replacing.add(own.node)
        node = self._members + 1
        self.describe(node, Attributes(stat.S_IFCHR))
        for parent, name in free:
            self.remove(parent, name)
            self.put_child(parent, name, node, stat.S_IFCHR)
        self._hidden.clear()

    def _has_content(self, directory: int) -> bool:
        """Whether a directory was described, or leads to something else than whiteouts."""
        if directory > 0:
            return True
        return any(
            not stat.S_ISDIR(child.kind) or self._has_content(child.node)
            for child in self.children(directory)
        )

    def _add_link(self, member: tarfile.TarInfo, parts: list[bytes]) -> None:
        target = self._split(member.linkname)
        found = self.find(target)
        if found is not None and not stat.S_ISDIR(found.kind):
            self.put(parts, found.node, found.kind)
            return
        self._has_links = True
        node = self.put(parts, self._members, stat.S_IFREG)
        marks = _with(b"", {LINK: b"/".join(target)})
        self.describe(node, Attributes(stat.S_IFREG), xattrs=marks)

    def _pack_xattrs(self, xattrs: dict[bytes, bytes], parts: list[bytes]) -> bytes:
        own = {name: value for name, value in xattrs.items() if not is_reserved(name)}
        return super()._pack_xattrs(own, parts)

    def _children(self, node: int) -> Iterator[ChildRow]:
        for row in super()._children(node):
            marks = self._marks(row.node, is_implied=row.attributes is None)
            yield row._replace(xattrs=_with(row.xattrs or b"", marks)) if marks else row

    def _marks(self, node: int, *, is_implied: bool) -> dict[bytes, bytes]:
        marks = {IMPLIED: YES} if is_implied and node not in self._replacing else {}
        if node in self._opaque:
            marks[OPAQUE] = YES
        return marks


def _with(packed: bytes, marks: dict[bytes, bytes]) -> bytes:
    xattrs = unpack_xattrs(packed, 0, len(packed))
    return pack_xattrs(xattrs | marks, os.fsdecode(b"a directory"))
