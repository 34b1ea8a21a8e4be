"""Brings missing chunks into the cache.

read -> chunks -> missing ones, single-flight -> runs of neighbours -> one request each -> decode and
verify in threads -> cache file -> ready -> waiters.

Concurrency: every fetch runs in the nursery of the `FetchPool`, so a reader that is cancelled takes
nothing with it. Between the look at the cache in `ChunkFetcher._collect` and the entry of new flights there
is no checkpoint, nor between making an extent's chunks ready and landing its flight. Fetches end by
landing their flights, whatever happens, also when the pool is closed.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import trio

from backend.cache import CachedBlob
from backend.chunk_copy import ChunkCopier
from backend.contract import BlobReader, InPlaceReader
from backend.copy_stage import CopyStage
from backend.decode import ChunkDecoder, ChunkInvalid, ChunkOutcome
from backend.extents import RUN_BYTES, BlobExtent, ExtentIndex, merge_runs, widen
from backend.fetch_pool import FetchPool
from backend.fetch_statistics import FetchStatistics
from backend.origin_stage import FetchFailed, OriginStage
from backend.peers.hub import PeerAccess
from backend.peers.stage import PeerStage
from backend.priority import FetchClass, Ticket
from backend.readahead import LOCAL_WINDOW_MAX_BYTES, WINDOW_MAX_BYTES, Readahead, Stream
from backend.singleflight import Arrival, Flight, FlightTable
from rafs.blob_table import BlobEntry
from rafs.blobmeta import BlobMeta
from rafs.decoded_map import DecodedMap
from rafs.errors import NydusError

log = logging.getLogger(__name__)

LOCAL_PIECE_BYTES = 2 << 20
"""What readahead asks a local file for at once: no latency is to be hidden, and a CPU's cache holds it."""
OWNED_RUN_BYTES = 1 << 20
"""What an owner asks the origin for at once: others wait for it, and get it as it arrives."""
READAHEAD_DECODED_RATIO = 4
"""A readahead window decodes to at most this many times its encoded size."""


