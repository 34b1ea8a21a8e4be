"""Notices when somebody shortens a cache file that is complete, and so is not watched by fanotify any more.

Then the kernel would read zeros behind the new end. The file is marked again, and its reads are denied.

Concurrency: one task (`run`); `add` and `remove` belong to the same thread.
"""

import ctypes
import os
import struct
from collections.abc import Callable

import trio

IN_MODIFY = 0x2
"""inotify(7): also when a file is truncated."""
EVENT = struct.Struct("=iIII")
"""struct inotify_event: watch, mask, cookie, length of a name, which a watched file does not have."""
EVENTS_AT_ONCE = 64


class LengthWatch:
    """Watches files by their descriptors."""

    def __init__(self, on_change: Callable[[int], None]) -> None:
        """`on_change` gets the descriptor of a file that was written to or truncated."""
        self._on_change = on_change
        self._inotify = -1
        self._watches: dict[int, int] = {}

    def add(self, descriptor: int) -> None:
        """Watches a file. Raises `OSError`."""
        if self._inotify < 0:
            self._inotify = _checked(_libc().inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
        path = f"/proc/self/fd/{descriptor}".encode()
        self._watches[_checked(_libc().inotify_add_watch(self._inotify, path, IN_MODIFY))] = descriptor

    def remove(self, descriptor: int) -> None:
        """Watches a file no longer; one that is not watched does not matter."""
        for watch, watched in list(self._watches.items()):
            if watched == descriptor:
                _libc().inotify_rm_watch(self._inotify, watch)
                del self._watches[watch]

    async def run(self) -> None:
        """Tells of changes until cancelled."""
        if self._inotify < 0:
            self._inotify = _checked(_libc().inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
        try:
            while True:
                await trio.lowlevel.wait_readable(self._inotify)
                data = os.read(self._inotify, EVENTS_AT_ONCE * EVENT.size)
                changed = {self._watches.get(watch) for watch, *_ in EVENT.iter_unpack(data)}
                for descriptor in changed - {None}:
                    assert descriptor is not None
                    self._on_change(descriptor)
        finally:
            os.close(self._inotify)
            self._inotify = -1


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"inotify: {os.strerror(number)}")
    return result


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
