"""Tells when the kernel's table of mounts changes."""

import os
import select

import trio

from fuse.mount_table import MOUNTINFO


class MountWatch:
    """One task (`run`), with a thread of its own, waits for the kernel; any number of others for `changed`.

    Take `changed` first, look at the table second, wait third.
    """

    def __init__(self) -> None:
        self.changed = trio.Event()

    async def run(self) -> None:
        """Watches until cancelled."""
        token = trio.lowlevel.current_trio_token()
        stop = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_write_at_end, stop)
                await trio.to_thread.run_sync(self._watch, token, stop)
        finally:
            os.close(stop)

    def _watch(self, token: trio.lowlevel.TrioToken, stop: int) -> None:
        """In a thread, by poll(2): the table forgets a change once it has told of it, and an epoll inside
        the loop's epoll asks it twice for each that it reports.
        """
        table = os.open(MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC)
        try:
            changes = select.poll()
            changes.register(table, select.POLLPRI)
            changes.register(stop, select.POLLIN)
            while not any(descriptor == stop for descriptor, _ in changes.poll()):
                token.run_sync_soon(self._tell)
        finally:
            os.close(table)

    def _tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


async def _write_at_end(stop: int) -> None:
    try:
        await trio.sleep_forever()
    finally:
        os.eventfd_write(stop, 1)
