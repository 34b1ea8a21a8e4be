"""What is on its way already is not asked for again: one flight for each extent of a blob.

Concurrency: plain dictionaries, used from the trio thread only. A flight is looked up and started
without a checkpoint between the look at the cache and the entry in the table, and it leaves the table in
the same step in which its waiters are woken; so at any checkpoint an extent is either absent and in no
flight, in exactly one flight, or has landed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import trio

from backend.extents import BlobExtent
from backend.priority import FetchClass, Ticket
from rafs.errors import NydusError


class Flight:
    """One extent that is being fetched. After `done`, what became of it.

    `failures` holds the chunks that could not be had, `unstored` those whose bytes did not go to the disk.
    """

    __slots__ = ("done", "extent", "failures", "ticket", "unstored")

    def __init__(self, extent: BlobExtent, ticket: Ticket) -> None:
        self.extent = extent
        self.ticket = ticket
        self.done = trio.Event()
        self.failures: dict[int, NydusError] = {}
        self.unstored: dict[int, bytes] = {}


@dataclass(frozen=True, slots=True)
class Arrival:
    """An extent that some image's fetcher is bringing into a cache file, as others see it.

    `ended` is set when that is over, `raise_to` makes it more urgent.
    """

    ended: trio.Event
    raise_to: Callable[[FetchClass], None]


class FlightTable:
    """The flights of one blob, by the first chunk of their extents."""

    def __init__(self) -> None:
        self._flights: dict[int, Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def __iter__(self) -> Iterator[Flight]:
        return iter(list(self._flights.values()))

    def find(self, extent: BlobExtent) -> Flight | None:
        """The flight that brings `extent`, if one is under way."""
        return self._flights.get(extent.chunks.start)

    def start(self, extent: BlobExtent, ticket: Ticket) -> Flight:
        """Enters a new flight; there must not be one for that extent."""
        assert extent.chunks.start not in self._flights
        flight = self._flights[extent.chunks.start] = Flight(extent, ticket)
        return flight

    def land(self, flight: Flight) -> None:
        """Takes the flight out of the table and wakes its waiters. Twice is harmless."""
        if not flight.done.is_set():
            del self._flights[flight.extent.chunks.start]
            flight.done.set()

    def fail(self, flight: Flight, error: NydusError) -> None:
        """Lands a flight whose extent could not be had at all."""
        for index in flight.extent.chunks:
            flight.failures.setdefault(index, error)
        self.land(flight)
