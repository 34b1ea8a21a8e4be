"""Checks of the tree in a bootstrap: every inode that can be reached, and every directory entry."""

import stat
from collections.abc import Callable, Iterator

from rafs.bootstrap import Bootstrap
from rafs.check_fault import Fault, Space
from rafs.check_file import check_file
from rafs.check_tables import RowIndex
from rafs.chunk import ADDRESS_SIZE
from rafs.dirent import DIRENT, DIRENT_SIZE, NAME_MAX, count_entries
from rafs.inode import EXTENDED_SIZE, FILE_TYPES, LAYOUT_FLAT_INLINE, SLOT_SIZE, Inode
from rafs.record import BLOCK_SIZE, FormatError
from rafs.superblock import ExtendedSuperblock, Superblock

_UNSEEN = 0
_BROKEN = 0xFF
_DIRECTORY = FILE_TYPES[stat.S_IFDIR]
_REGULAR = FILE_TYPES[stat.S_IFREG]
_SYMLINK_MAX = 4095
_SLOTLESS = (stat.S_IFIFO, stat.S_IFSOCK)


class TreeCheck:
    """One walk over all directories.

    A directory whose bytes are shared with another record is reported and not read, so the work is bounded by
    the size of the bootstrap whatever it says. Memory: one byte for each possible inode and a little for each
    file with several names.
    """

    def __init__(self, bootstrap: Bootstrap, space: Space, rows: RowIndex) -> None:
        self._bootstrap = bootstrap
        self._space = space
        self._rows = rows
        self._types = bytearray(max(bootstrap.size_bytes - bootstrap.meta_offset, 0) // SLOT_SIZE)
        self._names_left: dict[int, int] = {}
        self._pending: list[tuple[int, int]] = []
        self._inodes = 0
        self._names = 1
        self.has_xattrs = False

    def run(self) -> Iterator[Fault]:
        """All faults of the tree."""
        root = self._bootstrap.root_nid
        yield from self._visit(root, root)
        if self._type(root) != _DIRECTORY:
            yield Fault("root inode", self._offset(root), "a readable directory")
        while self._pending:
            yield from self._directory(*self._pending.pop())
        yield from self._totals()

    def _type(self, nid: int) -> int:
        return self._types[nid] if nid < len(self._types) else _BROKEN

    def _offset(self, nid: int) -> int:
        return self._bootstrap.meta_offset + nid * SLOT_SIZE

    def _visit(self, nid: int, parent: int) -> Iterator[Fault]:
        """An inode seen for the first time."""
        if nid >= len(self._types):
            wanted = f"an inode below {len(self._types)}, found {nid}"
            yield Fault(f"inode {nid}", self._offset(nid), wanted)
            return
        self._inodes += 1
        self._types[nid] = _BROKEN
        try:
            inode = self._bootstrap.inode(nid)
        except FormatError as error:
            yield Fault.of(error)
            return
        self._types[nid] = FILE_TYPES[stat.S_IFMT(inode.mode)]
        problem = self._space.claim(inode.offset_bytes, _end_of(self._bootstrap, inode))
        if problem:
            yield Fault(f"inode {nid}", inode.offset_bytes, problem)
            return
        if inode.has_xattrs:
            yield from self._xattrs(inode)
        yield from self._contents(inode, parent)

    def _contents(self, inode: Inode, parent: int) -> Iterator[Fault]:
        if inode.is_dir:
            problem = self._flat_data(inode)
            if problem:
                yield problem
            else:
                self._pending.append((inode.nid, parent))
            return
        if inode.is_file:
            if inode.nlink != 1:
                self._names_left[inode.nid] = inode.nlink - 1
            yield from check_file(self._bootstrap, inode, self._rows)
            return
        if inode.nlink != 1:
            yield Fault(_name(inode), _nlink_offset(inode), f"one link, found {inode.nlink}")
        if inode.is_symlink:
            yield from self._symlink(inode)
        elif stat.S_IFMT(inode.mode) in _SLOTLESS and inode.u:
            yield Fault(_name(inode), inode.offset_bytes + 16, f"no device number, found {inode.u:#x}")

    def _xattrs(self, inode: Inode) -> Iterator[Fault]:
        self.has_xattrs = True
        try:
            self._bootstrap.xattrs(inode)
        except FormatError as error:
            yield Fault(f"xattrs of inode {inode.nid}", error.offset_bytes, error.expectation)

    def _symlink(self, inode: Inode) -> Iterator[Fault]:
        if not 1 <= inode.size <= _SYMLINK_MAX:
            wanted = f"a target of 1 to {_SYMLINK_MAX} bytes, found {inode.size}"
            yield Fault(_name(inode), inode.offset_bytes + 8, wanted)
            return
        problem = self._flat_data(inode)
        if problem:
            yield problem
        elif b"\0" in self._bootstrap.readlink(inode):
            yield Fault(_name(inode), inode.offset_bytes, "a target without NUL")

    def _flat_data(self, inode: Inode) -> Fault | None:
        """Takes the full blocks of a directory or symlink; its inline tail was taken with the inode.

        Returns what is wrong with them: such data is not worth reading.
        """
        size, tail = inode.size, 0
        if inode.layout == LAYOUT_FLAT_INLINE:
            tail = size % BLOCK_SIZE
            size -= tail
        if inode.body_offset % BLOCK_SIZE + tail > BLOCK_SIZE:
            wanted = f"{tail} inline bytes in one block, found them from {inode.body_offset} on"
            return Fault(_name(inode), inode.body_offset, wanted)
        start = inode.u * BLOCK_SIZE
        problem = self._space.claim(start, start + size) if size else None
        return Fault(f"data of inode {inode.nid}", start, problem) if problem else None

    def _directory(self, nid: int, parent: int) -> Iterator[Fault]:
        inode = self._bootstrap.inode(nid)
        listing = _Listing(nid, parent, self._entry)
        try:
            for block, offset in self._bootstrap.data_blocks(inode):
                yield from listing.read_block(block, offset)
        except FormatError as error:
            yield Fault(f"directory of inode {nid}", error.offset_bytes, error.expectation)
            return
        yield from listing.finish(inode)

    def _entry(self, listing: "_Listing", name: bytes, nid: int, file_type: int, at: int) -> Iterator[Fault]:
        """One name that is neither "." nor ".."."""
        self._names += 1
        record = f"entry {name!r} of inode {listing.nid}"
        seen = self._type(nid)
        if seen == _UNSEEN or nid >= len(self._types):
            yield from self._visit(nid, listing.nid)
            listing.subdirectories += self._type(nid) == _DIRECTORY
        elif seen == _DIRECTORY:
            yield Fault(record, at, f"each directory under one name, inode {nid} has another")
        elif seen == _REGULAR:
            self._names_left[nid] = self._names_left.get(nid, 0) - 1
        elif seen != _BROKEN:
            yield Fault(record, at, f"several names for regular files only, found inode {nid} again")
        known = self._type(nid)
        if known not in (file_type, _BROKEN):
            yield Fault(record, at + 10, f"type {known} as inode {nid} says, found {file_type}")

    def _totals(self) -> Iterator[Fault]:
        for nid, left in self._names_left.items():
            if left:
                inode = self._bootstrap.inode(nid)
                wanted = f"{inode.nlink - left} links, one for each name, found {inode.nlink}"
                yield Fault(_name(inode), _nlink_offset(inode), wanted)
        # Other builders count a name of a hard link as an inode.
        if not self._inodes <= self._bootstrap.inode_count <= self._names:
            wanted = f"{self._inodes} inodes, found {self._bootstrap.inode_count}"
            yield Fault("EROFS superblock", Superblock.OFFSET + 16, wanted)
        at = ExtendedSuperblock.OFFSET + 40
        for nid in self._bootstrap.prefetch_nids:
            if self._type(nid) in (_UNSEEN, _BROKEN):
                yield Fault("prefetch table", at, f"inodes that a name leads to, found {nid}")


_OnEntry = Callable[["_Listing", bytes, int, int, int], Iterator[Fault]]


class _Listing:
    """The entries of one directory, block after block, in the order in which they must stand."""

    def __init__(self, nid: int, parent: int, on_entry: _OnEntry) -> None:
        self.nid = nid
        self.subdirectories = 0
        self._on_entry = on_entry
        self._last = b""
        self._dots = {b".": nid, b"..": parent}

    def read_block(self, block: memoryview, offset: int) -> Iterator[Fault]:
        """All entries of the block at `offset`; raises `FormatError` when its head is impossible."""
        count = count_entries(block, offset)
        raw = bytes(block)
        heads = list(DIRENT.iter_unpack(raw[: count * DIRENT_SIZE]))
        for index, (nid, start, file_type, reserved) in enumerate(heads):
            at = offset + index * DIRENT_SIZE
            end = heads[index + 1][1] if index + 1 < count else _name_end(raw, start)
            name = raw[start:end]
            if start < count * DIRENT_SIZE or not 1 <= len(name) <= NAME_MAX or end > len(raw):
                wanted = f"a name of 1 to {NAME_MAX} bytes in the block, found bytes {start} to {end}"
                yield Fault(f"entry {index} of inode {self.nid}", at + 8, wanted)
                continue
            if reserved:
                yield Fault(f"entry {name!r} of inode {self.nid}", at + 11, f"byte 0, found {reserved}")
            yield from self._name(name, nid, file_type, at)

    def finish(self, inode: Inode) -> Iterator[Fault]:
        """What can be said after the last block."""
        for name in self._dots:
            yield Fault(f"directory of inode {self.nid}", inode.offset_bytes, f"an entry {name!r}")
        links = 2 + self.subdirectories
        if inode.nlink != links:
            wanted = f"{links} links for {self.subdirectories} sub-directories, found {inode.nlink}"
            yield Fault(_name(inode), _nlink_offset(inode), wanted)

    def _name(self, name: bytes, nid: int, file_type: int, at: int) -> Iterator[Fault]:
        record = f"entry {name!r} of inode {self.nid}"
        if name == self._last:
            yield Fault(record, at, "each name once")
        elif name < self._last:
            yield Fault(record, at, f"a name sorted by its bytes, stands behind {self._last!r}")
        self._last = name
        if b"/" in name or b"\0" in name:
            yield Fault(record, at, "a name without slash and NUL")
        if name not in (b".", b".."):
            yield from self._on_entry(self, name, nid, file_type, at)
            return
        wanted = self._dots.pop(name, nid)
        if nid != wanted:
            yield Fault(record, at, f"inode {wanted}, found {nid}")
        if file_type != _DIRECTORY:
            yield Fault(record, at + 10, f"type {_DIRECTORY} (directory), found {file_type}")


def _name(inode: Inode) -> str:
    return f"inode {inode.nid}"


def _nlink_offset(inode: Inode) -> int:
    return inode.offset_bytes + (44 if inode.header_size == EXTENDED_SIZE else 6)


def _name_end(raw: bytes, start: int) -> int:
    end = raw.find(b"\0", start)
    return len(raw) if end < 0 else end


def _end_of(bootstrap: Bootstrap, inode: Inode) -> int:
    """The end of what follows an inode without a gap: xattrs, and chunk addresses or an inline tail."""
    if inode.is_file:
        chunks = bootstrap.chunk_count_of(inode)
        return inode.index_offset + ADDRESS_SIZE * chunks if chunks else inode.body_offset
    if inode.layout == LAYOUT_FLAT_INLINE and (inode.is_dir or inode.is_symlink):
        return inode.body_offset + inode.size % BLOCK_SIZE
    return inode.body_offset
