"""How files become visible: whole, durable and in one step, or not at all.

Unfinished files live in a staging directory beside their final place. Its owner holds an flock on it,
so that what a killed process left behind is told apart from what another one is just writing.
"""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from backend.contract import BackendError

STAGING_PREFIX = ".staging-"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class CannotWrite(BackendError):
    """The file system refused a write, a rename or a new directory."""

    message = "{where}: cannot write: {why}"
    exit_code: ClassVar[int] = 110


class DiskFull(CannotWrite):
    """No space (or no quota) is left; what was written so far has been removed again."""

    message = "{where}: cannot write: {why}; free some space or choose another place, then run it again"
    exit_code = 45
    errno = errno.ENOSPC
    retryable = True


@contextmanager
def reporting_writes(where: Path) -> Iterator[None]:
    """Turns an `OSError` of the body into `DiskFull` or `CannotWrite`."""
    try:
        yield
    except OSError as error:
        kind = DiskFull if error.errno in _NO_SPACE else CannotWrite
        raise kind(where=where, why=error.strerror or str(error)) from error


@contextmanager
def staging_directory(parent: Path) -> Iterator[Path]:
    """A new, locked directory in `parent` (made if missing) for files that are not ready yet.

    Leftovers of processes that died are removed on entry, the directory itself on exit, unless
    `publish_directory` has moved it away. Raises `CannotWrite`.
    """
    with reporting_writes(parent):
        parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(parent)
        path, lock = _create_locked(parent)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def remove_abandoned(parent: Path) -> None:
    """Removes the staging directories in `parent` that no living process holds."""
    for entry in parent.glob(STAGING_PREFIX + "*"):
        try:
            lock = os.open(entry, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue  # not a directory, not ours, or gone in the meantime
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(entry, ignore_errors=True)
        except OSError:
            pass  # in use
        finally:
            os.close(lock)


def _create_locked(parent: Path) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=parent))
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # swept by another process before it was locked
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink > 0 and path.exists():
            return path, lock
        os.close(lock)


def publish_file(staged: Path, final: Path) -> None:
    """Gives a finished file its name, replacing what had it; durable on return. Raises `CannotWrite`."""
    with reporting_writes(final):
        sync_path(staged)
        os.replace(staged, final)
        sync_path(final.parent)


def publish_directory(staged: Path, final: Path) -> bool:
    """Gives a finished flat directory its name; durable on return. Raises `CannotWrite`.

    False when `final` is there already: another process was first, its files stay, `staged` too.
    """
    with reporting_writes(final):
        for entry in staged.iterdir():
            sync_path(entry)
        sync_path(staged)
        try:
            os.rename(staged, final)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                return False
            raise
        sync_path(final.parent)
        return True


def write_atomically(final: Path, data: bytes, staging: Path) -> None:
    """Makes `data` the content of `final` in one step, by way of `staging`. Raises `CannotWrite`."""
    staged = staging / final.name
    with reporting_writes(final):
        staged.write_bytes(data)
    publish_file(staged, final)


def sync_path(path: Path) -> None:
    """Makes a file's bytes, or a directory's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
