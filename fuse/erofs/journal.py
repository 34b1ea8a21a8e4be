"""Which events an agent has taken and not answered: shared memory that outlives it.

One slot for each descriptor number. An agent notes an event before it waits for anything, and clears it when
it is answered. Its successor serves what it finds here, and answers by the number; meanwhile it keeps the
number occupied, since an answer meant for one event would release another that got the same number.
"""

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass

from fuse.supervisor.aftermath import EVENT_NUMBERS, SLOT

ATTEMPTS_MAX = 20
"""An event that has seen so many agents die may be what kills them: it is denied."""


@dataclass(frozen=True, slots=True)
class Pending:
    """An event that was taken: `number` was its descriptor; which file, and which bytes of it."""

    number: int
    attempts: int
    device: int
    inode: int
    offset: int
    size: int


class Journal:
    """The slots. Every method is a few memory accesses, free of checkpoints."""

    def __init__(self, descriptor: int) -> None:
        """Maps the memory file; use `create_memory` for a new one. The caller keeps the descriptor."""
        self._slots = mmap.mmap(descriptor, EVENT_NUMBERS * SLOT.size)

    def note(self, number: int, device: int, inode: int, offset: int, size: int, attempts: int = 0) -> None:
        """Notes an event. The mark of use comes last: what is half written does not count."""
        at = number * SLOT.size
        SLOT.pack_into(self._slots, at, 0, attempts, device, inode, offset, size)
        self._slots[at] = 1

    def clear(self, number: int) -> None:
        """Forgets an event that is answered."""
        self._slots[number * SLOT.size] = 0

    def pending(self) -> Iterator[Pending]:
        """What is noted."""
        for number in range(EVENT_NUMBERS):
            at = number * SLOT.size
            if self._slots[at]:
                _, attempts, device, inode, offset, size = SLOT.unpack_from(self._slots, at)
                yield Pending(number, attempts, device, inode, offset, size)

    def close(self) -> None:
        """Unmaps the memory."""
        self._slots.close()


def create_memory() -> int:
    """A new memory file for a journal."""
    descriptor = os.memfd_create("nydus-py-events", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, EVENT_NUMBERS * SLOT.size)
    return descriptor
