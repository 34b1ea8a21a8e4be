"""The stage of a fetch before the network: extents that other blobs on this host have whole are copied.

Concurrency: as `ChunkFetcher`. There is no checkpoint between the look at the index and the entry of the
flights. A copy ends by landing its flights or by handing them to the fetch, whatever happens.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable

import trio

from backend.cache import CachedBlob
from backend.chunk_copy import ChunkCopier, ChunkSource
from backend.decode import ChunkOutcome
from backend.extents import BlobExtent, merge_runs
from backend.fetch_pool import FetchPool
from backend.priority import Ticket
from backend.singleflight import Flight, FlightTable

log = logging.getLogger(__name__)

TRIP_BYTES = 4 << 20
"""Decoded bytes that one trip to a thread copies: a few milliseconds."""

_Copies = list[tuple[Flight, list[ChunkSource]]]


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
        """Starts flights for extents whose `lacking` chunks can all be copied; gives them, and the others."""
        if self._copier is None:
            return [], list(extents)
        copies: _Copies = []
        others: list[BlobExtent] = []
        for extent in extents:
            sources = self._copier.find(lacking(extent))
            if sources:
                copies.append((self._flights.start(extent, ticket), sources))
            else:
                others.append(extent)
        for trip in _trips(copies):
            self._pool.nursery.start_soon(self._copy, self._copier, trip, ticket)
        return [flight for flight, _ in copies], others

    async def _copy(self, copier: ChunkCopier, copies: _Copies, ticket: Ticket) -> None:
        wrong = [flight for flight, _ in copies]
        try:
            sources = [source for _, each in copies for source in each]
            outcomes = await trio.to_thread.run_sync(
                copier.copy, sources, self._cached, limiter=self._pool.decoders
            )
            wrong = self._land(copies, outcomes)
        except Exception:
            log.exception("copying to blob %s", self._cached.shape.blob_id[:12])
        finally:
            by_start = {flight.extent.start: flight for flight in wrong}
            for run in merge_runs(flight.extent for flight in wrong):
                flights = [by_start[extent.start] for extent in run]
                self._pool.nursery.start_soon(self._fetch, flights, ticket)

    def _land(self, copies: _Copies, outcomes: dict[int, ChunkOutcome]) -> list[Flight]:
        """Lands the flights of which everything was right; the others."""
        wrong: list[Flight] = []
        for flight, sources in copies:
            results = [outcomes[source.index] for source in sources]
            if any(result.fault for result in results):
                wrong.append(flight)
            else:
                self.bytes_copied += sum(result.size_bytes for result in results)
                self._settle(flight, results)
        return wrong


def _trips(copies: _Copies) -> list[_Copies]:
    trips: list[_Copies] = []
    size_bytes = 0
    for copy in copies:
        if not trips or size_bytes >= TRIP_BYTES:
            trips.append([])
            size_bytes = 0
        trips[-1].append(copy)
        size_bytes += copy[0].extent.decoded_size
    return trips
