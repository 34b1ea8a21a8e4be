"""Mount points: fit to be mounted on, left behind by a dead process, and unmounting. Blocking."""

import ctypes
import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from fuse.mount_table import find_mount
from rafs.errors import NydusError

FUSE_DEVICE = Path("/dev/fuse")
MNT_DETACH = 2


class MountpointMissing(NydusError):
    """The mount point does not exist."""

    message = "{directory}: no such directory; create it first"
    exit_code: ClassVar[int] = 72
    errno: ClassVar[int] = errno.ENOENT


class MountpointNotDirectory(NydusError):
    """The mount point is something else."""

    message = "{directory}: not a directory"
    exit_code: ClassVar[int] = 73
    errno: ClassVar[int] = errno.ENOTDIR


class MountpointNotEmpty(NydusError):
    """Mounting would hide files."""

    message = "{directory}: not empty; mounting would hide what is in it, choose an empty directory"
    exit_code: ClassVar[int] = 74
    errno: ClassVar[int] = errno.ENOTEMPTY


class AlreadyMounted(NydusError):
    """An image is mounted there, and alive."""

    message = "{directory}: {source} is mounted here already; `nydus-py umount {directory}` first"
    exit_code: ClassVar[int] = 75
    errno: ClassVar[int] = errno.EBUSY


class FuseUnavailable(NydusError):
    """The kernel or the container does not let us use FUSE."""

    message = "FUSE cannot be used: {why}"
    exit_code: ClassVar[int] = 76
    errno: ClassVar[int] = errno.ENODEV


class MountpointForbidden(NydusError):
    """The user may not mount there."""

    message = "{directory}: no permission to mount here; it must be a directory that you may write to"
    exit_code: ClassVar[int] = 77
    errno: ClassVar[int] = errno.EACCES


class MountFailed(NydusError):
    """The kernel or fusermount3 said no, for a reason that only it knows."""

    message = "{directory}: mounting failed: {why}"
    exit_code: ClassVar[int] = 78


class MountBusy(NydusError):
    """Somebody still uses the mount."""

    message = "{directory}: still in use{by}; stop that, or detach it with --lazy"
    exit_code: ClassVar[int] = 79
    errno: ClassVar[int] = errno.EBUSY
    retryable = True


class NothingMounted(NydusError):
    """There is nothing to unmount."""

    message = "{directory}: nothing is mounted here"
    exit_code: ClassVar[int] = 80
    errno: ClassVar[int] = errno.EINVAL


class UnmountFailed(NydusError):
    """Unmounting failed for another reason than use."""

    message = "{directory}: unmounting failed: {why}"
    exit_code: ClassVar[int] = 81


def real_path(directory: Path) -> Path:
    """Absolute, without links before the last name; the directory itself is not touched, it may be dead."""
    absolute = Path(os.path.abspath(directory))
    return absolute.parent.resolve() / absolute.name


def prepare_mountpoint(directory: Path) -> Path:
    """Makes sure that an image can be mounted at `directory` and returns its real path.

    A mount that a dead process left behind is detached. Raises `MountpointMissing`, `MountpointNotDirectory`,
    `MountpointNotEmpty`, `AlreadyMounted`, `MountpointForbidden`.
    """
    path = real_path(directory)
    if path.is_symlink():
        path = path.resolve()
    while (mount := find_mount(path)) is not None:
        if not (mount.filesystem.startswith("fuse") and is_dead(path)):
            if mount.is_ours:
                raise AlreadyMounted(directory=directory, source=mount.source)
            break
        unmount(path, lazy=True)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISDIR(mode):
            raise MountpointNotDirectory(directory=directory)
        with os.scandir(path) as entries:
            if any(entries):
                raise MountpointNotEmpty(directory=directory)
    except FileNotFoundError as error:
        raise MountpointMissing(directory=directory) from error
    except NotADirectoryError as error:
        raise MountpointNotDirectory(directory=directory) from error
    except PermissionError as error:
        raise MountpointForbidden(directory=directory) from error
    if not os.access(path, os.W_OK):
        raise MountpointForbidden(directory=directory)
    return path


def is_dead(path: Path) -> bool:
    """Whether the process behind the FUSE mount at `path` is gone.

    `stat` would not tell: the kernel keeps attributes for ever. It asks for `statfs` every time.
    """
    try:
        os.statvfs(path)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def require_fuse(device: Path = FUSE_DEVICE) -> None:
    """Raises `FuseUnavailable` with the reason when this process cannot mount with FUSE."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError as error:
        raise FuseUnavailable(why=f"there is no {device}; load the kernel module fuse") from error
    except OSError as error:
        advice = "mount as root, or let this user (in a container: give it the device) open it"
        raise FuseUnavailable(why=f"{device}: {error.strerror}; {advice}") from error
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise FuseUnavailable(why="fusermount3 is not installed and you are not root; install fuse3")


def unmount(directory: Path, *, lazy: bool = False) -> None:
    """Unmounts the topmost mount at `directory`; `lazy` detaches it although somebody uses it.

    Raises `NothingMounted`, `MountBusy` with the processes that could be found, `UnmountFailed`. Never call
    it from the thread that serves the mount.
    """
    path = real_path(directory)
    if find_mount(path) is None:
        path = path if is_dead(path) else path.resolve()
        if find_mount(path) is None:
            raise NothingMounted(directory=directory)
    if os.geteuid() == 0:
        _umount2(path, directory, MNT_DETACH if lazy else 0)
    else:
        _fusermount(path, directory, lazy)


def _umount2(path: Path, directory: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), flags) == 0:
        return
    number = ctypes.get_errno()
    if number == errno.EBUSY:
        raise MountBusy(directory=directory, by=_describe(find_users(path)))
    raise UnmountFailed(directory=directory, why=os.strerror(number))


def _fusermount(path: Path, directory: Path, lazy: bool) -> None:
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", os.fspath(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    if "busy" in done.stderr:
        raise MountBusy(directory=directory, by=_describe(find_users(path)))
    why = (done.stderr.strip() or "no reason given").splitlines()[-1]
    raise UnmountFailed(directory=directory, why=why)


def _describe(users: list[int]) -> str:
    return f" by process {', '.join(map(str, users))}" if users else ""


def find_users(path: Path) -> list[int]:
    """Processes that have a directory, an open file or a mapping under `path`, as far as we may look."""
    root = os.fspath(path)
    inside = (root, root + "/")
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and any(
            used == inside[0] or used.startswith(inside[1]) for used in _paths_used(process)
        ):
            found.append(int(process.name))
    return sorted(found)


def _paths_used(process: Path) -> Iterator[str]:
    for link in ("cwd", "root", "exe"):
        yield from _target(process / link)
    for folder in ("fd", "map_files"):
        try:
            links = list((process / folder).iterdir())
        except OSError:
            continue
        for link_path in links:
            yield from _target(link_path)


def _target(link: Path) -> Iterator[str]:
    try:
        yield os.readlink(link)
    except OSError:
        return
