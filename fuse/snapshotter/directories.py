"""The directories of the snapshots: `snapshots/<id>/fs` has the files, `work` beside it is overlayfs's own.

One is made under its number before the ledger has the number, and is moved away after the ledger has
forgotten it, before its files go: whatever instant the process dies at, what `sweep` removes is rubbish.
"""

import errno
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from fuse.mountpoint import NothingMounted, unmount
from fuse.snapshotter.failures import NoRoom, RootUnusable, SnapshotError
from rafs.errors import NydusError

log = logging.getLogger(__name__)

_DOOMED = "removed-"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Usage(NamedTuple):
    """Disk space in bytes, and files."""

    size_bytes: int
    inodes: int


class Directories:
    """See above. Safe in many threads."""

    def __init__(self, root: Path) -> None:
        """Makes the root, for root alone. Raises `RootUnusable`."""
        self.root = root
        self._snapshots = root / "snapshots"
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._snapshots.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise RootUnusable(where=root, why=error.strerror) from error

    def place(self, number: int) -> Path:
        """The directory of a snapshot, in which `fs` is."""
        return self._snapshots / str(number)

    def files(self, number: int) -> Path:
        """Where the files of a snapshot are, or where an image is mounted."""
        return self._snapshots / str(number) / "fs"

    def work(self, number: int) -> Path:
        """The directory that overlayfs wants beside an upper one."""
        return self._snapshots / str(number) / "work"

    def create(self, number: int, owner_of: Path | None, *, has_work: bool) -> None:
        """Makes the directories of a new snapshot; the owner of the root is that of `owner_of`.

        Raises `NoRoom`, and `SnapshotError` for another fault of the disk; nothing is left then.
        """
        top = self._snapshots / str(number)
        try:
            with reporting_disk(top):
                top.mkdir(mode=0o700)
                self.files(number).mkdir()
                self.files(number).chmod(0o755)
                if has_work:
                    self.work(number).mkdir(mode=0o711)
                if owner_of is not None:
                    owner = owner_of.stat()
                    os.chown(self.files(number), owner.st_uid, owner.st_gid)
        except BaseException:
            with suppress(OSError):
                remove_tree(top)
            raise

    def replace_files(self, number: int, filled: Path) -> None:
        """Puts the directory `filled` in the place of that of a snapshot, which nobody has mounted yet."""
        place = self.files(number)
        with reporting_disk(filled):
            if os.listdir(place):  # by a process that was killed before it could write that down
                remove_tree(place)
            os.rename(filled, place)

    def doom(self, number: int) -> None:
        """Moves away what the ledger has forgotten; `sweep` removes it."""
        with suppress(FileNotFoundError):
            os.rename(self._snapshots / str(number), self._snapshots / f"{_DOOMED}{number}")

    def discard(self, number: int) -> None:
        """Removes a directory that was made, and did not get into the ledger."""
        self._remove(self.place(number))

    def sweep(self, known: Callable[[], set[int]]) -> None:
        """Removes every directory whose number is not `known`, to the ledger or as one that is being made.

        That is asked after they were listed, so that a new one is never taken for rubbish. What cannot be
        removed stays, with a warning. Raises `SnapshotError` when they cannot be listed.
        """
        with reporting_disk(self._snapshots):
            names = os.listdir(self._snapshots)
        kept = known()
        for name in names:
            if not (name.isdecimal() and int(name) in kept):
                self._remove(self._snapshots / name)

    def _remove(self, top: Path) -> None:
        try:
            detach_mounts(top / "fs")
            remove_tree(top)
        except (OSError, NydusError) as error:
            log.warning("%s is not removed: %s", top, error)


def remove_tree(top: Path) -> None:
    """Removes a directory, if it is there, and all in it; not what is mounted in it. Raises `OSError`.

    By rm(1): a container can make directories deeper than `shutil.rmtree`, which recurses, ever comes, and
    with longer paths than the kernel takes at once.
    """
    command = ["rm", "-rf", "--one-file-system", "--", os.fspath(top)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise OSError(errno.EIO, lines[0] if lines else f"rm ended with {done.returncode}", os.fspath(top))


def detach_mounts(directory: Path) -> None:
    """Leaves nothing mounted at `directory`. Raises `UnmountFailed`."""
    with suppress(NothingMounted):
        while True:
            unmount(directory, lazy=True)


@contextmanager
def reporting_disk(where: Path) -> Iterator[None]:
    """Turns a full disk into `NoRoom`, and what else a disk says into a `SnapshotError`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise NoRoom(where=where, why=error.strerror) from error
        raise SnapshotError(why=f"{error.filename or where}: {error.strerror}") from error


def disk_usage(top: Path) -> Usage:
    """What a tree takes, each file once whatever its names; as containerd counts it. Raises as above."""
    seen: set[int] = set()
    size_bytes = 0
    with reporting_disk(top):
        pending = [os.fspath(top)]
        status = os.lstat(top)
        seen.add(status.st_ino)
        size_bytes += status.st_blocks * 512
        while pending:
            for entry in _entries(pending.pop()):
                with suppress(FileNotFoundError):  # a container may be running in it
                    status = entry.stat(follow_symlinks=False)
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    if status.st_ino not in seen:
                        seen.add(status.st_ino)
                        size_bytes += status.st_blocks * 512
    return Usage(size_bytes, len(seen))


def _entries(directory: str) -> list[os.DirEntry[str]]:
    """What is in a directory; nothing when it has just gone."""
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except FileNotFoundError:
        return []
