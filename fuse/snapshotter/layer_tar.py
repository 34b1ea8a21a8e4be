"""Unpacks one layer of an ordinary image into a directory that overlayfs stacks: whiteouts become its marks.

As containerd does it (archive/tar.go): nothing is looked up in lower layers but what a directory on the way
is like that this layer does not describe. Whatever a layer says stays inside of the directory.
"""

import contextlib
import errno
import gzip
import hashlib
import os
import shutil
import stat
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, BinaryIO, ClassVar, cast

import zstandard
from isal import igzip, isal_zlib

from backend.bounded_member import BoundedMember
from backend.compression import START_BYTES, compression_of
from fuse.snapshotter.directories import remove_tree
from rafs.errors import NydusError

OPAQUE_MARK = ".wh..wh..opq"
WHITEOUT_PREFIX = ".wh."
OPAQUE_XATTR = "trusted.overlay.opaque"
_XATTR_HEADER = "SCHILY.xattr."
_BROKEN = (gzip.BadGzipFile, zlib.error, cast("type[Exception]", isal_zlib.error), zstandard.ZstdError)
_LINKS_MAX = 255
_COPY_BYTES = 1 << 20
_WINDOW_MAX_BYTES = 128 << 20
"""Of zstd; more memory than that is not given to who pushed a layer."""


class LayerNotUnpacked(NydusError):
    """A layer that cannot be unpacked, or unpacks to something else than its image says."""

    message = "layer {layer}: {why}"
    exit_code: ClassVar[int] = 213


def unpack_layer(packed: BinaryIO, layer: str, target: Path, lower: Sequence[Path], diff_id: str) -> None:
    """Unpacks the layer in `packed` (plain, gzip or zstd) into the empty directory `target`.

    `lower` are the directories below it, the topmost first; `diff_id` is the digest that the tar must have.
    Raises `LayerNotUnpacked` and `OSError`.
    """
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        plain = cast("IO[bytes]", _Hashed(_unpacked(packed, stack), digest))
        try:
            with tarfile.open(
                fileobj=plain, mode="r|", errors="surrogateescape", tarinfo=BoundedMember
            ) as archive:
                _LayerWriter(target, lower).write(archive)
            while plain.read(_COPY_BYTES):
                pass  # what lies behind the end of the tar belongs to the digest
        except (*_BROKEN, tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            raise LayerNotUnpacked(layer=layer, why=str(error) or type(error).__name__) from error
    found = f"sha256:{digest.hexdigest()}"
    if found != diff_id:
        raise LayerNotUnpacked(layer=layer, why=f"it unpacks to {found}, and its image says {diff_id}")


def _unpacked(packed: BinaryIO, stack: contextlib.ExitStack) -> IO[bytes]:
    kind = compression_of(packed.read(START_BYTES))
    packed.seek(0)
    if kind == "gzip":
        inflating = igzip.IGzipFile(fileobj=packed, mode="rb")  # type: ignore[no-untyped-call]
        stack.callback(inflating.close)
        return cast("IO[bytes]", inflating)
    if kind == "zstd":
        decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_MAX_BYTES)
        return cast(
            "IO[bytes]",
            stack.enter_context(decompressor.stream_reader(packed, read_across_frames=True, closefd=False)),
        )
    return packed


class _Hashed:
    """A stream that digests what is read from it."""

    def __init__(self, inner: IO[bytes], digest: "hashlib._Hash") -> None:
        self._inner = inner
        self._digest = digest

    def read(self, size: int) -> bytes:
        data = self._inner.read(size)
        self._digest.update(data)
        return data


