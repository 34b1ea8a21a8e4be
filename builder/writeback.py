"""Starts writing a file to the disk while it grows, so that the sync at the end has little left to do."""

import ctypes

_SYNC_FILE_RANGE_WRITE = 2
_STEP = 32 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class EarlyWriteback:
    """Asks the kernel for write-out every 32 MiB.

    A hint only: where the file system does not take it, whoever publishes the file still makes it durable.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._started = 0

    def advance(self, size_bytes: int) -> None:
        """The file has `size_bytes` now."""
        if size_bytes - self._started >= _STEP:
            _libc.sync_file_range(self._fd, self._started, size_bytes - self._started, _SYNC_FILE_RANGE_WRITE)
            self._started = size_bytes
