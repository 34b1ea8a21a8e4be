"""How large files are open: shared memory that outlives the agent.

The kernel fails an open in one mode while the file is open in the other, so whoever answers OPEN must know. A
count may be too high after a death, never too low: then a file stays in the ordinary mode, which is harmless.
"""

import mmap
import os
import struct

SLOT = struct.Struct("<QII")
"""Node, opens in the ordinary mode, backing id (0: none). Filled from the start; node 0 is a free slot."""
SLOTS = 1 << 16


class LedgerFull(Exception):
    """More large files than there are slots."""


class OpenLedger:
    """The slots. The caller sees to it that one thread uses them at a time."""

    def __init__(self, descriptor: int) -> None:
        """Maps the memory file; the caller keeps the descriptor."""
        self._memory = mmap.mmap(descriptor, SLOTS * SLOT.size)
        self._places: dict[int, int] = {}
        for place in range(0, SLOTS * SLOT.size, SLOT.size):
            node, _, _ = SLOT.unpack_from(self._memory, place)
            if node == 0:
                break
            self._places[node] = place

    def read(self, node: int) -> tuple[int, int]:
        """(opens in the ordinary mode, backing id) of a file."""
        place = self._places.get(node)
        return (0, 0) if place is None else SLOT.unpack_from(self._memory, place)[1:]

    def write(self, node: int, opens: int, backing_id: int) -> None:
        """Notes both. Raises `LedgerFull`."""
        place = self._places.get(node)
        if place is None:
            place = len(self._places) * SLOT.size
            if place >= SLOTS * SLOT.size:
                raise LedgerFull
            self._places[node] = place
        SLOT.pack_into(self._memory, place, node, opens, backing_id)


def create_memory() -> int:
    """A new memory file for a ledger."""
    descriptor = os.memfd_create("nydus-py-opens", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, SLOTS * SLOT.size)
    return descriptor
