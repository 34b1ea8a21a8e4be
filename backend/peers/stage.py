"""The stage of a fetch between the copies on this host and the origin: what other hosts have comes from them.

Concurrency: as `ChunkFetcher`. `bring` ends with every flight landed, or given back for the origin; when it
is cancelled its caller lands them.
"""

import contextlib
import logging
from array import array
from collections.abc import Awaitable, Callable, Iterable, Sequence

import trio

from backend.cache import CachedBlob
from backend.decode import ChunkDecoder, ChunkOutcome
from backend.extents import BlobExtent
from backend.fetch_metrics import Source
from backend.fetch_pool import FetchPool
from backend.peers.client import PeerFailed, PeerRequest, Verdict
from backend.peers.delivery import Deliveries, Given
from backend.peers.hub import PeerBlob, PeerHub
from backend.peers.intake import Intake
from backend.peers.piece_picker import PiecePicker
from backend.peers.piece_queue import Wanted
from backend.peers.portion import Portion, runs_of_piece
from backend.peers.swarm import AskOrigin, AskPeer, Choice, Pause
from backend.priority import FetchClass, Ticket
from backend.singleflight import Flight
from rafs.blobmeta import BlobMeta

log = logging.getLogger(__name__)

REQUEST_BYTES = 4 << 20
"""Decoded bytes of one request: several hosts share a large piece."""
ALONE_PIECES = 4
"""Pieces that are begun at a time while there is nobody to share them with."""
LOOK_AGAIN_S = 0.25
STEPS_UNTIL_ASKED = 3
"""Checkpoints until the requests for a piece that was begun have come to the queue."""
PAUSE_MIN_S = 0.02
PAUSE_MAX_S = 0.5
DECISION_MAX_S = 0.25
"""How long to wait for a decision before somebody may have come to wait for the piece."""
BUSY_MAX_S = 60.0
"""How long hosts may be busy before they count as tried in vain."""


