"""What differs between two images: both trees are walked side by side, one directory at a time.

Names in a directory are sorted, so two directories are merged as they are read. What is held in memory is one
block of each directory on the way down and the number of every directory seen; nothing grows with the files.
"""

import enum
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from rafs.bootstrap import Bootstrap
from rafs.inode import Inode
from rafs.record import FormatError

_PERMISSIONS = 0o7777


class Change(enum.Enum):
    """What became of a name between the first image and the second."""

    ADDED = "added"
    REMOVED = "removed"
    CHANGED = "changed"


class Aspect(enum.Enum):
    """In what a name that both images have differs."""

    TYPE = "type"
    CONTENT = "content"
    UNKNOWN_CONTENT = "content not comparable by chunk"
    TARGET = "target"
    DEVICE = "device"
    MODE = "mode"
    OWNER = "owner"
    MTIME = "mtime"
    XATTRS = "xattrs"


_OF_CONTENT = frozenset({Aspect.TYPE, Aspect.CONTENT, Aspect.UNKNOWN_CONTENT, Aspect.TARGET, Aspect.DEVICE})


@dataclass(frozen=True, slots=True)
class Difference:
    """One name that differs. `mode` and `size_bytes` (of a regular file, else 0) are the newer ones."""

    path: bytes
    change: Change
    mode: int
    size_bytes: int
    aspects: tuple[Aspect, ...] = ()

    @property
    def is_metadata_only(self) -> bool:
        """Whether both images have the name and only what is said about it differs."""
        return self.change is Change.CHANGED and _OF_CONTENT.isdisjoint(self.aspects)


@dataclass(frozen=True, slots=True)
class _Pair:
    """A name and its inode in either image; None where an image does not have it."""

    path: bytes
    before: int | None
    after: int | None


class _Tree:
    """One of the two images, and the directories of it that were entered."""

    def __init__(self, bootstrap: Bootstrap) -> None:
        self.bootstrap = bootstrap
        self._entered: set[int] = set()

    def inode(self, nid: int | None) -> Inode | None:
        return None if nid is None else self.bootstrap.inode(nid)

    def children(self, inode: Inode | None) -> Iterator[tuple[bytes, int]]:
        """Names and inode numbers in a directory, ascending; none where there is no directory.

        Raises `FormatError` for a directory that was entered before, which would never end, and for names
        that do not ascend, which nobody could look up.
        """
        if inode is None or not inode.is_dir:
            return
        if inode.nid in self._entered:
            raise FormatError("directory", inode.offset_bytes, "each directory under one name only")
        self._entered.add(inode.nid)
        last = b""
        for entry in self.bootstrap.readdir(inode):
            if entry.name <= last:
                expectation = f"names in ascending order, found {entry.name!r} behind {last!r}"
                raise FormatError("directory", inode.offset_bytes, expectation)
            last = entry.name
            if last not in (b".", b".."):
                yield last, entry.nid


def compare_trees(before: Bootstrap, after: Bootstrap) -> Iterator[Difference]:
    """Every name that differs, a directory before what is in it, names in ascending order.

    Link counts and the sizes of directories do not count. Content is compared by the digests of its chunks
    and not read. Where the images cut or digest chunks differently and only the bytes could tell, a file is
    reported as changed with `Aspect.UNKNOWN_CONTENT`. Raises `FormatError`.
    """
    old, new = _Tree(before), _Tree(after)
    comparison = _Comparison(before, after)
    waiting = [iter((_Pair(b"/", before.root_nid, after.root_nid),))]
    while waiting:
        pair = next(waiting[-1], None)
        if pair is None:
            waiting.pop()
            continue
        first, second = old.inode(pair.before), new.inode(pair.after)
        difference = comparison.compare(pair.path, first, second)
        if difference is not None:
            yield difference
        if (first is not None and first.is_dir) or (second is not None and second.is_dir):
            waiting.append(_merge(pair.path, old.children(first), new.children(second)))


