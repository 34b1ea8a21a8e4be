"""Which events an agent has taken and not answered: shared memory that outlives it.

One slot for each descriptor number, and the hand: the kernel writes the event that is read straight into this
memory, so that there is no moment at which only the agent knows of it. From the hand an event goes to its
slot, which adds whose file it is, and the slot is cleared when it is answered. The successor serves what it
finds here, and answers by the number; meanwhile it keeps the number occupied, since an answer meant for one
event would release another that got the same number.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from fuse.erofs.fanotify import EVENT_SIZE, Event, unpack_event
from fuse.supervisor.aftermath import EVENT_NUMBERS, HAND_OFFSET, SLOT, number_in_hand

ATTEMPTS_MAX = 20
"""An event that has seen so many agents die may be what kills them: it is denied."""

_SIZE = HAND_OFFSET + EVENT_SIZE
_LENGTH_SIZE = 4
"""Of `fanotify_event_metadata.event_len`, which no event has as 0: an empty hand."""
_ATTEMPTS, _ATTEMPTS_OFFSET = struct.Struct("<I"), 4
"""Of a slot: one aligned access, so that the mark of use stays."""


@dataclass(frozen=True, slots=True)
class Pending:
    """An event that was taken: `number` was its descriptor; which file, and which bytes of it.

    The inode is 0 for one that was in the hand only: its descriptor, and so its file, went with the agent.
    """

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
        self._slots = mmap.mmap(descriptor, _SIZE)
        self._hand = memoryview(self._slots)[HAND_OFFSET : HAND_OFFSET + EVENT_SIZE]

    def take(self, group: int) -> Event:
        """Reads one event into the hand. Raises what `read` raises. For one thread."""
        os.readv(group, [self._hand])
        return unpack_event(self._hand)

    def note(self, number: int, device: int, inode: int, offset: int, size: int) -> None:
        """Notes an event, then empties the hand.

        The mark of use comes after the values: what is half written does not count.
        """
        at = number * SLOT.size
        SLOT.pack_into(self._slots, at, 0, 0, device, inode, offset, size)
        self._slots[at] = 1
        self._hand[:_LENGTH_SIZE] = bytes(_LENGTH_SIZE)

    def count_attempt(self, number: int) -> None:
        """Notes that one more agent takes an event up."""
        at = number * SLOT.size + _ATTEMPTS_OFFSET
        (attempts,) = _ATTEMPTS.unpack_from(self._slots, at)
        _ATTEMPTS.pack_into(self._slots, at, attempts + 1)

    def clear(self, number: int) -> None:
        """Forgets an event that is answered."""
        self._slots[number * SLOT.size] = 0

    def adopt_hand(self) -> None:
        """Notes what a dead agent had in its hand."""
        number = number_in_hand(self._hand, 0)
        if number is None:
            return
        # The hand is emptied after the slot is filled: an event that has a slot already belongs there.
        if not self._slots[number * SLOT.size]:
            event = unpack_event(self._hand)
            self.note(number, 0, 0, event.offset, event.size)

    def pending(self) -> Iterator[Pending]:
        """What is noted."""
        for number in range(EVENT_NUMBERS):
            at = number * SLOT.size
            if self._slots[at]:
                _, attempts, device, inode, offset, size = SLOT.unpack_from(self._slots, at)
                yield Pending(number, attempts, device, inode, offset, size)

    def close(self) -> None:
        """Unmaps the memory."""
        self._hand.release()
        self._slots.close()


def create_memory() -> int:
    """A new memory file for a journal."""
    descriptor = os.memfd_create("nydus-py-events", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, _SIZE)
    return descriptor
