"""The limits of a host for those who wait: downloads stop reading, uploads stop sending.

Concurrency: callers wait on an event of their own claim; one task, in the nursery of `open_limits`, sleeps
until the next claim may pass. Whoever changes something (a new claim, a limit, a place) lets through what
may pass at once, and wakes that task. Between taking the time and the end of `_pump` there is no
checkpoint.
"""

import math
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import msgspec
import trio

from backend.peers.claims import Claim
from backend.peers.leases import OriginShare
from backend.peers.limit_settings import LIMIT_MAX, LimitSettings
from backend.peers.limit_status import LimitStatistics
from backend.peers.limit_tree import LimitTree
from backend.peers.yielding import YieldRule
from backend.priority import FetchClass

TICK_S = 0.001
"""Claims are let through no more often than this: a fast link passes several parts at a time."""

METER_MIN_S = 0.05
WANTED_PER_S = 4
"""What is asked for should be here within a quarter of a second, the time between two announces."""
GROWTH = 2
PATIENCE_S = 10.0
"""Half of what a host waits for a client that takes nothing (`ServerOptions.slice_timeout_s`)."""
REQUEST_S = 2.0


@dataclass(slots=True)
class LimitWait:
    """How often something had to wait for limits, and how long in all."""

    count: int = 0
    total_s: float = 0.0


class Paced(Protocol):
    """What an upload server knows of a request: the blob, and how urgent it is for the peer."""

    @property
    def blob_id(self) -> str:
        """What the limits of tasks go by."""
        ...

    @property
    def fetch_class(self) -> FetchClass:
        """As the peer says; `BACKGROUND` when it does not."""
        ...


