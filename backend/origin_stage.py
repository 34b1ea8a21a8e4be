"""The last stage of a fetch: what neither this host nor another one has comes from the origin.

Concurrency: as `ChunkFetcher`. Every call ends with its flights landed, whatever happens.
"""

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import ClassVar

import trio

from backend.cache import CachedBlob
from backend.contract import BackendError, BlobReader, InPlaceReader, PacedReader
from backend.decode import ChunkDecoder, ChunkOutcome, EncodedExtent
from backend.encoded import EncodedBlob, decode_and_keep, wanted_of
from backend.extents import BlobExtent
from backend.fetch_metrics import Source
from backend.fetch_pool import FetchPool
from backend.peers.hub import PeerCounters
from backend.peers.intake import Intake
from backend.priority import FetchClass, Ticket
from backend.singleflight import Flight
from rafs.blob_table import BlobEntry
from rafs.errors import NydusError

log = logging.getLogger(__name__)

# One trip to a thread costs about 0.2 ms: worth it for about this much to decode. Where nobody waits, it may
# be more; then a trip takes a few milliseconds.
DECODE_BYTES = 1 << 20
DECODE_BYTES_AHEAD = 4 << 20
DECODE_EXTENTS = 256


class FetchFailed(BackendError):
    """A fetch ended without a word from the source: the mount is being shut down, or a fault of ours."""

    message = "blob {blob_id}: {why}"
    exit_code: ClassVar[int] = 123