class _LayerWriter:
    def __init__(self, root: Path, lower: Sequence[Path]) -> None:
        self._root = os.fspath(root)
        self._lower = [os.fspath(path) for path in lower]
        self._times: dict[str, int] = {}

    def write(self, archive: tarfile.TarFile) -> None:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # they would all be kept otherwise
            self._write_member(archive, member)
        for path, time_ns in self._times.items():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.utime(path, ns=(time_ns, time_ns), follow_symlinks=False)

    def _write_member(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        parts = _parts(member.name)
        if not parts:
            if member.isdir():
                self._describe(self._root, member)
            return
        parent = self._inside(parts[:-1])
        self._make_parents(parent)
        path = os.path.join(parent, parts[-1])
        if parts[-1] == OPAQUE_MARK:
            os.setxattr(parent, OPAQUE_XATTR, b"y")
            return
        if parts[-1].startswith(WHITEOUT_PREFIX):
            hidden = os.path.join(parent, _plain_name(parts[-1][len(WHITEOUT_PREFIX) :]))
            _remove(hidden)
            os.mknod(hidden, stat.S_IFCHR, os.makedev(0, 0))
            os.chown(hidden, member.uid, member.gid)
            return
        if not (member.isdir() and os.path.isdir(path) and not os.path.islink(path)):
            _remove(path)
            self._make(archive, member, path)
        self._describe(path, member)  # of a hard link too: the last word is that of the last name

    def _make(self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
        if member.isdir():
            os.mkdir(path, 0o700)
        elif member.islnk():
            target = _parts(member.linkname)
            source = os.path.join(self._inside(target[:-1]), target[-1]) if target else self._root
            os.link(source, path, follow_symlinks=False)
        elif member.issym():
            os.symlink(member.linkname, path)
        elif member.ischr() or member.isblk():
            kind = stat.S_IFCHR if member.ischr() else stat.S_IFBLK
            os.mknod(path, kind | 0o600, os.makedev(member.devmajor, member.devminor))
        elif member.isfifo():
            os.mkfifo(path, 0o600)
        elif member.isfile():
            content = archive.extractfile(member)
            assert content is not None
            with open(path, "xb") as output:
                shutil.copyfileobj(content, output, _COPY_BYTES)
        else:
            raise ValueError(f"{member.name!r} is of unknown type {member.type!r}")

    def _describe(self, path: str, member: tarfile.TarInfo) -> None:
        os.lchown(path, member.uid, member.gid)
        for key, value in member.pax_headers.items():
            if key.startswith(_XATTR_HEADER):
                content = value.encode("utf-8", "surrogateescape")
                _set_xattr(path, key.removeprefix(_XATTR_HEADER), content)
        if not os.path.islink(path):
            os.chmod(path, member.mode & 0o7777)
        time_ns = _time_ns(member)
        if member.isdir():
            self._times[path] = time_ns  # at the end: what is put into it changes it
        else:
            os.utime(path, ns=(time_ns, time_ns), follow_symlinks=False)

    def _inside(self, parts: Sequence[str]) -> str:
        """The real path of a directory of the layer, its links followed as if the layer were all there is."""
        real: list[str] = []
        pending, links = list(parts), 0
        while pending:
            part = pending.pop(0)
            if part in ("", "."):
                continue
            if part == "..":
                real = real[:-1]
                continue
            here = os.path.join(self._root, *real, part)
            if os.path.islink(here):
                links += 1
                if links > _LINKS_MAX:
                    raise ValueError(f"{'/'.join(parts)!r} leads through too many links")
                target = os.readlink(here)
                real = [] if target.startswith("/") else real
                pending = [*target.split("/"), *pending]
            else:
                real.append(part)
        return os.path.join(self._root, *real)

    def _make_parents(self, directory: str) -> None:
        lacking = []
        while not os.path.isdir(directory):
            lacking.append(directory)
            directory = os.path.dirname(directory)
        for directory in reversed(lacking):
            self._make_parent(directory)

    def _make_parent(self, directory: str) -> None:
        _remove(directory)
        os.mkdir(directory, 0o755)
        name = os.path.relpath(directory, self._root)
        for lower in self._lower:
            known = os.path.join(lower, name)
            with contextlib.suppress(OSError):
                status = os.lstat(known)
                if stat.S_ISDIR(status.st_mode):
                    _copy_attributes(known, status, directory)
                    self._times[directory] = status.st_mtime_ns
                return


def _copy_attributes(source: str, status: os.stat_result, target: str) -> None:
    os.lchown(target, status.st_uid, status.st_gid)
    for name in os.listxattr(source, follow_symlinks=False):
        if not name.startswith("trusted.overlay."):
            _set_xattr(target, name, os.getxattr(source, name, follow_symlinks=False))
    os.chmod(target, status.st_mode & 0o7777)


def _set_xattr(path: str, name: str, value: bytes) -> None:
    """One that the file system does not take, or a link cannot have, is left out, as containerd does."""
    try:
        os.setxattr(path, name, value, follow_symlinks=False)
    except OSError as error:
        is_odd = error.errno == errno.EPERM and name.startswith("user.")
        if error.errno != errno.ENOTSUP and not is_odd:
            raise


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        remove_tree(Path(path))
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _parts(name: str) -> list[str]:
    """The parts of a name as if it were absolute: nothing leads above the root."""
    if "\0" in name:
        raise ValueError("a name with a NUL byte")
    parts: list[str] = []
    for part in name.split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    return parts


def _plain_name(name: str) -> str:
    if name in ("", ".", ".."):
        raise ValueError(f"a whiteout of {name!r}")
    return name


def _time_ns(member: tarfile.TarInfo) -> int:
    """Exact to the nanosecond where the header is; before 1970 counts as 1970."""
    text = member.pax_headers.get("mtime")
    seconds, _, fraction = (text or str(int(member.mtime))).partition(".")
    whole = int(seconds or 0) * 1_000_000_000
    return max(0, whole + int((fraction + "0" * 9)[:9]) if whole >= 0 else whole)
