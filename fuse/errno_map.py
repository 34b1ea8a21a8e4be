"""What a reader of a mount gets for an exception. The only place that decides this."""

import errno

from rafs.errors import NydusError


def errno_of(error: BaseException) -> int:
    """The errno for an exception of ours, of the system, or for a fault (EIO)."""
    if isinstance(error, NydusError):
        return error.errno
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.EMFILE, errno.ENFILE):
        return error.errno
    # Whatever else a system call says is about our files, not about the one that was asked for.
    return errno.EIO


def is_fault(error: BaseException) -> bool:
    """Whether the exception is a fault of ours, which deserves a traceback."""
    return not isinstance(error, NydusError | OSError | MemoryError)