class OriginStage:
    """Brings chunks of one blob from where it was published."""

    def __init__(
        self,
        blob: BlobEntry,
        reader: BlobReader,
        decoder: ChunkDecoder,
        cached: CachedBlob,
        pool: FetchPool,
        settle: Callable[[Flight, list[ChunkOutcome]], None],
        fail: Callable[[Iterable[Flight], NydusError], None],
        lacking: Callable[[BlobExtent], Iterable[int]],
    ) -> None:
        """`settle` takes outcomes over and lands a flight, `fail` lands those that have not landed yet."""
        self.bytes_fetched = self.requests = self.errors = 0
        self.counters = PeerCounters()
        self.encoded: EncodedBlob | None = None
        """Where the encoded bytes are kept, if they are."""
        self._blob = blob
        self._reader = reader
        self._decoder = decoder
        self._cached = cached
        self._pool = pool
        self._settle = settle
        self._fail = fail
        self._lacking = lacking

    async def fetch_owned(self, flights: list[Flight], ticket: Ticket) -> None:
        """From the origin, for others too: few at a time where that is what keeps them from coming late."""
        try:
            async with self._pool.owned(ticket, sum(flight.extent.size for flight in flights)):
                await self.fetch(flights, ticket)
        finally:
            self._fail(flights, FetchFailed(blob_id=self._blob.blob_id, why="the fetch was given up"))

    async def fetch(self, flights: list[Flight], ticket: Ticket) -> None:
        """One request for neighbouring extents; lands all their flights."""
        start, end = flights[0].extent.start, flights[-1].extent.end
        faulty: list[tuple[Flight, list[ChunkOutcome]]] = []
        try:
            async with self._requested(start, end - start, ticket) as data, trio.open_nursery() as nursery:
                demanded = ticket.fetch_class is FetchClass.ON_DEMAND
                for batch in _batches(flights, DECODE_BYTES if demanded else DECODE_BYTES_AHEAD):
                    nursery.start_soon(self._finish_batch, batch, data, start, faulty)
            for flight, results in faulty:
                await self._refetch(flight, results)
        except NydusError as error:
            self.errors += 1
            self._fail(flights, error)
        except Exception:
            self.errors += 1
            log.exception("fetching from blob %s", self._blob.blob_id[:12])
        finally:
            self._fail(flights, FetchFailed(blob_id=self._blob.blob_id, why="the fetch was given up"))

    async def read(self, start: int, length: int) -> bytes:
        """Bytes of the blob as they are, for what is no chunk. Raises `BackendError`."""
        async with self._requested(start, length, Ticket(FetchClass.BACKGROUND)) as data:
            return bytes(data)

    @asynccontextmanager
    async def _requested(self, start: int, length: int, ticket: Ticket) -> AsyncIterator[memoryview]:
        """Bytes of the blob, which may be gone after the block. Requests must not be made inside it."""
        if isinstance(self._reader, InPlaceReader):
            # The slot is held until all is decoded: reading is so fast that a window would fill the memory.
            async with self._pool.gate.slot(ticket):
                self.requests += 1
                with self._pool.buffers.lent(length) as buffer:
                    await self._reader.read_into(start, buffer)
                    self._note_fetched(length)
                    yield buffer
        else:
            limits = self._pool.limits
            async with (
                self._pool.gate.slot(ticket),
                limits.origin_request(ticket.fetch_class, length),
            ):
                self.requests += 1
                began = trio.current_time()
                with self._pool.link.transfer(length):
                    data = await self._read(start, length, ticket)
                self._pool.metrics.note_request(Source.ORIGIN, trio.current_time() - began)
            self._note_fetched(length)
            yield memoryview(data)

    async def _read(self, start: int, length: int, ticket: Ticket) -> bytes:
        """Bytes of the blob, as fast as the limits of the host allow."""
        limits = Intake(self._pool.limits, ticket, self._blob.blob_id, from_origin=True)
        intake = await limits.pay_first(length)
        if intake is None:
            return await self._reader.read_range(start, length)
        if isinstance(self._reader, PacedReader):
            return await self._reader.read_paced(start, length, intake.take)
        await intake.take(length)
        return await self._reader.read_range(start, length)

    def _note_fetched(self, length: int) -> None:
        self.bytes_fetched += length
        self.counters.origin_encoded_bytes += length

    async def _finish_batch(
        self,
        flights: list[Flight],
        data: memoryview,
        start: int,
        faulty: list[tuple[Flight, list[ChunkOutcome]]],
    ) -> None:
        """Decodes some extents of a run in a thread and lands their flights, but for the `faulty` ones."""
        outcomes = await self._decode(flights, data, start)
        for flight, results in zip(flights, outcomes, strict=True):
            if any(outcome.fault for outcome in results):
                faulty.append((flight, results))
            else:
                size_bytes = sum(outcome.size_bytes for outcome in results)
                self.counters.origin_bytes += size_bytes
                self._pool.metrics.note_bytes(Source.ORIGIN, flight.ticket.fetch_class, size_bytes)
                self._settle(flight, results)

    async def _refetch(self, flight: Flight, first_results: list[ChunkOutcome]) -> None:
        """Asks once more for an extent with wrong bytes: they may have been damaged on the way."""
        self.errors += 1
        extent, results = flight.extent, first_results
        try:
            ticket = Ticket(flight.ticket.fetch_class)
            async with self._requested(extent.start, extent.size, ticket) as data:
                (results,) = await self._decode([flight], data, extent.start)
        except NydusError as error:
            log.info("second try: %s", error)
        self._settle(flight, results)

    async def _decode(
        self, flights: Sequence[Flight], data: memoryview, start: int
    ) -> list[list[ChunkOutcome]]:
        """What became of the missing chunks of each flight; `data` begins at byte `start` of the blob."""
        # A large readahead window must not stand before what somebody waits for.
        async with self._pool.decoders.slot(Ticket(flights[0].ticket.fetch_class)):
            work = [
                EncodedExtent(
                    extent,
                    data[extent.start - start : extent.end - start],
                    wanted_of(extent, self._decoder, self.encoded, self._lacking),
                )
                for extent in (flight.extent for flight in flights)
            ]
            return await decode_and_keep(self._decoder, work, self._cached.store, self.encoded)


def _batches(flights: Sequence[Flight], decoded_bytes: int) -> list[list[Flight]]:
    """Cuts a run into pieces that are worth a trip to a thread each."""
    batches: list[list[Flight]] = []
    decoded = 0
    for flight in flights:
        if not batches or decoded >= decoded_bytes or len(batches[-1]) >= DECODE_EXTENTS:
            batches.append([])
            decoded = 0
        batches[-1].append(flight)
        decoded += flight.extent.decoded_size
    return batches
