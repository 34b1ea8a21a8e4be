"""The stage of a fetch before the network: extents that other blobs on this host have whole are copied.

Concurrency: as `ChunkFetcher`. There is no checkpoint between the look at the index and the entry of the
flights. A copy ends by landing its flights or by handing them to the fetch, whatever happens.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable
from itertools import chain

import trio

from backend.cache import CachedBlob
from backend.chunk_copy import ChunkCopier
from backend.decode import ChunkOutcome
from backend.extents import BlobExtent, merge_runs
from backend.fetch_metrics import Source
from backend.fetch_pool import FetchPool
from backend.priority import Ticket
from backend.singleflight import Flight, FlightTable

log = logging.getLogger(__name__)

TRIP_BYTES = 4 << 20
"""Decoded bytes that one trip to a thread copies: a few milliseconds."""


class CopyStage:
    """Copies what it can for one blob."""

    def __init__(
        self,
        copier: ChunkCopier | None,
        cached: CachedBlob,
        pool: FetchPool,
        flights: FlightTable,
        settle: Callable[[Flight, list[ChunkOutcome]], None],
        fetch: Callable[[list[Flight], Ticket], Awaitable[None]],
    ) -> None:
        """`settle` takes outcomes over and lands the flight; `fetch` brings what could not be copied."""
        self.bytes_copied = 0
        self._copier = copier
        self._cached = cached
        self._pool = pool
        self._flights = flights
        self._settle = settle
        self._fetch = fetch

    def start(
        self, extents: Iterable[BlobExtent], lacking: Callable[[BlobExtent], Iterable[int]], ticket: Ticket
    ) -> tuple[list[Flight], list[BlobExtent]]:
        """Starts flights for extents whose `lacking` chunks promise to be copied; gives them, and the others.

        One look each: a thread looks at all chunks of those that promise something.
        """
        if self._copier is None:
            return [], list(extents)
        flights: list[Flight] = []
        others: list[BlobExtent] = []
        for extent in extents:
            if self._copier.is_promising(lacking(extent)):
                flights.append(self._flights.start(extent, ticket))
            else:
                others.append(extent)
        for trip in _trips(flights):
            self._pool.nursery.start_soon(self._copy, self._copier, trip, lacking, ticket)
        return flights, others

    async def _copy(
        self,
        copier: ChunkCopier,
        flights: list[Flight],
        lacking: Callable[[BlobExtent], Iterable[int]],
        ticket: Ticket,
    ) -> None:
        def copy_all() -> list[list[ChunkOutcome]]:
            found = [copier.find(lacking(flight.extent)) for flight in flights]
            outcomes = copier.copy(chain.from_iterable(found), self._cached)
            return [[outcomes[source.index] for source in sources] for sources in found]

        left = flights
        try:
            async with self._pool.decoders.slot(Ticket(ticket.fetch_class)):
                results = await trio.to_thread.run_sync(copy_all)
            left = self._land(flights, results)
        except Exception:
            log.exception("copying to blob %s", self._cached.shape.blob_id[:12])
        finally:
            by_start = {flight.extent.start: flight for flight in left}
            for run in merge_runs(flight.extent for flight in left):
                group = [by_start[extent.start] for extent in run]
                self._pool.nursery.start_soon(self._fetch, group, ticket)

    def _land(self, flights: list[Flight], results: list[list[ChunkOutcome]]) -> list[Flight]:
        """Lands the flights whose chunks were all found and right; the others."""
        left: list[Flight] = []
        for flight, outcomes in zip(flights, results, strict=True):
            if not outcomes or any(outcome.fault for outcome in outcomes):
                left.append(flight)
            else:
                size_bytes = sum(outcome.size_bytes for outcome in outcomes)
                self.bytes_copied += size_bytes
                self._pool.metrics.note_bytes(Source.CACHE, flight.ticket.fetch_class, size_bytes)
                self._settle(flight, outcomes)
        return left


def _trips(flights: list[Flight]) -> list[list[Flight]]:
    trips: list[list[Flight]] = []
    size_bytes = 0
    for flight in flights:
        if not trips or size_bytes >= TRIP_BYTES:
            trips.append([])
            size_bytes = 0
        trips[-1].append(flight)
        size_bytes += flight.extent.decoded_size
    return trips
