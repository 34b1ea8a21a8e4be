"""Serves an `ImageFilesystem` through libfuse with pyfuse3.

The image never changes, so the kernel is told to keep everything for ever: entries, attributes, names that
do not exist, file pages. Task and lock notes: docs/notes/pyfuse3.md. pyfuse3 keeps its session in globals:
one mount in a process at a time.
"""

import errno
import functools
import itertools
import logging
import os
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import pyfuse3
import trio

from fuse.errno_map import errno_of
from fuse.failure_log import FailureLog
from fuse.filesystem import ImageFilesystem, OpenFile
from fuse.inodetable import Attributes, Directory
from fuse.mountpoint import MountFailed

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

FOREVER_S = 10 * 365 * 86400
ENTRIES_PER_REPLY = 512
"""A listing yields to other requests after this many entries (about 1 ms)."""
LARGE_FILE_BYTES = 1 << 20
WORKERS_MAX = 256
"""Reads that wait for the network at once; more wait their turn."""
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True, slots=True)
class DriverOptions:
    """`source` is what `mount` and `df` show. `allow_other` lets all users in, which root may always ask."""

    source: str
    allow_other: bool
    debug: bool = False

    def for_libfuse(self) -> set[str]:
        """The mount options. A comma would start another option, so none may be in the source."""
        source = self.source.encode("ascii", "replace").decode().replace(",", "?").replace("\\", "?")
        options = {"ro", "noatime", "default_permissions", f"fsname={source}", "subtype=nydus-py"}
        if self.allow_other:
            options.add("allow_other")
        if self.debug:
            options.add("debug")
        return options


Handler = Callable[Concatenate["ImageOperations", P], Coroutine[Any, Any, T]]


