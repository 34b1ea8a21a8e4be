"""An image's tree written out again: the order of things, whatever they are written to."""

import os
import stat
from collections.abc import AsyncIterator, Iterator
from typing import ClassVar, Protocol

from rafs.bootstrap import Bootstrap
from rafs.chunk import ChunkRef
from rafs.errors import NydusError
from rafs.inode import Inode


class CannotUnpack(NydusError):
    """Something of the tree that cannot be written at the target."""

    message = "{path}: cannot be unpacked: {why}"
    exit_code: ClassVar[int] = 56


class UnpackTarget(Protocol):
    """Where a tree is written to. Paths are absolute in the image; parents come before what is in them."""

    def add(self, path: bytes, inode: Inode, xattrs: dict[bytes, bytes], symlink: bytes) -> None:
        """A directory, symbolic link, device, fifo or socket. Raises `CannotUnpack`."""
        ...

    def add_link(self, path: bytes, inode: Inode, target: bytes) -> None:
        """Another name of the regular file that was written at `target`."""
        ...

    def begin_file(self, path: bytes, inode: Inode, xattrs: dict[bytes, bytes]) -> None:
        """A regular file; its content follows in chunks."""
        ...

    def write(self, chunk: bytes) -> None:
        """The next chunk of the file begun last."""
        ...

    def end_file(self) -> None:
        """All chunks of the file are there."""
        ...


def content_refs(bootstrap: Bootstrap) -> Iterator[ChunkRef]:
    """Addresses of all chunks in the order in which `unpack` takes them."""
    for _, inode, link_target in _entries(bootstrap):
        if inode.is_file and link_target is None:
            yield from bootstrap.chunk_refs(inode)


async def unpack(bootstrap: Bootstrap, chunks: AsyncIterator[bytes], target: UnpackTarget) -> None:
    """Writes the whole tree. `chunks` gives the decoded chunks of `content_refs`, one by one.

    Raises what the iterator raises, `FormatError` for a broken tree, `CannotUnpack` (also for a file whose
    chunks are not exactly as long as it is), and `OSError`s of the target.
    """
    for path, inode, link_target in _entries(bootstrap):
        if link_target is not None:
            target.add_link(path, inode, link_target)
            continue
        xattrs = bootstrap.xattrs(inode)
        if not inode.is_file:
            target.add(path, inode, xattrs, bootstrap.readlink(inode) if inode.is_symlink else b"")
            continue
        target.begin_file(path, inode, xattrs)
        left = inode.size
        for _ in range(bootstrap.chunk_count_of(inode)):
            chunk = await anext(chunks)
            left -= len(chunk)
            if left < 0:
                raise CannotUnpack(path=os.fsdecode(path), why=f"its chunks are {-left} bytes too long")
            target.write(chunk)
        if left > 0:
            raise CannotUnpack(path=os.fsdecode(path), why=f"its chunks are {left} bytes too short")
        target.end_file()


def _entries(bootstrap: Bootstrap) -> Iterator[tuple[bytes, Inode, bytes | None]]:
    """Every name with its inode, and for further names of a regular file the first one."""
    first_names: dict[int, bytes] = {}
    for path, inode in bootstrap.walk():
        link_target = None
        if stat.S_ISREG(inode.mode) and inode.nlink > 1:
            first = first_names.setdefault(inode.nid, path)
            link_target = first if first != path else None
        yield path, inode, link_target
