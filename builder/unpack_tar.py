"""Unpacking into a tar stream (PAX)."""

import os
import stat
import tarfile
from typing import IO

from builder.unpack import CannotUnpack
from rafs.inode import Inode

_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}
_BLOCK = tarfile.BLOCKSIZE


class TarTarget:
    """Writes members one by one; `finish` writes the end of the archive.

    `sockets` counts what a tar stream has no type for and what is therefore left out.
    """

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._left = 0
        self._padding = 0
        self.sockets = 0

    def add(self, path: bytes, inode: Inode, xattrs: dict[bytes, bytes], symlink: bytes) -> None:
        """Writes a header."""
        if stat.S_ISSOCK(inode.mode):
            self.sockets += 1
            return
        member = self._member(path, inode, xattrs)
        member.linkname = os.fsdecode(symlink)
        member.devmajor, member.devminor = os.major(inode.rdev), os.minor(inode.rdev)
        self._write_header(member)

    def add_link(self, path: bytes, inode: Inode, target: bytes) -> None:
        """Writes a header that refers to an earlier member."""
        member = self._member(path, inode, {})
        member.type = tarfile.LNKTYPE
        member.linkname = _name(target)
        member.size = 0
        self._write_header(member)

    def begin_file(self, path: bytes, inode: Inode, xattrs: dict[bytes, bytes]) -> None:
        """Writes the header of a file."""
        member = self._member(path, inode, xattrs)
        member.size = self._left = inode.size
        self._padding = -inode.size % _BLOCK
        self._write_header(member)

    def write(self, chunk: bytes) -> None:
        """Writes content."""
        if len(chunk) > self._left:
            raise CannotUnpack(
                path="archive", why=f"{len(chunk) - self._left} bytes more than its header says"
            )
        self._left -= len(chunk)
        self._out.write(chunk)

    def end_file(self) -> None:
        """Pads to whole blocks."""
        self._out.write(bytes(self._padding))

    def finish(self) -> None:
        """Two empty blocks end an archive."""
        self._out.write(bytes(2 * _BLOCK))
        self._out.flush()

    @staticmethod
    def _member(path: bytes, inode: Inode, xattrs: dict[bytes, bytes]) -> tarfile.TarInfo:
        member = tarfile.TarInfo(_name(path))
        member.type = _TYPES[stat.S_IFMT(inode.mode)]
        member.mode = stat.S_IMODE(inode.mode)
        member.uid, member.gid = inode.uid, inode.gid
        member.mtime = inode.mtime_s
        headers = {}
        if inode.mtime_ns or inode.mtime_s < 0:
            headers["mtime"] = _decimal(inode.mtime_s * 1_000_000_000 + inode.mtime_ns)
        for name, value in xattrs.items():
            headers[f"SCHILY.xattr.{os.fsdecode(name)}"] = value.decode("utf-8", "surrogateescape")
        member.pax_headers = headers
        return member

    def _write_header(self, member: tarfile.TarInfo) -> None:
        self._out.write(member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))


def _name(path: bytes) -> str:
    return os.fsdecode(path.lstrip(b"/") or b".")


def _decimal(time_ns: int) -> str:
    sign = "-" if time_ns < 0 else ""
    return f"{sign}{abs(time_ns) // 1_000_000_000}.{abs(time_ns) % 1_000_000_000:09d}"