def answered(handler: Handler[P, T]) -> Handler[P, T]:
    """Turns whatever a handler raises into an errno: an exception that leaves it would end the mount."""

    @functools.wraps(handler)
    async def wrapper(self: "ImageOperations", /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            raise self.failure(handler.__name__, error) from None

    return wrapper


def _refuse(number: int) -> Any:
    """A handler, of whatever operation, that always gives that errno."""

    async def refuse(self: "ImageOperations", *args: object) -> NoReturn:
        raise pyfuse3.FUSEError(number)

    return refuse


class ImageOperations(pyfuse3.Operations):
    """The handlers. Free of checkpoints but for `read` of what is not here yet."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, filesystem: ImageFilesystem) -> None:
        super().__init__()
        self._filesystem = filesystem
        self._files: dict[int, OpenFile] = {}
        self._directories: dict[int, Directory] = {}
        self._handles = itertools.count(1)
        self._absent = pyfuse3.EntryAttributes()
        self._absent.st_ino = pyfuse3.InodeT(0)
        self._absent.entry_timeout = FOREVER_S
        self._failures = FailureLog(log)

    def failure(self, operation: str, error: Exception) -> pyfuse3.FUSEError:
        """The answer for an exception; tells of the first one of its kind."""
        self._failures.note(operation, error)
        return pyfuse3.FUSEError(errno_of(error))

    @answered
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """The entry; one with inode 0 has the kernel remember that there is none."""
        found = self._filesystem.lookup(parent_inode, name)
        return self._absent if found is None else _entry(found)

    @answered
    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Attributes of an inode."""
        return _entry(self._filesystem.attributes(inode))

    @answered
    async def readlink(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileNameT:
        """Target of a symbolic link."""
        return pyfuse3.FileNameT(self._filesystem.readlink(inode))

    @answered
    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        """A handle for reading; pages that the kernel has stay valid."""
        if flags & WRITE_FLAGS:
            raise pyfuse3.FUSEError(errno.EROFS)
        handle = pyfuse3.FileHandleT(next(self._handles))
        self._files[handle] = self._filesystem.open_file(inode)
        return pyfuse3.FileInfo(fh=handle, keep_cache=True)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """Bytes of a file; written out because it is the hottest of all."""
        try:
            file = self._files[fh]
            data = self._filesystem.read_ready(file, off, size)
            if data is None:
                data = await self._filesystem.read(file, off, size)
            # No checkpoint from here to the reply: the view must not outlive the chunk.
            return data  # type: ignore[return-value]
        except Exception as error:
            raise self.failure("read", error) from None

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        """Forgets a handle."""
        self._files.pop(fh, None)

    @answered
    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        """A handle for listing."""
        handle = pyfuse3.FileHandleT(next(self._handles))
        self._directories[handle] = self._filesystem.open_directory(inode)
        return handle

    @answered
    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Entries with their attributes from `start_id` on. One object serves all: the reply is a copy."""
        entry = _blank_entry()
        reply = pyfuse3.readdir_reply
        entries = self._directories[fh].list_from(start_id)
        for name, attributes, place in itertools.islice(entries, ENTRIES_PER_REPLY):
            _fill(entry, attributes)
            if not reply(token, name, entry, place):
                break

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        """Forgets a handle."""
        self._directories.pop(fh, None)

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        """Nothing is counted: inode numbers follow from the image."""

    @answered
    async def getxattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext
    ) -> bytes:
        """Value of an attribute; an image without any has the kernel stop asking."""
        if not self._filesystem.has_xattrs:
            raise pyfuse3.FUSEError(errno.ENOSYS)
        value = self._filesystem.get_xattr(inode, name)
        if value is None:
            raise pyfuse3.FUSEError(errno.ENODATA)
        return value

    @answered
    async def listxattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> Sequence[pyfuse3.XAttrNameT]:
        """Names of attributes."""
        if not self._filesystem.has_xattrs:
            raise pyfuse3.FUSEError(errno.ENOSYS)
        return [pyfuse3.XAttrNameT(name) for name in self._filesystem.list_xattrs(inode)]

    @answered
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Size of the image; nothing is free."""
        size = self._filesystem.size()
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = size.block_size
        answer.f_blocks = size.blocks
        answer.f_bfree = answer.f_bavail = 0
        answer.f_files = size.files
        answer.f_ffree = answer.f_favail = 0
        answer.f_namemax = size.name_max
        return answer

    async def access(self, inode: pyfuse3.InodeT, mode: pyfuse3.ModeT, ctx: pyfuse3.RequestContext) -> bool:
        """Never asked: the kernel checks permissions itself (default_permissions)."""
        return True

    # ENOSYS is remembered by the kernel: it never asks again.
    flush = fsync = fsyncdir = poll = _refuse(errno.ENOSYS)
    setattr = mknod = mkdir = unlink = rmdir = symlink = rename = link = _refuse(errno.EROFS)
    create = write = setxattr = removexattr = _refuse(errno.EROFS)


def _blank_entry() -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    entry.entry_timeout = entry.attr_timeout = FOREVER_S
    return entry


def _entry(attributes: Attributes) -> pyfuse3.EntryAttributes:
    entry = _blank_entry()
    _fill(entry, attributes)
    return entry


def _fill(entry: pyfuse3.EntryAttributes, attributes: Attributes) -> None:
    """Every field that differs between inodes."""
    size = attributes.size
    entry.st_ino = attributes.ino
    entry.st_mode = attributes.mode
    entry.st_nlink = attributes.nlink
    entry.st_uid = attributes.uid
    entry.st_gid = attributes.gid
    entry.st_size = size
    entry.st_rdev = attributes.rdev
    entry.st_blocks = (size + 511) >> 9
    # Readers take this as their buffer size: a large one pays for large files only.
    entry.st_blksize = 131072 if size >= LARGE_FILE_BYTES else 4096
    entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = attributes.mtime_ns


async def serve(
    filesystem: ImageFilesystem,
    mountpoint: Path,
    options: DriverOptions,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Mounts and answers the kernel until somebody unmounts, or until cancelled; then unmounts.

    `task_status.started()` comes when the kernel may be asked; raises `MountFailed` before.
    """
    operations = ImageOperations(filesystem)
    try:
        pyfuse3.init(operations, os.fspath(mountpoint), options.for_libfuse())
    except RuntimeError as error:
        raise MountFailed(directory=mountpoint, why=f"{error}; libfuse says more above") from error
    try:
        task_status.started()
        await pyfuse3.main(max_tasks=WORKERS_MAX)
    finally:
        # libfuse closes its descriptor first, so this cannot wait for ourselves.
        pyfuse3.close(unmount=True)


def raise_readahead(mountpoint: Path, size_kib: int) -> None:
    """Has the kernel read ahead further than FUSE's 128 KiB: twice the speed. Blocking; asks the mount."""
    device = os.stat(mountpoint).st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    try:
        setting.write_text(str(size_kib))
    except OSError as error:
        log.info("%s: readahead stays small, large reads take longer: %s", setting, error.strerror)