class HostLimits:
    """The trio front of a `LimitTree`. Use `open_limits`."""

    def __init__(self, settings: LimitSettings, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tree = LimitTree(settings, clock())
        self._rule = YieldRule(clock())
        self._told_bps: float | None = None
        self._last_yielded_bps: float | None = None
        self.on_yield: list[Callable[[], None]] = []
        """Called when `yielded_bps` has changed."""
        self._owned: dict[object, Claim] = {}
        self._wanted_bytes = 0
        self._served_bytes = 0
        self._meter = _OriginMeter(clock())
        self._changed = trio.Event()
        self.waits = {name: LimitWait() for name in ("download", "origin_request", "upload")}
        """What had to wait so far, by what it waited for."""

    async def take(
        self,
        n_bytes: int,
        fetch_class: FetchClass,
        task: str,
        *,
        from_origin: bool = False,
        owner: object = None,
    ) -> None:
        """Returns when `n_bytes` of blob `task` may be received. A checkpoint.

        More urgent classes go first, then who came first. More than `part_bytes` in one go is right on
        average, but comes in lumps. A cancelled call gives back what it has paid. A limit of 0 waits until
        it is changed: deadlines belong to the caller. `owner` is what `raise_to` knows the caller by.
        """
        event = trio.Event()
        now = self._clock()
        claim = self._tree.download(
            n_bytes, fetch_class, task, now, from_origin=from_origin, notify=event.set
        )
        self._owned[owner] = claim
        try:
            await self._wait(claim, event, self.waits["download"])
        finally:
            if self._owned.get(owner) is claim:
                del self._owned[owner]
        if claim.fetch_class is FetchClass.ON_DEMAND:
            self._rule.received(n_bytes, self._clock())

    def raise_to(self, owner: object, fetch_class: FetchClass) -> None:
        """Makes the `take` that `owner` waits in, if it does, at least as urgent as `fetch_class`."""
        claim = self._owned.get(owner)
        if claim is not None:
            self._tree.queue.raise_to(claim, fetch_class)
            self._pump()

    async def pace(self, n_bytes: int, request: Paced) -> None:
        """Returns when `n_bytes` may be sent in answer to `request`; otherwise as `take`."""
        event = trio.Event()
        claim = self._tree.upload(
            n_bytes, request.fetch_class, request.blob_id, self._clock(), notify=event.set
        )
        await self._wait(claim, event, self.waits["upload"])
        self.note_served(n_bytes)

    @contextmanager
    def foreground(self) -> Iterator[None]:
        """Held around each on-demand fetch, from the first request to the last byte: serving may yield.

        `take` in the class `ON_DEMAND` counts the bytes.
        """
        self._rule.started(self._clock())
        self._apply_rule()
        self._changed.set()  # the trial ends by time
        try:
            yield
        finally:
            self._rule.ended(self._clock())
            self._apply_rule()

    def note_served(self, n_bytes: int) -> None:
        """Counts bytes that another process of this host has served; `pace` counts those of this one."""
        self._rule.served(n_bytes, self._clock())
        self._served_bytes += n_bytes

    @property
    def yielded_bps(self) -> float | None:
        """What serving is held to now; what an upload server in another process is told for `yield_up`."""
        return self._rule.rate_bps(self._tree.settings.host_up_bps, self._clock())

    @asynccontextmanager
    async def origin_request(self, fetch_class: FetchClass, n_bytes: int = 0) -> AsyncIterator[None]:
        """Waits until the origin may be asked and holds one of its places; its bytes go through `take`.

        `n_bytes` are what the answer will bring: they count as wanted until then.
        """
        event = trio.Event()
        self._wanted_bytes += n_bytes
        try:
            claim = self._tree.origin_request(fetch_class, notify=event.set)
            await self._wait(claim, event, self.waits["origin_request"])
            try:
                yield
            finally:
                self._tree.end_request(self._clock())
                self._pump()
        finally:
            self._wanted_bytes -= n_bytes

    def change(self, settings: LimitSettings) -> None:
        """Other limits from now on, for those that wait as well."""
        self._tree.change(settings, self._clock())
        self._pump()

    def yield_up(self, rate_bps: float | None) -> None:
        """Holds uploads to `yielded_bps` of the process that fetches; None is the host's limit alone."""
        self._told_bps = rate_bps
        self._apply_rule()

    def lease_origin(self, lease: OriginShare | None) -> None:
        """Holds the origin to what the cluster has leased to this host."""
        self._tree.lease_origin(lease, self._clock())
        self._pump()

    @property
    def lease(self) -> OriginShare | None:
        """What the cluster has lent; None while it says nothing."""
        return self._tree.lease

    @property
    def settings(self) -> LimitSettings:
        """The limits as they were set last."""
        return self._tree.settings

    @property
    def part_bytes(self) -> int:
        """The most to `take` or `pace` in one go for limits that hold within 5 % over 5 s."""
        return self._tree.part_bytes

    def pays_first(self, n_bytes: int, *, from_origin: bool) -> bool:
        """Whether `n_bytes` take so long by the limits that who sends them would lose patience.

        They are to be taken before they are asked for then: right on average, but in one lump.
        """
        bps = self._tree.slowest_down_bps(from_origin=from_origin)
        return bps is not None and n_bytes > bps * PATIENCE_S

    @property
    def request_bytes(self) -> int | None:
        """The most to ask of a host at once, so that it need not wait long for this one; None is any size."""
        bps = self._tree.slowest_down_bps(from_origin=False)
        return None if bps is None else round(bps * REQUEST_S)

    def origin_demand(self) -> OriginShare:
        """What this host would use of the origin, for the next announce.

        While something is wanted, that is more than what flows: what a host could use shows only when it is
        lent more.
        """
        self._meter.note(self._tree.statistics(), self._clock())
        waiting = self._tree.origin_demand()
        if not self._wanted_bytes:
            return waiting
        bps = math.ceil(WANTED_PER_S * self._wanted_bytes + GROWTH * self._meter.bps)
        rps = (waiting.rps or 0.0) + GROWTH * self._meter.rps
        return OriginShare(min(max(bps, waiting.bps or 0), LIMIT_MAX), rps, waiting.concurrency)

    def statistics(self) -> LimitStatistics:
        """A snapshot."""
        return msgspec.structs.replace(self._tree.statistics(), up_bytes=self._served_bytes)

    async def _wait(self, claim: Claim, event: trio.Event, wait: "LimitWait") -> None:
        self._pump()
        began = None if event.is_set() else self._clock()
        try:
            await event.wait()
            if began is not None:
                wait.count += 1
                wait.total_s += self._clock() - began
        except trio.Cancelled:
            self._tree.queue.withdraw(claim, self._clock())
            self._pump()
            raise

    def _pump(self) -> None:
        self._tree.queue.pump(self._clock())
        if len(self._tree.queue):
            self._changed.set()

    def _apply_rule(self) -> None:
        yielded_bps = self.yielded_bps
        rates = [each for each in (yielded_bps, self._told_bps) if each is not None]
        self._tree.yield_up(min(rates, default=None), self._clock())
        self._pump()
        if yielded_bps != self._last_yielded_bps:
            self._last_yielded_bps = yielded_bps
            for told in self.on_yield:
                told()

    async def _run(self) -> None:
        """Lets claims through as time passes."""
        while True:
            self._apply_rule()
            self._changed = trio.Event()
            now = self._clock()
            at = min(self._tree.queue.next_at(now), self._rule.next_at(now))
            with trio.move_on_after(max(at - now, TICK_S)):
                await self._changed.wait()


class _OriginMeter:
    """What the origin has sent lately."""

    def __init__(self, now: float) -> None:
        self.bps = self.rps = 0.0
        self._at = now
        self._bytes = self._requests = 0

    def note(self, statistics: LimitStatistics, now: float) -> None:
        elapsed_s = now - self._at
        if elapsed_s < METER_MIN_S:
            return
        self.bps = (statistics.origin_bytes - self._bytes) / elapsed_s
        self.rps = (statistics.origin_requests - self._requests) / elapsed_s
        self._at = now
        self._bytes, self._requests = statistics.origin_bytes, statistics.origin_requests


@asynccontextmanager
async def open_limits(
    settings: LimitSettings, clock: Callable[[], float] = trio.current_time
) -> AsyncIterator[HostLimits]:
    """Owns the task that lets claims through; `clock` runs at the speed of trio's."""
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        limits = HostLimits(settings, clock)
        nursery.start_soon(limits._run)
        try:
            yield limits
        except Exception as error:
            failure = error  # raised below: the nursery would wrap it in a group
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
