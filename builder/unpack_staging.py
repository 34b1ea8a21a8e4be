"""Where a tree is unpacked before it gets its name.

The idea of `backend.publishing`, for a directory of the user's and for whole trees: its owner holds an flock
on the staging directory, so that what a killed process left is told apart from what another one is writing.
The names are our own, because everything of that name that nobody holds is removed.
"""

import contextlib
import ctypes
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

_PREFIX = ".nydus-py-unpack-"
_SUFFIX = ".partial"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syncfs.argtypes = (ctypes.c_int,)


class UnpackStaging:
    """A new, locked directory in `parent`, after leftovers of dead processes there were removed.

    A context manager: leaving it removes the directory, unless it was renamed, and unlocks it.
    """

    def __init__(self, parent: Path) -> None:
        """Raises `OSError`."""
        remove_abandoned(parent)
        self.path, self._lock = _create_locked(parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _remove(self.path)
        os.close(self._lock)

    def sync_file_system(self) -> None:
        """Makes everything in it durable: one call for a tree of any size. Raises `OSError`."""
        if _libc.syncfs(self._lock):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def sync(self) -> None:
        """Makes the directory itself durable, wherever it is named. Raises `OSError`."""
        os.fsync(self._lock)


def remove_abandoned(parent: Path) -> None:
    """Removes the staging directories in `parent` that no living process holds."""
    for entry in parent.glob(f"{_PREFIX}*{_SUFFIX}"):
        try:
            lock = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # not a directory, not ours, or gone in the meantime
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(entry)
        except OSError:
            pass  # in use, or a file system without locks
        finally:
            os.close(lock)


def _create_locked(parent: Path) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX, dir=parent))
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # swept by another process before it was locked
        with contextlib.suppress(OSError):  # without locks nothing is swept either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path, lock
        os.close(lock)


def _remove(path: Path) -> None:
    """Removes a tree; directories that an image closed to their owner are opened first."""
    if os.geteuid() != 0:
        for folder, names, _ in os.walk(path):
            for name in names:
                inner = os.path.join(folder, name)
                with contextlib.suppress(OSError):
                    if stat.S_ISDIR(os.lstat(inner).st_mode):
                        os.chmod(inner, stat.S_IRWXU)
    shutil.rmtree(path, ignore_errors=True)
