"""Tells when the kernel's table of mounts changes."""

import os
import select
from pathlib import Path

import trio

MOUNTINFO = Path("/proc/self/mountinfo")


class MountWatch:
    """One task (`run`) waits for the kernel; any number of others wait for `changed`.

    Take `changed` first, look at the table second, wait third.
    """

    def __init__(self) -> None:
        self.changed = trio.Event()

    async def run(self) -> None:
        """Watches until cancelled."""
        table = os.open(MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC)
        # The file is always readable; a change is a POLLPRI, which an epoll of its own turns into readable.
        with select.epoll() as changes:
            try:
                changes.register(table, select.EPOLLPRI | select.EPOLLERR | select.EPOLLET)
                while True:
                    await trio.lowlevel.wait_readable(changes.fileno())
                    changes.poll(0)
                    self.changed.set()
                    self.changed = trio.Event()
            finally:
                os.close(table)
