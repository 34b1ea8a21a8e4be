"""A file of its own for a range of another file: shares the blocks where the file system can, else copies."""

import errno
import fcntl
import os
import struct
from pathlib import Path

from backend.publishing import sync_path
from rafs.record import BLOCK_SIZE, round_up

FICLONERANGE = 0x4020940D
CLONE_RANGE = struct.Struct("=qQQQ")
"""struct file_clone_range: source descriptor, source offset, length, target offset."""
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
        # Whole blocks; what is too much is cut off below.
        if offset % BLOCK_SIZE or not reflink(
            source, offset, round_up(size_bytes, BLOCK_SIZE), descriptor, 0
        ):
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


def reflink(source: int, offset: int, size_bytes: int, target: int, target_offset: int) -> bool:
    """Has `target` share whole blocks of `source`; False where the file system cannot. Raises `OSError`.

    Offsets and size in bytes, multiples of a block. A target that is too short gets longer. Blocking.
    """
    try:
        fcntl.ioctl(target, FICLONERANGE, CLONE_RANGE.pack(source, offset, size_bytes, target_offset))
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