class ChunkFetcher:
    """Fetches chunks of one blob into its cache file."""

    def __init__(
        self,
        blob: BlobEntry,
        meta: BlobMeta,
        digests: Sequence[bytes],
        reader: BlobReader,
        cached: CachedBlob,
        pool: FetchPool,
        copier: ChunkCopier | None = None,
    ) -> None:
        """Raises `BlobUnsupported`. The caller closes reader, meta and cache file, after the pool.

        `copier` takes out of other blobs what is there already.
        """
        self.cached = cached
        is_local = isinstance(reader, InPlaceReader)
        windows = (LOCAL_WINDOW_MAX_BYTES, None) if is_local else (WINDOW_MAX_BYTES, pool.link)
        self.readahead = Readahead(*windows)
        self._piece_max_bytes = LOCAL_PIECE_BYTES if is_local else RUN_BYTES
        self.hits = 0
        self._blob = blob
        self._pool = pool
        self.meta = meta
        self._extents = ExtentIndex(meta)
        self._decoder = ChunkDecoder(blob, meta, digests)
        self._flights = FlightTable()
        self._chunks_stored = 0
        self._misses = self._waits = self._errors = 0
        self._origin = OriginStage(
            blob, reader, self._decoder, cached, pool, self._settle, self._fail, self._lacking
        )
        self._copies = CopyStage(copier, cached, pool, self._flights, self._settle, self._bring)
        self._peers: PeerStage | None = None
        pool.register(cached, copier.note_marked if copier else None)

    @property
    def chunk_count(self) -> int:
        """Number of chunks of the blob."""
        return self._extents.chunk_count

    @functools.cached_property
    def decoded_map(self) -> DecodedMap:
        """Finds chunks by their place in the decoded file."""
        return DecodedMap(self.meta)

    def prepare_map(self) -> None:
        """Builds `decoded_map` now: about 30 ms for 100,000 chunks."""
        _ = self.decoded_map

    def use_peers(self, peers: PeerAccess) -> None:
        """Has other hosts asked from now on, before the origin is."""
        self._peers = PeerStage(
            peers.hub,
            peers.blob,
            self.meta,
            self._decoder,
            self.cached,
            self._pool,
            self._settle,
            self._lacking,
        )
        self._origin.counters = peers.hub.counters
        self._peers.deliveries.encoded = self._origin.encoded

    @property
    def is_shared(self) -> bool:
        """Whether other hosts are asked, as soon as there are any."""
        return self._peers is not None

    @property
    def origin(self) -> OriginStage:
        """Where what nobody else has comes from."""
        return self._origin

    async def ensure_all(self) -> None:
        """Makes all chunks ready that others have or want, too, in an order that suits all hosts.

        Raises what `ensure_chunks` raises, in a group. Only for a blob that `is_shared`.
        """
        assert self._peers is not None
        await self._peers.spread(lambda chunks: self.ensure_chunks(chunks, FetchClass.PREFETCH))

    def can_verify(self, index: int) -> bool:
        """Whether this image names the chunk; others are neighbours in a blob of another image."""
        return self._decoder.can_verify(index)

    def span_of(self, index: int) -> tuple[int, int]:
        """Where chunk `index` starts in the decoded file, and its size, in bytes."""
        chunk = self.meta.chunk(index)
        return chunk.uncompressed_offset, chunk.uncompressed_size

    def decoded_size(self, index: int) -> int:
        """Bytes of the extent that holds chunk `index`, decoded."""
        return self._extents.of(index).decoded_size

    def statistics(self) -> FetchStatistics:
        """The counters at this moment."""
        return FetchStatistics(
            bytes_fetched=self._origin.bytes_fetched,
            requests=self._origin.requests,
            chunks_stored=self._chunks_stored,
            hits=self.hits,
            misses=self._misses,
            waits=self._waits,
            errors=self._errors + self._origin.errors,
            bytes_copied=self._copies.bytes_copied,
            bytes_from_peers=self._peers.bytes_received if self._peers else 0,
        )

    async def ensure(
        self, first_chunk: int, last_chunk: int, fetch_class: FetchClass = FetchClass.ON_DEMAND
    ) -> Mapping[int, bytes]:
        """Makes chunks `first_chunk` to `last_chunk` (inclusive) ready, see `ensure_chunks`."""
        return await self.ensure_chunks(range(first_chunk, last_chunk + 1), fetch_class)

    async def ensure_chunks(
        self, chunks: Sequence[int], fetch_class: FetchClass = FetchClass.ON_DEMAND
    ) -> Mapping[int, bytes]:
        """Makes chunks ready, whoever fetches them; gives those that could not be stored, by number.

        Raises what the source raised, or `ChunkInvalid`, of the first chunk that failed. A checkpoint.
        Cancelling it leaves the fetch running. Look whether chunks are ready again after it: they may have
        been forgotten.
        """
        unstored: dict[int, bytes] = {}
        flights = self._collect(chunks, fetch_class, unstored)
        began = trio.current_time()
        for flight in flights:
            await flight.done.wait()
        if flights:
            self._pool.metrics.note_wait(fetch_class, trio.current_time() - began)
        wanted = set(chunks)
        for flight in flights:
            for index in sorted(wanted & flight.failures.keys()):
                raise flight.failures[index]
            unstored.update((i, data) for i, data in flight.unstored.items() if i in wanted)
        if not flights:
            await trio.lowlevel.checkpoint()
        return unstored

    def is_arriving(self, index: int) -> bool:
        """Whether chunk `index` is being fetched, for this image or another one with the blob."""
        return self._extents.of(index).chunks.start in self.cached.arriving

    def begin(self, chunks: Sequence[int], fetch_class: FetchClass) -> None:
        """Starts fetching the missing ones of `chunks` and waits for nothing. Free of checkpoints."""
        self._collect(chunks, fetch_class, {})

    def touch(self, first_chunk: int, last_chunk: int) -> None:
        """Tells readahead that these chunks were read. Free of checkpoints; cheap without markers."""
        for chunk in range(first_chunk, last_chunk + 1):
            stream = self.readahead.on_marker(chunk)
            if stream is not None:
                self._read_ahead(stream)

    def note_hit(self, first_chunk: int, last_chunk: int, token: trio.lowlevel.TrioToken) -> None:
        """`touch` for another thread, and a count. `token` is that of the trio thread."""
        self.hits += 1
        # Most hits carry no marker, and waking the loop costs several times what the hit does.
        if any(map(self.readahead.markers.__contains__, range(first_chunk, last_chunk + 1))):
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(self._touch_if_open, first_chunk, last_chunk)

    def _touch_if_open(self, first_chunk: int, last_chunk: int) -> None:
        # The pool's nursery may have closed since the read; then there is nothing to read ahead for.
        with contextlib.suppress(RuntimeError):
            self.touch(first_chunk, last_chunk)

    def _collect(
        self, chunks: Sequence[int], fetch_class: FetchClass, unstored: dict[int, bytes]
    ) -> list[Flight]:
        """The flights that bring the missing chunks, new ones started."""
        flights: dict[int, Flight] = {}
        fresh: list[BlobExtent] = []
        taken: set[int] = set()
        for index in chunks:
            if self.cached.is_ready(index) or index in taken:
                continue
            data = self.cached.unstored(index)
            if data is not None:
                unstored[index] = data
                continue
            extent = self._extents.of(index)
            taken.update(extent.chunks)
            flight = self._flights.find(extent)
            if flight is None:
                fresh.append(extent)
            else:
                self._hurry(flight, fetch_class)
                flights[extent.chunks.start] = flight
        if fetch_class is FetchClass.ON_DEMAND:
            self._misses += bool(fresh)
            self._waits += bool(flights) and not fresh
        started = self._start_demand(fresh, fetch_class)
        return [*flights.values(), *(flight for flight in started if flight.extent in fresh)]

    def _start_demand(self, fresh: list[BlobExtent], fetch_class: FetchClass) -> list[Flight]:
        if not fresh:
            return []
        if fetch_class is not FetchClass.ON_DEMAND:
            return self._start(fresh, fetch_class)
        started, absent = self._copies.start(fresh, self._lacking, Ticket(fetch_class))
        widened = absent and absent + widen(self._extents, absent, self._is_absent)
        started += self._start(widened, fetch_class)
        first = min(extent.chunks.start for extent in fresh)
        stream = self.readahead.on_miss(first, max(extent.chunks.stop for extent in fresh + widened))
        if stream is not None:
            self._read_ahead(stream)
        return started

    def _read_ahead(self, stream: Stream) -> None:
        """Starts fetching the stream's next window; a large one of many extents step by step."""
        start = stream.next_chunk
        budget = self._read_on(stream, stream.window_bytes, self.readahead.advance)
        if budget > 0 and stream.next_chunk > start:
            self._pool.nursery.start_soon(self._read_rest, stream, budget)

    async def _read_rest(self, stream: Stream, budget: int) -> None:
        start = -1
        while budget > 0 and stream.next_chunk > start:
            await trio.lowlevel.checkpoint()
            start = stream.next_chunk
            budget = self._read_on(stream, budget, self.readahead.extend)

    def _read_on(self, stream: Stream, budget: int, note: Callable[[Stream, int], None]) -> int:
        """Plans one walk over extents, and starts it; gives what is left of the budget in bytes."""
        end = stream.next_chunk
        absent: list[BlobExtent] = []
        for extent in self._extents.following(end):
            # Well compressed data costs decoding instead of bandwidth.
            budget -= max(extent.size, extent.decoded_size // READAHEAD_DECODED_RATIO)
            end = extent.chunks.stop
            if self._is_absent(extent):
                absent.append(extent)
            if budget <= 0:
                break
        if absent:
            note(stream, end)
            # A few requests side by side hide the source's latency and bound how long each takes.
            piece_bytes = max(1 << 20, stream.window_bytes // 4)
            self._start(absent, FetchClass.READAHEAD, min(piece_bytes, self._piece_max_bytes))
        return budget

    def _is_absent(self, extent: BlobExtent) -> bool:
        """Whether nothing of the extent is there and nobody fetches it."""
        return self._flights.find(extent) is None and not any(map(self.cached.is_ready, extent.chunks))

    def _start(
        self, extents: Iterable[BlobExtent], fetch_class: FetchClass, limit_bytes: int = RUN_BYTES
    ) -> list[Flight]:
        started, absent = self._copies.start(extents, self._lacking, Ticket(fetch_class))
        peers = self._asked_peers()
        for run in peers.runs(absent, limit_bytes) if peers else merge_runs(absent, limit_bytes):
            ticket = Ticket(fetch_class)
            flights = [self._flights.start(extent, ticket) for extent in run]
            started += flights
            self._pool.nursery.start_soon(self._bring, flights, ticket)
        return started

    def _asked_peers(self) -> PeerStage | None:
        return self._peers if self._peers is not None and not self._peers.is_alone else None

    def _hurry(self, flight: Flight, fetch_class: FetchClass) -> None:
        """Makes a flight more urgent, whoever it waits for."""
        self._pool.raise_to(flight.ticket, fetch_class)
        arrival = self.cached.arriving.get(flight.extent.chunks.start)
        if arrival is not None:
            arrival.raise_to(fetch_class)

    async def _bring(self, flights: list[Flight], ticket: Ticket) -> None:
        """Has flights landed: what another image's fetcher is bringing into the same file is waited for."""
        arriving = self.cached.arriving
        own = [flight for flight in flights if flight.extent.chunks.start not in arriving]
        for flight in flights:
            if flight not in own:
                self._pool.nursery.start_soon(self._await_other, flight, ticket)
        if not own:
            return
        ended = trio.Event()
        arrival = Arrival(ended, functools.partial(self._pool.raise_to, ticket))
        arriving.update((flight.extent.chunks.start, arrival) for flight in own)
        demanded = ticket.fetch_class is FetchClass.ON_DEMAND
        try:
            with self._pool.limits.foreground() if demanded else contextlib.nullcontext():
                await self._bring_own(own, ticket)
                for flight in own:
                    await flight.done.wait()
        finally:
            for flight in own:
                del arriving[flight.extent.chunks.start]
            ended.set()

    async def _await_other(self, flight: Flight, ticket: Ticket) -> None:
        try:
            while (arrival := self.cached.arriving.get(flight.extent.chunks.start)) is not None:
                arrival.raise_to(flight.ticket.fetch_class)
                await arrival.ended.wait()
            if list(self._lacking(flight.extent)):
                self._pool.nursery.start_soon(self._bring, [flight], ticket)
            else:
                self._settle(flight, [])
        except BaseException:
            self._fail([flight], FetchFailed(blob_id=self._blob.blob_id, why="the fetch was given up"))
            raise

    async def _bring_own(self, flights: list[Flight], ticket: Ticket) -> None:
        """From other hosts what they have, from the origin what is left; every flight will land."""
        peers = self._asked_peers()
        if peers is None:
            await self._origin.fetch(flights, ticket)
            return
        try:
            left = await peers.bring(flights, ticket)
        except Exception:
            self._errors += 1
            log.exception("asking peers for blob %s", self._blob.blob_id[:12])
            left = [flight for flight in flights if not flight.done.is_set()]
        except BaseException:
            self._fail(flights, FetchFailed(blob_id=self._blob.blob_id, why="the fetch was given up"))
            raise
        by_start = {flight.extent.start: flight for flight in left}
        for run in merge_runs((flight.extent for flight in left), OWNED_RUN_BYTES):
            group = [by_start[extent.start] for extent in run]
            self._pool.nursery.start_soon(self._origin.fetch_owned, group, ticket)

    def _lacking(self, extent: BlobExtent) -> Iterator[int]:
        decoder, cached = self._decoder, self.cached
        return (i for i in extent.chunks if not cached.is_ready(i) and decoder.can_verify(i))

    def _settle(self, flight: Flight, results: list[ChunkOutcome]) -> None:
        """Takes the outcomes over and lands the flight. Free of checkpoints."""
        for outcome in results:
            if outcome.fault is not None:
                self._errors += 1
                flight.failures[outcome.index] = ChunkInvalid(
                    blob_id=self._blob.blob_id, chunk_index=outcome.index, why=outcome.fault
                )
            elif outcome.unstored is not None and outcome.disk_error is not None:
                flight.unstored[outcome.index] = outcome.unstored
                self.cached.add_unstored(outcome.index, outcome.unstored, outcome.disk_error)
            else:
                self._chunks_stored += 1
                self.cached.add(outcome.index, outcome.size_bytes)
        self._pool.note_added()
        self._flights.land(flight)

    def _fail(self, flights: Iterable[Flight], error: NydusError) -> None:
        for flight in flights:
            if not flight.done.is_set():
                self._flights.fail(flight, error)
