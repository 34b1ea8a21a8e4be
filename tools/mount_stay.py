"""`nydus-py mount --foreground`: the mount lives as long as this process, and the other way round."""

import os
import select
import signal
from pathlib import Path

from fuse.mount_table import MOUNTINFO, find_mount
from tools.settings import Settings
from tools.umount import unmount_image

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def catch_stop_signals() -> int:
    """From now on a signal to end does nothing but make the descriptor readable that this gives."""
    stop_read, stop_write = os.pipe()
    os.set_blocking(stop_write, False)
    signal.set_wakeup_fd(stop_write)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)
    return stop_read


def stay_until_unmounted(mountpoint: Path, settings: Settings, stop_read: int) -> None:
    """Returns when somebody has unmounted; a signal to end unmounts, although a file may be open."""
    table = os.open(MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC)
    changes = select.poll()
    changes.register(stop_read, select.POLLIN)
    changes.register(table, select.POLLPRI)  # the kernel's sign that the table has changed
    while find_mount(mountpoint) is not None:
        if any(descriptor == stop_read for descriptor, _ in changes.poll()):
            unmount_image(mountpoint, settings, lazy=True)
            return