class PeerStage:
    """Brings chunks of one blob from other hosts, for one image."""

    def __init__(
        self,
        hub: PeerHub,
        blob: PeerBlob,
        meta: BlobMeta,
        decoder: ChunkDecoder,
        cached: CachedBlob,
        pool: FetchPool,
        settle: Callable[[Flight, list[ChunkOutcome]], None],
        lacking: Callable[[BlobExtent], Iterable[int]],
    ) -> None:
        """`settle` takes outcomes over and lands the flight; `lacking` tells what an extent still needs."""
        self.bytes_received = 0
        self.deliveries = Deliveries(meta, decoder, cached, lacking)
        self._hub = hub
        self._blob = blob
        self._meta = meta
        self._pool = pool
        self._settle = settle

    @property
    def is_alone(self) -> bool:
        """Whether there is nobody to ask."""
        return self._hub.swarm.is_alone

    async def spread(self, fetch: Callable[[Sequence[int]], Awaitable[object]]) -> None:
        """Has the chunks of every piece that is not whole fetched, in the order that is best for all hosts.

        Raises what `fetch` raises, in a group.
        """
        hub, blob = self._hub, self._blob
        chunks = [array("L") for _ in range(blob.presence.grid.count)]
        for chunk in range(self._meta.count):
            chunks[blob.presence.piece_of(chunk)].append(chunk)
        picker = PiecePicker(
            hub.swarm, hub.queue, blob.blob_id, blob.presence.pieces, hub.chance, trio.current_time
        )

        async def bring(piece: int) -> None:
            await fetch(chunks[piece])
            picker.end(piece)
            hub.has_changed.unpark_all()

        async with trio.open_nursery() as nursery:
            while not picker.is_done:
                own_max = ALONE_PIECES if self.is_alone else self._pool.origin_window.slots + 1
                piece = picker.begin(own_max)
                if piece is None:
                    with trio.move_on_after(LOOK_AGAIN_S):
                        await hub.has_changed.park()
                else:
                    nursery.start_soon(bring, piece)
                    for _ in range(STEPS_UNTIL_ASKED):
                        await trio.lowlevel.checkpoint()

    def runs(self, extents: Iterable[BlobExtent], limit_bytes: int) -> list[list[BlobExtent]]:
        """Groups extents into runs of one piece each, to be brought one by one."""
        by_piece: dict[int, list[BlobExtent]] = {}
        for extent in extents:
            by_piece.setdefault(self._blob.presence.piece_of(extent.chunks.start), []).append(extent)
        limit_bytes = min(limit_bytes, REQUEST_BYTES, self._pool.limits.request_bytes or REQUEST_BYTES)
        return [run for group in by_piece.values() for run in runs_of_piece(group, limit_bytes)]

    async def bring(self, flights: list[Flight], ticket: Ticket) -> list[Flight]:
        """Brings a run of one piece; gives the flights that the origin has to serve."""
        hub, left = self._hub, flights
        piece = self._blob.presence.piece_of(flights[0].extent.chunks.start)
        size_bytes = sum(flight.extent.decoded_size for flight in flights)
        tried: set[str] = set()
        busy_since = trio.current_time()
        while left:
            is_queued = ticket.fetch_class is not FetchClass.ON_DEMAND
            if is_queued:
                choice = await self._queued_choice(piece, size_bytes, tried)
            else:
                await trio.lowlevel.checkpoint()
                now = trio.current_time()
                choice = hub.swarm.choose(self._blob.blob_id, piece, size_bytes, now, tried)
            if isinstance(choice, AskOrigin):
                hub.counters.degraded += bool(tried) or not choice.is_owner
                return left
            if isinstance(choice, Pause):
                if trio.current_time() - busy_since > BUSY_MAX_S:
                    hub.counters.degraded += 1
                    return left
                await trio.sleep(min(max(choice.delay_s, PAUSE_MIN_S), PAUSE_MAX_S))
                continue
            before = len(left)
            try:
                left = await self._ask(choice, left, ticket, piece, tried)
            finally:
                if is_queued:  # as it was then: a reader may have come meanwhile
                    hub.release(choice)
            if len(left) < before:
                busy_since = trio.current_time()
        return []

    async def _queued_choice(self, piece: int, size_bytes: int, tried: set[str]) -> Choice:
        """Whom to ask for what nobody waits for; `Pause` when nothing was decided for a while.

        An `AskPeer` has to be released when its request has ended.
        """
        queue, decided, choices = self._hub.queue, trio.Event(), list[Choice]()

        def note(choice: Choice) -> None:
            choices.append(choice)
            decided.set()

        wanted = Wanted(self._blob.blob_id, piece, size_bytes, tried, note)
        queue.add(wanted)
        queue.dispatch()
        try:
            with trio.move_on_after(DECISION_MAX_S):
                await decided.wait()
        except trio.Cancelled:
            for choice in choices:
                self._hub.release(choice)
            raise
        finally:
            queue.withdraw(wanted)
        return choices[0] if choices else Pause(PAUSE_MIN_S)

    async def _ask(
        self, choice: AskPeer, flights: list[Flight], ticket: Ticket, piece: int, tried: set[str]
    ) -> list[Flight]:
        """Asks one host; the flights that it did not serve."""
        portion = self.deliveries.portion(
            choice.host, self._hub.swarm.health_of(choice.host.id).rate, flights
        )
        if portion is None:
            for flight in flights:
                self._settle(flight, [])
            return []
        with self._pool.buffers.lent(portion.size_bytes) as buffer:
            try:
                async with self._pool.peer_gate.slot(ticket):
                    got = await self._receive(choice, portion, buffer, ticket, piece, tried)
            except PeerFailed as error:
                self._note_failure(choice, error, piece, tried, portion)
                return flights
            return await self._take(got, flights, portion, buffer, tried)

    async def _receive(
        self,
        choice: AskPeer,
        portion: Portion,
        buffer: memoryview,
        ticket: Ticket,
        piece: int,
        tried: set[str],
    ) -> Given:
        """Fills `buffer`; what is in it from whom, which is another host when that was faster."""
        if ticket.fetch_class is not FetchClass.ON_DEMAND or choice.is_owner:
            return await self._request(choice, portion, buffer, ticket)
        winner: list[Given] = []
        failure: list[PeerFailed] = []
        first_ended = trio.Event()

        async def ask_first(scope: trio.CancelScope) -> None:
            try:
                winner.append(await self._request(choice, portion, buffer, ticket))
                scope.cancel()
            except PeerFailed as error:
                failure.append(error)
            finally:
                first_ended.set()

        with self._pool.buffers.lent(len(buffer)) as second:
            won_second = False
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask_first, nursery.cancel_scope)
                with trio.move_on_after(self._hub.swarm.hedge.after_s()):
                    await first_ended.wait()
                if not first_ended.is_set():
                    got = await self._hedge(choice, portion, second, ticket, piece, tried)
                    if got is not None and not winner:
                        winner.append(got)
                        won_second = True
                        nursery.cancel_scope.cancel()
            if won_second:  # and the first request, which may have written until now, is over
                buffer[:] = second
        if not winner:
            raise failure[0]
        return winner[0]

    async def _hedge(
        self,
        choice: AskPeer,
        portion: Portion,
        buffer: memoryview,
        ticket: Ticket,
        piece: int,
        tried: set[str],
    ) -> Given | None:
        """Asks a second host for the same."""
        hub = self._hub
        blob_id, size, now = self._blob.blob_id, len(buffer), trio.current_time()
        other = hub.swarm.other_holder(blob_id, piece, size, now, {*tried, choice.host.id})
        if other is None:
            return None
        hub.counters.hedges += 1
        try:
            return await self._request(AskPeer(other), portion, buffer, ticket)
        except PeerFailed as error:
            self._note_failure(AskPeer(other), error, piece, tried, portion)
            return None

    async def _request(self, choice: AskPeer, portion: Portion, buffer: memoryview, ticket: Ticket) -> Given:
        hub, size = self._hub, len(buffer)
        health = hub.swarm.health_of(choice.host.id)
        request = PeerRequest(
            self._blob.blob_id,
            portion.ranges[0][0],
            self._blob.image,
            ticket.fetch_class,
            may_fetch=choice.is_owner,
            ranges=portion.ranges,
            is_encoded=portion.is_encoded,
        )
        intake = await Intake(self._pool.limits, ticket, self._blob.blob_id).pay_first(size)
        others, since = health.in_flight, trio.current_time()
        health.in_flight += size
        # Who has to fetch it first says nothing of the link.
        counted = contextlib.nullcontext() if choice.is_owner else self._pool.link.transfer(size)
        try:
            with counted:
                ranges = await hub.client.fetch(choice.host.url, request, buffer, intake)
        finally:
            health.in_flight -= size
        duration_s = trio.current_time() - since
        self._pool.metrics.note_request(Source.PEER, duration_s)
        if not choice.is_owner:
            health.note_done(size, duration_s, others)
            hub.swarm.hedge.note(duration_s)
        decoded_bytes = portion.decoded_bytes if portion.is_encoded else size
        hub.counters.by_peer[choice.host.id] += decoded_bytes
        hub.counters.peer_bytes += decoded_bytes
        if portion.is_encoded:
            hub.counters.peer_encoded_bytes += size
            hub.counters.peer_encoded_worth += decoded_bytes
        self.bytes_received += decoded_bytes
        return Given(choice.host, ranges)

    async def _take(
        self, got: Given, flights: list[Flight], portion: Portion, buffer: memoryview, tried: set[str]
    ) -> list[Flight]:
        """Verifies and stores; the flights with chunks that were wrong, or not given."""
        host = got.host
        async with self._pool.decoders.slot(Ticket(flights[0].ticket.fetch_class)):
            here, results = await self.deliveries.check(got, flights, portion, buffer)
        wrong: list[Flight] = []
        for flight, outcomes in zip(here, results, strict=True):
            if any(outcome.fault for outcome in outcomes):
                wrong.append(flight)
            else:
                size_bytes = sum(outcome.size_bytes for outcome in outcomes)
                self._pool.metrics.note_bytes(Source.PEER, flight.ticket.fetch_class, size_bytes)
                self._settle(flight, outcomes)
        if wrong:
            log.warning("peer %s sent wrong bytes of blob %s", host.id, self._blob.blob_id[:12])
            self._hub.note_wrong(host, self._blob.blob_id)
        if wrong or not here:  # it would be asked for the same again
            tried.add(host.id)
        return [*wrong, *(flight for flight in flights if flight not in here)]

    def _note_failure(
        self, choice: AskPeer, error: PeerFailed, piece: int, tried: set[str], portion: Portion
    ) -> None:
        hub, host, now = self._hub, choice.host, trio.current_time()
        swarm, health = hub.swarm, hub.swarm.health_of(choice.host.id)
        if portion.is_encoded and (error.verdict is Verdict.ABSENT or error.has_begun):
            self.deliveries.note_absent(host, now)  # decoded it may have it
        elif error.verdict is Verdict.BUSY:
            hub.counters.busy_answers += 1
            health.note_busy(now, error.retry_after_s)
        elif error.verdict is Verdict.PAUSED:
            health.note_paused(now)
            tried.add(host.id)
        elif error.verdict is Verdict.MOVED:
            other = swarm.host_at(error.location)
            if other is not None and other.id not in tried and other.id != hub.own.id:
                count = self._blob.presence.grid.count
                swarm.note_moved(self._blob.blob_id, host.id, other.id, piece, count)
            else:
                health.note_busy(now, PAUSE_MIN_S)
        elif error.verdict is Verdict.ABSENT:
            swarm.note_absent(self._blob.blob_id, host.id, piece)
            if choice.is_owner:
                tried.add(host.id)
            else:
                health.note_busy(now, PAUSE_MIN_S)
        else:
            log.info("%s", error)
            hub.counters.dead_peers += 1
            health.note_dead(now)
            tried.add(host.id)
