"""What the kernel still expects from an agent that has died, taken back before its successor begins.

Must run after the dead one was reaped (none of its threads can touch a descriptor any more) and before the
successor reads. A FUSE request that was read and not answered comes again after FUSE_NOTIFY_RESEND (Linux
6.9). A fanotify event that was read can be answered by anybody who has the group, by the number that its
descriptor had in the dead process.
"""

import contextlib
import errno
import os
import struct
from collections.abc import Iterable

from fuse.supervisor.holdings import KIND_EVENTS, KIND_FUSE, Entry

RESEND = struct.pack("<IiQ", 16, 7, 0)
"""struct fuse_out_header: 16 bytes, FUSE_NOTIFY_RESEND (7) in place of an error, no request."""

EVENT_NUMBERS = 1 << 16
"""Descriptor numbers that events may have: an agent never has more descriptors (see `SLOT`)."""
SLOT = struct.Struct("<IIQQQQ")
"""One event in the journal, at its descriptor number: in use, attempts, device, inode, offset, size."""
RESPONSE = struct.Struct("=iI")
"""struct fanotify_response: descriptor number of the event, answer."""
FAN_DENY_EIO = 0x02 | errno.EIO << 24
"""FAN_DENY with an errno (Linux 6.13). The kernel itself asks again after a denied readahead."""

assert SLOT.size == 40


def take_back(entries: Iterable[Entry]) -> None:
    """Has the kernel send again what it can, and denies the events that no successor knows of."""
    for entry in entries:
        if entry.kind == KIND_FUSE:
            resend(entry.descriptors[0])
        elif entry.kind == KIND_EVENTS:
            deny_forgotten(*entry.descriptors[:2])


def resend(device: int) -> None:
    """Has unanswered requests of a FUSE mount sent again. Once for each death, never otherwise."""
    # EINVAL: a kernel before 6.9. ENODEV, ECONNABORTED: unmounted. EAGAIN: not yet mounted.
    with contextlib.suppress(OSError):
        os.write(device, RESEND)


def deny_forgotten(group: int, journal: int) -> None:
    """Denies every event that was taken and is not in the journal: the kernel asks again.

    An unanswered one would block its reader for ever, and might be answered in place of a later event
    that gets the same number.
    """
    slots = os.pread(journal, EVENT_NUMBERS * SLOT.size, 0)
    for number in range(EVENT_NUMBERS):
        at = number * SLOT.size
        if at < len(slots) and slots[at]:
            continue
        try:
            os.write(group, RESPONSE.pack(number, FAN_DENY_EIO))
        except OSError as error:
            if error.errno != errno.ENOENT:  # ENOENT: no such event
                raise
