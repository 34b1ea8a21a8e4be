"""Where the members of a tar file are, found in one pass over its headers: contents are stepped over, unread.

Reads ustar, GNU long names and pax records, as hostile input: what is in memory is bounded by `MEMBERS_MAX`
names of at most `NAME_MAX_BYTES` bytes, and no name may leave the archive or come twice.
"""

import os
import posixpath
import tarfile
from dataclasses import dataclass
from typing import ClassVar

import trio

from backend.compression import compression_of
from backend.contract import BackendError
from backend.manifest import shown

TAR_BLOCK_BYTES = 512
MEMBERS_MAX = 1 << 16
NAME_MAX_BYTES = 1024
EXTENSION_MAX_BYTES = 64 << 10
LINKS_MAX = 8

_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_LINKS = (tarfile.SYMTYPE, tarfile.LNKTYPE)
_WITHOUT_CONTENT = (*_LINKS, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
_PAX_KEYS = (b"path", b"linkpath", b"size", b"GNU.sparse.major", b"GNU.sparse.map", b"GNU.sparse.size")
_LENGTH_DIGITS_MAX = 8
_CHECK_CANCELLED_EVERY = 256


class ArchiveBroken(BackendError):
    """A file that is no tar, or one that cannot be what it claims."""

    message = "{where}: broken archive: {why}"
    exit_code: ClassVar[int] = 125


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in an archive: where its content begins in the file, and how long it is."""

    offset: int
    size_bytes: int


class TarIndex:
    """The members of one archive by name; links are followed."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._found: dict[str, Member | str] = {}

    def add(self, name: str, what: Member | str) -> None:
        """Notes a file, or a link by the name that it leads to. Raises `ArchiveBroken` for a second one."""
        if name in self._found:
            raise ArchiveBroken(where=self._where, why=f"{shown(name)} is in it twice")
        self._found[name] = what

    def find(self, name: str) -> Member | None:
        """The file that `name` is or leads to; None where there is none. Raises `ArchiveBroken` for loops."""
        wanted = name
        for _ in range(LINKS_MAX):
            found = self._found.get(wanted)
            if not isinstance(found, str):
                return found
            wanted = found
        raise ArchiveBroken(where=self._where, why=f"{shown(name)} leads through more than {LINKS_MAX} links")


def index_tar(descriptor: int, where: str) -> TarIndex:
    """The index of an open tar file. To be called in a thread of trio's; cancellation ends it.

    Raises `ArchiveBroken`.
    """
    return _HeaderPass(descriptor, where).run()


class _HeaderPass:
    """One pass over the headers. Names and sizes of long members come in headers before their own."""

    def __init__(self, descriptor: int, where: str) -> None:
        self._descriptor = descriptor
        self._where = where
        self._end = os.fstat(descriptor).st_size
        self._offset = 0
        self._index = TarIndex(where)
        self._extended: dict[str, str] = {}

    def run(self) -> TarIndex:
        headers = 0
        while self._offset < self._end:
            block = self._read(TAR_BLOCK_BYTES, "a header")
            if not any(block):
                break
            headers += 1
            if headers > MEMBERS_MAX:
                raise self._broken(f"more than {MEMBERS_MAX} members")
            if headers % _CHECK_CANCELLED_EVERY == 0:
                trio.from_thread.check_cancelled()
            self._take(self._parse(block))
        if not headers:
            raise self._broken("it is empty")
        return self._index

    def _take(self, entry: tarfile.TarInfo) -> None:
        if entry.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            self._extended |= self._pax_records(self._read_extension(entry))
        elif entry.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            key = "path" if entry.type == tarfile.GNUTYPE_LONGNAME else "linkpath"
            self._extended[key] = _text(self._read_extension(entry).rstrip(b"\0"))
        elif entry.type == tarfile.XGLTYPE:  # what is for all members says nothing about where they are
            self._step_over(entry.size, "a header for all members")
        else:
            self._take_member(entry)
            self._extended = {}

    def _take_member(self, entry: tarfile.TarInfo) -> None:
        extended = self._extended
        if entry.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in extended):
            raise self._broken(f"{shown(entry.name)} is stored as a sparse file, which is not read")
        name = self._inside(extended.get("path", entry.name))
        size_bytes = self._size(extended.get("size"), entry.size)
        content = self._offset
        if entry.type in _WITHOUT_CONTENT:
            size_bytes = 0
        self._step_over(size_bytes, shown(name))
        if entry.type in _FILES:
            self._index.add(name, Member(content, size_bytes))
        elif entry.type in _LINKS:
            target = extended.get("linkpath", entry.linkname)
            folder = posixpath.dirname(name) if entry.type == tarfile.SYMTYPE else ""
            self._index.add(name, self._inside(posixpath.normpath(posixpath.join(folder, target))))

    def _size(self, extended: str | None, size_bytes: int) -> int:
        if extended is None:
            return size_bytes
        if not (extended.isascii() and extended.isdigit() and len(extended) < 19):
            raise self._broken(f"a size of {shown(extended, 40)}")
        return int(extended)

    def _inside(self, name: str) -> str:
        if len(name) > NAME_MAX_BYTES:
            raise self._broken(f"a name of {len(name)} bytes, more than {NAME_MAX_BYTES}")
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or ".." in parts:
            raise self._broken(f"'{shown(name)}' leads out of the archive")
        return "/".join(parts)

    def _parse(self, block: bytes) -> tarfile.TarInfo:
        try:
            entry = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            at = self._offset - TAR_BLOCK_BYTES
            if at:
                raise self._broken(f"no header at byte {at}: {error}") from error
            compression = compression_of(block)
            if compression is None:
                raise self._broken("it is no tar file") from error
            why = f"it is compressed with {compression}; decompress it first, since it is read by offset"
            raise self._broken(why) from error
        if entry.size < 0:
            raise self._broken(f"{shown(entry.name)} has a size of {entry.size} bytes")
        return entry

    def _read_extension(self, entry: tarfile.TarInfo) -> bytes:
        if entry.size > EXTENSION_MAX_BYTES:
            raise self._broken(f"a header extension of {entry.size} bytes, more than {EXTENSION_MAX_BYTES}")
        data = self._read(entry.size, "a header extension")
        self._offset += -entry.size % TAR_BLOCK_BYTES
        return data

    def _pax_records(self, data: bytes) -> dict[str, str]:
        """Those that matter here, of `LENGTH KEY=VALUE\\n` each, the length being that of all of it (pax)."""
        records, at = {}, 0
        while at < len(data):
            digits = data[at : at + _LENGTH_DIGITS_MAX].partition(b" ")[0]
            end = at + (int(digits) if digits.isdigit() else 0)
            key, equals, value = data[at + len(digits) + 1 : end - 1].partition(b"=")
            if not equals or end > len(data) or data[end - 1 : end] != b"\n":
                raise self._broken(f"a damaged header extension before byte {self._offset}")
            if key in _PAX_KEYS:
                records[key.decode()] = _text(value)
            at = end
        return records

    def _read(self, length: int, what: str) -> bytes:
        data = os.pread(self._descriptor, length, self._offset)
        if len(data) < length:
            if not self._offset:
                raise self._broken("it is no tar file")
            raise self._broken(f"cut short: it ends within {what} at byte {self._offset + len(data)}")
        self._offset += length
        return data

    def _step_over(self, size_bytes: int, what: str) -> None:
        if size_bytes > self._end - self._offset:
            missing = size_bytes - (self._end - self._offset)
            raise self._broken(f"cut short: {missing} bytes of {what} are missing")
        self._offset += size_bytes + -size_bytes % TAR_BLOCK_BYTES

    def _broken(self, why: str) -> ArchiveBroken:
        return ArchiveBroken(where=self._where, why=why)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
