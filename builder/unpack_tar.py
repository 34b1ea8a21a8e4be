"""Unpacking into a tar stream (PAX)."""

import os
import stat
import tarfile
from typing import Protocol

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
_NAME_MAX = 100
_ID_MAX = 0o7777777
_NUMBER_MAX = 0o77777777777
"""What the fields of the plain header hold. Everything else goes into records of an extended one."""

Records = list[tuple[bytes, bytes]]


class TarOutput(Protocol):
    """What a tar stream is written to."""

    def write(self, data: bytes, /) -> object:
        """Takes all of `data`."""
        ...

    def flush(self) -> object:
        """Hands on what is held back."""
        ...


class TarTarget:
    """Writes members one by one; `finish` writes the end of the archive.

    `sockets` counts what a tar stream has no type for and what is therefore left out.
    """

    def __init__(self, out: TarOutput) -> None:
        self._out = out
        self._left = 0
        self._padding = 0
        self.sockets = 0

    def add(self, path: bytes, inode: Inode, xattrs: dict[bytes, bytes], symlink: bytes) -> None:
        """Writes a header."""
        if stat.S_ISSOCK(inode.mode):
            self.sockets += 1
            return
        member = self._member(inode)
        member.devmajor, member.devminor = os.major(inode.rdev), os.minor(inode.rdev)
        name = _name(path) + b"/" if inode.is_dir else _name(path)
        self._write_header(member, name, symlink, _records(inode, xattrs))

    def add_link(self, path: bytes, inode: Inode, target: bytes) -> None:
        """Writes a header that refers to an earlier member."""
        member = self._member(inode)
        member.type = tarfile.LNKTYPE
        self._write_header(member, _name(path), _name(target), _records(inode, {}))

    def begin_file(self, path: bytes, inode: Inode, xattrs: dict[bytes, bytes]) -> None:
        """Writes the header of a file."""
        member = self._member(inode)
        records = _records(inode, xattrs)
        if inode.size > _NUMBER_MAX:
            records.append((b"size", b"%d" % inode.size))
        else:
            member.size = inode.size
        self._left = inode.size
        self._padding = -inode.size % _BLOCK
        self._write_header(member, _name(path), b"", records)

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
    def _member(inode: Inode) -> tarfile.TarInfo:
        member = tarfile.TarInfo()
        member.type = _TYPES[stat.S_IFMT(inode.mode)]
        member.mode = stat.S_IMODE(inode.mode)
        member.uid, member.gid = min(inode.uid, _ID_MAX), min(inode.gid, _ID_MAX)
        member.mtime = min(max(inode.mtime_s, 0), _NUMBER_MAX)
        return member

    def _write_header(self, member: tarfile.TarInfo, name: bytes, link: bytes, records: Records) -> None:
        """The member's header, and before it an extended one with what does not fit there.

        Records are raw bytes, as GNU tar writes them: the `tarfile` module would announce names that are not
        UTF-8 by a `hdrcharset` record, which GNU tar does not know, and cannot write such attribute names.
        """
        for key, value in ((b"path", name), (b"linkpath", link)):
            if len(value) > _NAME_MAX or not value.isascii():
                records.append((key, value))
        if records:
            extended = tarfile.TarInfo("././@PaxHeader")
            extended.type = tarfile.XHDTYPE
            content = b"".join(_record(key, value) for key, value in records)
            extended.size = len(content)
            self._out.write(_plain(extended) + content + bytes(-len(content) % _BLOCK))
        member.name, member.linkname = os.fsdecode(name[: _NAME_MAX - 1]), os.fsdecode(link[:_NAME_MAX])
        self._out.write(_plain(member))


def _plain(member: tarfile.TarInfo) -> bytes:
    return member.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")


def _records(inode: Inode, xattrs: dict[bytes, bytes]) -> Records:
    records: Records = []
    if inode.mtime_ns or not 0 <= inode.mtime_s <= _NUMBER_MAX:
        records.append((b"mtime", _decimal(inode.mtime_s * 1_000_000_000 + inode.mtime_ns)))
    if inode.uid > _ID_MAX:
        records.append((b"uid", b"%d" % inode.uid))
    if inode.gid > _ID_MAX:
        records.append((b"gid", b"%d" % inode.gid))
    for name, value in xattrs.items():
        # A key ends at the first `=`; GNU tar has this escape for names that hold one.
        records.append((b"SCHILY.xattr." + name.replace(b"%", b"%25").replace(b"=", b"%3D"), value))
    return records


def _record(key: bytes, value: bytes) -> bytes:
    """`LENGTH KEY=VALUE` and a newline; the length counts its own digits."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _name(path: bytes) -> bytes:
    return path.lstrip(b"/") or b"."


def _decimal(time_ns: int) -> bytes:
    sign = b"-" if time_ns < 0 else b""
    return b"%s%d.%09d" % (sign, abs(time_ns) // 1_000_000_000, abs(time_ns) % 1_000_000_000)
