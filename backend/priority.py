"""A gate with few slots and four classes: what somebody waits for goes first."""

import enum
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class FetchClass(enum.IntEnum):
    """Why something is fetched, the most urgent first."""

    ON_DEMAND = 0
    READAHEAD = 1
    PREFETCH = 2
    BACKGROUND = 3


class Ticket:
    """A place in the queue of a `PriorityGate`; `raise_to` moves it forward, also while it waits."""

    _numbers = itertools.count()

    def __init__(self, fetch_class: FetchClass) -> None:
        self.fetch_class = fetch_class
        self._number = next(self._numbers)
        self.admitted = trio.Event()

    @property
    def rank(self) -> tuple[FetchClass, int]:
        """Orders tickets: by class, then by age."""
        return self.fetch_class, self._number

    def raise_to(self, fetch_class: FetchClass) -> None:
        """Makes the ticket at least as urgent as `fetch_class`."""
        self.fetch_class = min(self.fetch_class, fetch_class)


class PriorityGate:
    """Lets `slots` holders in at once; the last `reserved` of them are for on-demand tickets only.

    Single-threaded: every method but `slot` is free of checkpoints, so no lock is needed.
    """

    def __init__(self, slots: int, reserved: int) -> None:
        """Raises `ValueError` unless at least one slot is left for the lower classes."""
        if not 0 <= reserved < slots:
            raise ValueError("a gate needs a slot that is not reserved")
        self._slots = slots
        self._reserved = reserved
        self._busy = 0
        self._waiting: list[Ticket] = []

    @asynccontextmanager
    async def slot(self, ticket: Ticket) -> AsyncIterator[None]:
        """Waits for a slot and holds it. A checkpoint; leaves the queue when cancelled."""
        self._waiting.append(ticket)
        self._admit()
        try:
            await ticket.admitted.wait()
            yield
        finally:
            if ticket.admitted.is_set():
                self._busy -= 1
            else:
                self._waiting.remove(ticket)
            self._admit()

    def resize(self, slots: int) -> None:
        """Another number of slots; who is in stays in. Raises `ValueError` as the constructor."""
        if slots <= self._reserved:
            raise ValueError("a gate needs a slot that is not reserved")
        self._slots = slots
        self._admit()

    def raise_to(self, ticket: Ticket, fetch_class: FetchClass) -> None:
        """Makes a ticket more urgent; a reserved slot may let it in at once."""
        ticket.raise_to(fetch_class)
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            best = min(self._waiting, key=lambda ticket: ticket.rank)
            limit = self._slots - (0 if best.fetch_class is FetchClass.ON_DEMAND else self._reserved)
            if self._busy >= limit:
                return
            self._waiting.remove(best)
            self._busy += 1
            best.admitted.set()
