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
METADATA = struct.Struct("=IBBHQii")
"""struct fanotify_event_metadata: length, version, reserved, metadata length, mask, descriptor, pid."""
HAND_OFFSET = EVENT_NUMBERS * SLOT.size
"""Behind the slots: where the kernel itself writes the event that is read, so that it is known at once."""
RESPONSE = struct.Struct("=iI")
"""struct fanotify_response: descriptor number of the event, answer."""
FAN_DENY_EIO = 0x02 | errno.EIO << 24
"""FAN_DENY with an errno (Linux 6.13). The kernel itself asks again after a denied readahead."""

assert SLOT.size == 40


def take_back(entries: Iterable[Entry]) -> int:
    """Has the kernel send again what it can, and denies the events that no successor knows of: how many."""
    denied = 0
    for entry in entries:
        if entry.kind == KIND_FUSE:
            resend(entry.descriptors[0])
        elif entry.kind == KIND_EVENTS:
            denied += deny_forgotten(*entry.descriptors[:2])
    return denied


def resend(device: int) -> None:
    """Has unanswered requests of a FUSE mount sent again. Once for each death, never otherwise."""
    # EINVAL: a kernel before 6.9. ENODEV, ECONNABORTED: unmounted. EAGAIN: not yet mounted.
    with contextlib.suppress(OSError):
        os.write(device, RESEND)


def deny_forgotten(group: int, journal: int) -> int:
    """Denies every event that was taken and is not in the journal, and says how many there were.

    There is none unless the journal is wrong. An unanswered one would block its reader for ever, and might be
    answered in place of a later event that gets the same number.
    """
    denied = 0
    memory = os.pread(journal, HAND_OFFSET + METADATA.size, 0)
    in_hand = number_in_hand(memory, HAND_OFFSET)
    for number in range(EVENT_NUMBERS):
        if memory[number * SLOT.size] or number == in_hand:
            continue
        try:
            os.write(group, RESPONSE.pack(number, FAN_DENY_EIO))
            denied += 1
        except OSError as error:
            if error.errno != errno.ENOENT:  # ENOENT: no such event
                raise
    return denied


def number_in_hand(memory: bytes | memoryview, at: int) -> int | None:
    """The descriptor number of the event that was read last and is not noted yet, if there is one."""
    length, *_, number, _ = METADATA.unpack_from(memory, at)
    return number if length and number >= 0 else None
