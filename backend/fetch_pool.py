"""What the fetchers of a mount share: the nursery, the connections, decoding threads and the flusher.

Concurrency: the pool's nursery holds every fetch of every blob and one task that flushes. At exit fetches are
cancelled first (a thread that decodes ends its work), then what has arrived is flushed, shielded.
"""

import os
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from backend.buffers import BufferPool
from backend.cache import CachedBlob
from backend.fetch_metrics import FetchMetrics
from backend.link_rate import LinkRate
from backend.peers.limit_settings import LimitSettings
from backend.peers.limits import HostLimits
from backend.peers.origin_window import OriginWindow
from backend.priority import FetchClass, PriorityGate, Ticket


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """Limits of a pool. `reserved` of the `connections` are kept for reads that somebody waits for.

    Flushes wait so long because syncing takes the disk from readers; only a crash of the machine loses
    what is not flushed, and it is fetched again then.
    """

    connections: int = 12
    reserved: int = 4
    decode_threads: int = 0  # 0: one for each CPU
    flush_interval_s: float = 5.0
    flush_bytes: int = 1 << 30
    peer_connections: int = 16
    peer_reserved: int = 4


class FetchPool:
    """What the fetchers of a mount share: tasks, connections, decoding threads, the flusher."""

    def __init__(
        self, nursery: trio.Nursery, options: FetchOptions, limits: HostLimits, metrics: FetchMetrics
    ) -> None:
        """Use `open_fetch_pool`."""
        self.metrics = metrics
        self.nursery = nursery
        self.options = options
        self.limits = limits
        self.gate = PriorityGate(options.connections, options.reserved)
        self.peer_gate = PriorityGate(options.peer_connections, options.peer_reserved)
        self.origin_window = OriginWindow()
        self.owned_gate = PriorityGate(self.origin_window.slots + options.reserved, options.reserved)
        self.link = LinkRate(trio.current_time)
        self._lent = 0
        self.decoders = PriorityGate(options.decode_threads or len(os.sched_getaffinity(0)), 0)
        self.buffers = BufferPool()
        self._blobs: list[tuple[CachedBlob, Callable[[Collection[int]], None] | None]] = []
        self._unflushed = trio.Event()
        self._much_unflushed = trio.Event()

    def register(self, blob: CachedBlob, on_marked: Callable[[Collection[int]], None] | None = None) -> None:
        """Has `blob` flushed from now on; `on_marked` is called in a thread with the chunks of each flush."""
        self._blobs.append((blob, on_marked))

    def raise_to(self, ticket: Ticket, fetch_class: FetchClass) -> None:
        """Makes a ticket more urgent, wherever it waits."""
        for gate in (self.gate, self.peer_gate, self.owned_gate):
            gate.raise_to(ticket, fetch_class)
        self.limits.raise_to(ticket, fetch_class)

    @asynccontextmanager
    async def owned(self, ticket: Ticket, size_bytes: int) -> AsyncIterator[None]:
        """A place among the requests to the origin that are made for other hosts, too.

        It is lent to the next one as well when this one lasts too long: on a full link one connection may
        starve beside others, and everybody would wait for what this host is to bring.
        """
        async with self.owned_gate.slot(ticket), trio.open_nursery() as nursery:
            began = trio.current_time()
            nursery.start_soon(self._lend, self.origin_window.patience_s(size_bytes))
            yield
            nursery.cancel_scope.cancel()
            self.origin_window.note(size_bytes, trio.current_time() - began)
            self._resize_owned()

    async def _lend(self, patience_s: float) -> None:
        await trio.sleep(patience_s)
        self._lent += 1
        self._resize_owned()
        try:
            await trio.sleep_forever()
        finally:
            self._lent -= 1
            self._resize_owned()

    def _resize_owned(self) -> None:
        self.owned_gate.resize(self.origin_window.slots + self._lent + self.options.reserved)

    def note_added(self) -> None:
        """Chunks were added to some blob: a flush is due soon, or now when they are many."""
        self._unflushed.set()
        if sum(blob.unmarked_bytes for blob, _ in self._blobs) >= self.options.flush_bytes:
            self._much_unflushed.set()

    async def flush(self) -> None:
        """Makes everything fetched so far durable and marks it."""
        for blob, on_marked in self._blobs:
            marked = await blob.flush()
            if marked and on_marked is not None:
                await trio.to_thread.run_sync(on_marked, marked)

    async def _flush_forever(self) -> None:
        while True:
            await self._unflushed.wait()
            with trio.move_on_after(self.options.flush_interval_s):
                await self._much_unflushed.wait()
            self._unflushed, self._much_unflushed = trio.Event(), trio.Event()
            await self.flush()


@asynccontextmanager
async def open_fetch_pool(
    options: FetchOptions | None = None,
    limits: HostLimits | None = None,
    metrics: FetchMetrics | None = None,
) -> AsyncIterator[FetchPool]:
    """Owns the tasks of a pool. At exit fetches are cancelled and what has arrived is flushed.

    `limits` and `metrics` are those of the host, which its pools share.
    """
    # Without limits nobody waits, so nobody has to be woken.
    limits = limits or HostLimits(LimitSettings(), trio.current_time)
    pool: FetchPool | None = None
    failure: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            pool = FetchPool(nursery, options or FetchOptions(), limits, metrics or FetchMetrics())
            nursery.start_soon(pool._flush_forever)
            try:
                yield pool
            except Exception as error:
                failure = error  # raised below: the nursery would wrap it in a group
            nursery.cancel_scope.cancel()
    finally:
        if pool is not None:
            with trio.CancelScope(shield=True):
                await pool.flush()
    if failure is not None:
        raise failure
