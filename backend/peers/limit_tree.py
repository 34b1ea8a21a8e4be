"""All limits of a host as one tree of gates: what a download, an upload or a request passes. Sans-I/O.

download               host_down - task_down
download of the origin host_down - origin_bps - task_down
request to the origin  origin_concurrency - origin_rps
upload                 host_up * share - task_up
"""

import math
from collections.abc import Callable

from backend.peers.bucket import QUANTUM_BYTES, Gate, Places, TokenBucket
from backend.peers.claims import Claim, ClaimQueue
from backend.peers.leases import OriginShare
from backend.peers.limit_settings import LimitSettings, stricter
from backend.peers.limit_status import LimitStatistics
from backend.priority import FetchClass

TASKS_KEPT = 1024
"""So many tasks may have buckets before those at rest are dropped, which changes nothing but memory."""

Notify = Callable[[], object] | None


class LimitTree:
    """The gates of one host and the queue before them. Every method takes the time; none waits."""

    def __init__(self, settings: LimitSettings, now: float) -> None:
        self._settings = settings
        self._share: float | None = None
        self._lease: OriginShare | None = None
        self._up = TokenBucket(settings.host_up_bps, now)
        self._down = TokenBucket(settings.host_down_bps, now)
        self._origin = TokenBucket(settings.origin_bps, now)
        self._requests = TokenBucket(settings.origin_rps, now, largest=1)
        self._places = Places(settings.origin_concurrency)
        self._task_up: dict[str, TokenBucket] = {}
        self._task_down: dict[str, TokenBucket] = {}
        self.queue = ClaimQueue()

    @property
    def settings(self) -> LimitSettings:
        """The limits as they were set last, leases and yielding not counted."""
        return self._settings

    @property
    def lease(self) -> OriginShare | None:
        """What the cluster has lent last."""
        return self._lease

    def download(
        self,
        n_bytes: int,
        fetch_class: FetchClass,
        task: str,
        now: float,
        *,
        from_origin: bool,
        notify: Notify = None,
    ) -> Claim:
        """A new claim to receive `n_bytes` of a blob; `ClaimQueue.pump` grants it."""
        task_gate = self._task_bucket(self._task_down, task, self._settings.task_down_bps, now)
        gates = (self._down, self._origin, task_gate) if from_origin else (self._down, task_gate)
        return self._claim(n_bytes, fetch_class, gates, notify)

    def upload(
        self, n_bytes: int, fetch_class: FetchClass, task: str, now: float, *, notify: Notify = None
    ) -> Claim:
        """A new claim to send `n_bytes` of a blob to a peer; `fetch_class` is that of the peer's need."""
        task_gate = self._task_bucket(self._task_up, task, self._settings.task_up_bps, now)
        return self._claim(n_bytes, fetch_class, (self._up, task_gate), notify)

    def origin_request(self, fetch_class: FetchClass, *, notify: Notify = None) -> Claim:
        """A new claim to ask the origin once; `end_request` when the answer has been read."""
        return self._claim(1, fetch_class, (self._places, self._requests), notify)

    def end_request(self, now: float) -> None:
        """A request to the origin is over: its place is free."""
        self._places.give_back(1, now)

    def change(self, settings: LimitSettings, now: float) -> None:
        """Other limits from now on, for those that wait as well."""
        self._settings = settings
        self._down.change(settings.host_down_bps, now)
        self._apply_up(now)
        self._apply_origin(now)
        for bucket in self._task_up.values():
            bucket.change(settings.task_up_bps, now)
        for bucket in self._task_down.values():
            bucket.change(settings.task_down_bps, now)

    def yield_up(self, rate_bps: float | None, now: float) -> None:
        """Holds uploads to `rate_bps` (`YieldRule.rate_bps`) while that is below the limit of the host."""
        if rate_bps != self._share:
            self._share = rate_bps
            self._apply_up(now)

    def lease_origin(self, lease: OriginShare | None, now: float) -> None:
        """Holds the origin to what the cluster has leased to this host; None is without such a limit."""
        if lease != self._lease:
            self._lease = lease
            self._apply_origin(now)

    def slowest_down_bps(self, *, from_origin: bool) -> int | None:
        """The strictest limit on the way of a download; None without any."""
        settings = self._settings
        slowest = stricter(settings.host_down_bps, settings.task_down_bps)
        if not from_origin:
            return slowest
        lease = self._lease or OriginShare()
        return stricter(slowest, stricter(settings.origin_bps, lease.bps))

    @property
    def part_bytes(self) -> int:
        """The smallest quantum of all limits of bytes that are set; `QUANTUM_BYTES` without any."""
        settings = self._settings
        rates = (settings.task_up_bps, settings.task_down_bps)
        buckets = [self._up, self._down, self._origin, *(TokenBucket(rate, 0.0) for rate in rates)]
        limited = [bucket.quantum for bucket in buckets if bucket.rate]
        return int(min(limited, default=QUANTUM_BYTES))

    def origin_demand(self) -> OriginShare:
        """What those that wait for the origin want: bytes, requests, and places with those in use."""
        return OriginShare(
            bps=math.ceil(self.queue.waiting(self._origin)),
            rps=self.queue.waiting(self._requests),
            concurrency=round(self._places.busy + self.queue.waiting(self._places)),
        )

    def statistics(self) -> LimitStatistics:
        """A snapshot."""
        return LimitStatistics(
            up_bytes=round(self._up.passed),
            down_bytes=round(self._down.passed),
            origin_bytes=round(self._origin.passed),
            origin_requests=round(self._requests.passed),
            origin_busy=round(self._places.busy),
            waiting=len(self.queue),
        )

    def _claim(
        self, amount: float, fetch_class: FetchClass, gates: tuple[Gate, ...], notify: Notify
    ) -> Claim:
        claim = Claim(amount, fetch_class, gates, notify)
        self.queue.add(claim)
        return claim

    def _apply_up(self, now: float) -> None:
        limits = [each for each in (self._settings.host_up_bps, self._share) if each is not None]
        self._up.change(min(limits, default=None), now)

    def _apply_origin(self, now: float) -> None:
        lease, settings = self._lease or OriginShare(), self._settings
        self._origin.change(stricter(settings.origin_bps, lease.bps), now)
        rates = [each for each in (settings.origin_rps, lease.rps) if each is not None]
        self._requests.change(min(rates, default=None), now)
        self._places.limit = stricter(settings.origin_concurrency, lease.concurrency)

    def _task_bucket(
        self, buckets: dict[str, TokenBucket], task: str, rate: int | None, now: float
    ) -> TokenBucket:
        bucket = buckets.get(task)
        if bucket is None:
            if len(buckets) >= TASKS_KEPT:
                self._drop_rested(buckets, now)
            bucket = buckets[task] = TokenBucket(rate, now)
        return bucket

    def _drop_rested(self, buckets: dict[str, TokenBucket], now: float) -> None:
        used = self.queue.gates_in_use()
        for task, bucket in list(buckets.items()):
            if bucket.is_rested(now) and bucket not in used:
                del buckets[task]