def _merge(
    path: bytes, before: Iterator[tuple[bytes, int]], after: Iterator[tuple[bytes, int]]
) -> Iterator[_Pair]:
    """The names of two directories, each once."""
    prefix = path if path == b"/" else path + b"/"
    left, right = next(before, None), next(after, None)
    while left is not None or right is not None:
        if right is None or (left is not None and left[0] < right[0]):
            assert left is not None
            yield _Pair(prefix + left[0], left[1], None)
            left = next(before, None)
        elif left is None or right[0] < left[0]:
            yield _Pair(prefix + right[0], None, right[1])
            right = next(after, None)
        else:
            yield _Pair(prefix + left[0], left[1], right[1])
            left, right = next(before, None), next(after, None)


class _Comparison:
    """Compares inodes of two images."""

    def __init__(self, before: Bootstrap, after: Bootstrap) -> None:
        self._before = before
        self._after = after
        self._is_same_digester = before.digester == after.digester
        self._same_blobs = {
            (first.index, second.index)
            for first in before.blobs
            for second in after.blobs
            if first.blob_id == second.blob_id
        }

    def compare(self, path: bytes, before: Inode | None, after: Inode | None) -> Difference | None:
        if before is None or after is None:
            one, change = (after, Change.ADDED) if before is None else (before, Change.REMOVED)
            assert one is not None
            return Difference(path, change, one.mode, _size(one))
        aspects = tuple(self._aspects(before, after))
        return Difference(path, Change.CHANGED, after.mode, _size(after), aspects) if aspects else None

    def _aspects(self, before: Inode, after: Inode) -> Iterator[Aspect]:
        if stat.S_IFMT(before.mode) != stat.S_IFMT(after.mode):
            yield Aspect.TYPE
        elif after.is_file:
            yield from self._content(before, after)
        elif after.is_symlink:
            if self._before.readlink(before) != self._after.readlink(after):
                yield Aspect.TARGET
        elif before.rdev != after.rdev:
            yield Aspect.DEVICE
        if (before.mode ^ after.mode) & _PERMISSIONS:
            yield Aspect.MODE
        if (before.uid, before.gid) != (after.uid, after.gid):
            yield Aspect.OWNER
        if (before.mtime_s, before.mtime_ns) != (after.mtime_s, after.mtime_ns):
            yield Aspect.MTIME
        if (before.has_xattrs or after.has_xattrs) and (
            self._before.xattrs(before) != self._after.xattrs(after)
        ):
            yield Aspect.XATTRS

    def _content(self, before: Inode, after: Inode) -> Iterator[Aspect]:
        if before.size != after.size:
            yield Aspect.CONTENT
        elif not self._is_comparable(before.size):
            yield Aspect.UNKNOWN_CONTENT
        elif any(
            not self._is_same_chunk(before, after, index)
            for index in range(self._after.chunk_count_of(after))
        ):
            yield Aspect.CONTENT

    def _is_comparable(self, size_bytes: int) -> bool:
        """Whether files of that size are cut into the same chunks, and digested alike, in both images."""
        sizes = (self._before.chunk_size, self._after.chunk_size)
        is_cut_alike = sizes[0] == sizes[1] or size_bytes <= min(sizes)
        return size_bytes == 0 or (self._is_same_digester and is_cut_alike)

    def _is_same_chunk(self, before: Inode, after: Inode, index: int) -> bool:
        first, second = self._before.chunk_ref(before, index), self._after.chunk_ref(after, index)
        blobs = (first.blob_index, second.blob_index)
        if first.chunk_index == second.chunk_index and blobs in self._same_blobs:
            return True
        before_digests = self._before.chunk_digests(first.blob_index)
        after_digests = self._after.chunk_digests(second.blob_index)
        return before_digests[first.chunk_index] == after_digests[second.chunk_index]


def _size(inode: Inode) -> int:
    return inode.size if inode.is_file else 0
