"""What a check finds, and the map of bytes in use that tells whether two records share any."""

from dataclasses import dataclass
from typing import Self

from rafs.inode import SLOT_SIZE
from rafs.record import FormatError


@dataclass(frozen=True, slots=True)
class Fault:
    """One broken promise of the format: which record, at which byte of its file, and what was expected."""

    record: str
    offset_bytes: int
    expectation: str

    def __str__(self) -> str:
        return f"{self.record} at offset {self.offset_bytes}: {self.expectation}"

    @classmethod
    def of(cls, error: FormatError) -> Self:
        """The fault that a reader stumbled over."""
        return cls(error.record, error.offset_bytes, error.expectation)


class Space:
    """Which 32-byte slots of a bootstrap are taken; one byte of memory for each.

    Inodes start on slots and everything else on larger boundaries, so two records share a byte exactly when
    they share a slot.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._taken = bytearray(-(-size_bytes // SLOT_SIZE))

    def claim(self, start: int, end: int) -> str | None:
        """Takes bytes `start` to `end`; returns what was expected when they are outside or taken already."""
        if start < 0 or end > self._size_bytes:
            return f"bytes inside the file of {self._size_bytes}, found {start} to {end}"
        first, last = start // SLOT_SIZE, -(-end // SLOT_SIZE)
        collision = self._taken.find(1, first, last)
        if collision >= 0:
            return f"bytes of its own, shares those at {collision * SLOT_SIZE} with another record"
        self._taken[first:last] = b"\1" * (last - first)
        return None
