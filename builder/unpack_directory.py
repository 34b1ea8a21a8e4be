"""Unpacking into a directory that appears when it is complete."""

import errno
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Self

from backend.publishing import DiskFull, sync_path
from builder.unpack import CannotUnpack
from builder.unpack_staging import UnpackStaging
from rafs.errors import NydusError
from rafs.inode import Inode
from rafs.superblock import CHUNK_SIZE_MAX

_ZEROS = bytes(CHUNK_SIZE_MAX)


class DirectoryTarget:
    """Writes a tree beside `directory` and renames it there at the end, when it is durable.

    A context manager: leaving it with an error removes what was written; what a killed process left is
    removed by the next one that unpacks to the same parent directory. Raises `DiskFull` and `CannotUnpack`.
    Owners are set when running as root, like tar does; zero chunks become holes.
    """

    def __init__(self, directory: Path) -> None:
        """Raises `CannotUnpack` when `directory` exists and is not empty, or is no directory."""
        self._final = Path(os.path.realpath(directory))
        try:
            if self._final.exists() and (not self._final.is_dir() or any(self._final.iterdir())):
                raise CannotUnpack(path=directory, why="it exists and is not an empty directory")
            if self._final.is_mount():
                raise CannotUnpack(path=directory, why="it is a mount point; give a new directory inside it")
            self._final.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CannotUnpack(path=directory, why=error.strerror) from error
        self._is_root = os.geteuid() == 0
        self._directories: list[tuple[bytes, Inode, dict[bytes, bytes]]] = []
        self._file: tuple[int, bytes, Inode, dict[bytes, bytes]] | None = None
        self._position = 0

    def __enter__(self) -> Self:
        try:
            self._place = UnpackStaging(self._final.parent)
        except OSError as error:
            raise self._failure(b"", error) from error
        self._staging = os.fsencode(self._place.path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            os.close(self._file[0])
            self._file = None
        with self._place:  # removes what is still there
            if error is None:
                self._publish()

    def _publish(self) -> None:
        try:
            for target, inode, xattrs in reversed(self._directories):
                if target == self._staging + b"/":
                    # The last one: its mode may keep others from seeing that it is in use.
                    self._place.sync_file_system()
                self._set_metadata(target, inode, xattrs)
            self._place.sync()
            os.rename(self._staging, self._final)
            sync_path(self._final.parent)
        except OSError as error:
            raise self._failure(b"", error) from error

    def add(self, path: bytes, inode: Inode, xattrs: dict[bytes, bytes], symlink: bytes) -> None:
        """Creates it; a directory gets its final mode and time when all is written."""
        target = self._staging + path
        try:
            if inode.is_dir:
                if path != b"/":
                    os.mkdir(target, 0o700)
                self._directories.append((target, inode, xattrs))
                return
            if inode.is_symlink:
                os.symlink(symlink, target)
            else:
                os.mknod(target, inode.mode, inode.rdev)
            self._set_metadata(target, inode, xattrs)
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in a link's target
            raise self._failure(path, error) from error

    def add_link(self, path: bytes, inode: Inode, target: bytes) -> None:
        """Makes a hard link."""
        try:
            os.link(self._staging + target, self._staging + path, follow_symlinks=False)
        except OSError as error:
            raise self._failure(path, error) from error

    def begin_file(self, path: bytes, inode: Inode, xattrs: dict[bytes, bytes]) -> None:
        """Creates the file."""
        try:
            fd = os.open(
                self._staging + path,
                os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                0o600,
            )
        except OSError as error:
            raise self._failure(path, error) from error
        self._file = (fd, path, inode, xattrs)
        self._position = 0

    def write(self, chunk: bytes) -> None:
        """Writes at the end, or leaves a hole."""
        assert self._file is not None
        fd, path, _, _ = self._file
        view = memoryview(chunk)
        if _ZEROS.startswith(chunk):
            self._position += len(chunk)
            return
        while view:
            try:
                written = os.pwrite(fd, view, self._position)
            except OSError as error:
                raise self._failure(path, error) from error
            view = view[written:]
            self._position += written

    def end_file(self) -> None:
        """Sets size and metadata."""
        assert self._file is not None
        (fd, path, inode, xattrs), self._file = self._file, None
        try:
            os.ftruncate(fd, inode.size)
        except OSError as error:
            raise self._failure(path, error) from error
        finally:
            os.close(fd)
        self._set_metadata(self._staging + path, inode, xattrs)

    def _set_metadata(self, target: bytes, inode: Inode, xattrs: dict[bytes, bytes]) -> None:
        try:
            if self._is_root:
                os.chown(target, inode.uid, inode.gid, follow_symlinks=False)
            for name, value in xattrs.items():  # behind chown, which drops capabilities
                self._set_xattr(target, name, value)
            if not inode.is_symlink:  # behind the attributes, which need write permission
                os.chmod(target, stat.S_IMODE(inode.mode))
            time_ns = inode.mtime_s * 1_000_000_000 + inode.mtime_ns
            os.utime(target, ns=(time_ns, time_ns), follow_symlinks=False)
        except OSError as error:
            raise self._failure(target[len(self._staging) :], error) from error

    def _set_xattr(self, target: bytes, name: bytes, value: bytes) -> None:
        try:
            os.setxattr(target, name, value, follow_symlinks=False)
        except OSError as error:
            # As an ordinary user: `trusted.` and `security.` are root's, like owners.
            if self._is_root or error.errno != errno.EPERM:
                raise

    def _failure(self, path: bytes, error: OSError | ValueError) -> NydusError:
        """What to raise for `path` of the image; it lies in the target's directory for the user."""
        if not isinstance(error, OSError):
            return CannotUnpack(path=os.fsdecode(path), why=str(error))
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DiskFull(where=f"{self._final}{os.fsdecode(path)}", why=error.strerror)
        return CannotUnpack(path=os.fsdecode(path) or self._final, why=error.strerror or str(error))
