"""A file of its own for a range of another file: shares the blocks where the file system can, else copies."""

import errno
import fcntl
import os
import struct
from pathlib import Path

from backend.publishing import sync_path

FICLONERANGE = 0x4020940D
CLONE_RANGE = struct.Struct("=qQQQ")
"""struct file_clone_range: source descriptor, source offset, length, target offset."""
BLOCK_BYTES = 4096
STEP_BYTES = 64 << 20
NO_REFLINK = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS})


def clone_range(source: int, offset: int, size_bytes: int, target: Path, *, copies: bool) -> bool:
    """Makes `target` hold `size_bytes` bytes from `offset` of the descriptor `source`.

    Its bytes are durable before it has its name. Without `copies` only by sharing blocks; False where the
    file system cannot. Raises `OSError`. Blocking.
    """
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = target.with_name(f"{target.name}.{os.getpid()}.new")
    descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        if not _reflink(source, offset, size_bytes, descriptor):
            if not copies:
                fresh.unlink()
                return False
            _copy(source, offset, size_bytes, descriptor)
        os.ftruncate(descriptor, size_bytes)
        os.fsync(descriptor)
        os.rename(fresh, target)
        sync_path(target.parent)
        return True
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _reflink(source: int, offset: int, size_bytes: int, target: int) -> bool:
    if offset % BLOCK_BYTES:
        return False
    length = -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES  # whole blocks; the caller cuts the rest off
    try:
        fcntl.ioctl(target, FICLONERANGE, CLONE_RANGE.pack(source, offset, length, 0))
    except OSError as error:
        if error.errno in NO_REFLINK:
            return False
        raise
    return True


def _copy(source: int, offset: int, size_bytes: int, target: int) -> None:
    done = 0
    while done < size_bytes:
        step = min(STEP_BYTES, size_bytes - done)
        count = os.copy_file_range(source, target, step, offset + done, done)
        if count == 0:
            raise OSError(errno.EIO, "the file ends too early")
        done += count
