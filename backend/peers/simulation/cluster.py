"""A simulated cluster: all hosts start to download one blob, and the time until the last one has it.

Seeded: the same topology, size and seed give the same outcome to the last digit.
"""

import math
import random
import time
from collections.abc import Callable

from backend.peers.lease_book import LeaseBook
from backend.peers.leases import HostLease, OriginShare
from backend.peers.scheduler_state import SchedulerState
from backend.peers.simulation.directory import Directory, Exchange, SharedExchange
from backend.peers.simulation.events import Events
from backend.peers.simulation.host import SimHost
from backend.peers.simulation.links import Links, OriginLink
from backend.peers.simulation.outcome import Outcome
from backend.peers.simulation.topology import Topology
from backend.peers.swarm import Swarm

PIECES = 1000
PIECES_MAX = 2048
FULL_EXCHANGE_HOSTS = 128
"""Up to so many hosts every announcement is made in full; see `SharedExchange`."""
SLOWEST = 50.0
"""A run that takes so many times its bound is over: something hangs."""
SLOW_PART = 0.5
EXPIRE_S = 0.5


class Cluster:
    """See above."""

    def __init__(
        self,
        topology: Topology,
        size_bytes: int,
        *,
        pieces: int = PIECES,
        seed: int = 0,
        full_exchange: bool | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """`progress` is told how many pieces have arrived anywhere, now and then. Raises `ValueError`."""
        if not 0 < pieces <= PIECES_MAX:
            raise ValueError(f"{pieces} pieces; there can be 1 to {PIECES_MAX}")
        self.topology = topology
        self.size_bytes = size_bytes
        self.piece_count = pieces
        self.piece_bytes = max(1, round(size_bytes / pieces))
        self.blob_id = "b" * 64
        self.events = Events()
        self.chance = random.Random(seed)
        self.links = Links(self.events, topology.near_s, topology.far_s)
        fastest = max(host.down_bps for host in topology.hosts)
        self.origin = OriginLink(self.events, topology.origin_bps, fastest, topology.far_s)
        self.hosts: dict[str, SimHost] = {}
        for shape in topology.hosts:
            self.hosts[shape.name] = SimHost(self, shape, Swarm(shape.name, shape.zone, self.chance))
        self.arrivals = 0
        self._progress = progress
        self._directory = self._new_directory(full_exchange)
        self._leases = self._new_leases()
        self._left = sum(shape.dies_s == math.inf for shape in topology.hosts)

    # -- what hosts ask

    # Upload slots look at pieces of the size that a blob has by itself: one of this size has as many.
    @property
    def grid_bytes(self) -> int:
        """The size of a piece as `UploadSlots` sees it."""
        return (1 if self.piece_count <= 256 else 4) << 20

    def size_of(self, _blob_id: str) -> int:
        """The size of the blob as `UploadSlots` sees it."""
        return self.piece_count * self.grid_bytes

    def clock(self) -> float:
        """The virtual time."""
        return self.events.now

    def name_at(self, url: str) -> str:
        """The host whose upload server is at `url`."""
        return url.removeprefix("http://").partition(":")[0]

    def pump(self, host: SimHost) -> None:
        """Lets through what a host's limits allow, now and whenever they allow more."""
        now = self.events.now
        host.limits.queue.pump(now)
        next_at = host.limits.queue.next_at(now)
        if next_at < min(math.inf, host.pumps_at):
            host.pumps_at = next_at
            self.events.after(next_at - now, self._pump_again, host)

    def _pump_again(self, host: SimHost) -> None:
        host.pumps_at = math.inf
        self.pump(host)

    def note_arrival(self, host: SimHost, piece: int) -> None:
        """A piece has come to a host, which has not had it."""
        if piece in host.pieces:
            raise AssertionError(f"{host.info.id} got piece {piece} twice")
        self.arrivals += 1
        if self._progress is not None and self.arrivals % 10_000 == 0:
            self._progress(self.arrivals)

    def note_end(self, host: SimHost) -> None:
        """A host has everything."""
        self._left -= host.shape.dies_s == math.inf

    # -- the run

    def run(self) -> Outcome:
        """Until every host that lives has everything, or it has taken far too long."""
        began = time.monotonic()
        bound_s = self.topology.bound_s(self.size_bytes)
        self._directory.join(list(self.hosts.values()))
        for host in self.hosts.values():
            host.swarm.note_blob(self.blob_id, self.piece_count)
        for host in self.hosts.values():
            self._ask_lease(host, 0.0)
        interval_s = self._directory.interval_s
        for host in self.hosts.values():
            self.events.after(host.shape.starts_s + interval_s * self.chance.random(), self._announce, host)
            if host.shape.dies_s < math.inf:
                self.events.after(host.shape.dies_s, host.die)
            self.events.after(host.shape.starts_s, host.look)
        self.events.after(EXPIRE_S, self._expire)
        self.events.run(lambda: self._left == 0, SLOWEST * (bound_s + interval_s))
        return self._outcome(bound_s, time.monotonic() - began)

    def _new_directory(self, full_exchange: bool | None) -> Directory:
        state = SchedulerState("simulated", chance=self.chance)
        is_full = len(self.hosts) <= FULL_EXCHANGE_HOSTS if full_exchange is None else full_exchange
        kind = Exchange if is_full else SharedExchange
        return kind(state, self.blob_id, self.piece_count)

    def _new_leases(self) -> tuple[LeaseBook, dict[str, HostLease]] | None:
        if self.topology.origin_concurrency is None:
            return None
        # A book that is new grants floors only, for a while: this one has been there for long.
        book = LeaseBook(OriginShare(concurrency=self.topology.origin_concurrency), -1000.0)
        return book, {name: HostLease() for name in self.hosts}

    def _announce(self, host: SimHost) -> None:
        if not host.is_alive:
            return
        now = self.events.now
        self._directory.announce(host, now)
        self._ask_lease(host, now)
        host.look(has_news=True)
        self.events.after(self._directory.interval_s, self._announce, host)

    def _ask_lease(self, host: SimHost, now: float) -> None:
        if self._leases is None:
            return
        book, leases = self._leases
        lease, demand = leases[host.info.id], host.limits.origin_demand()
        share = lease.share(now)
        if not demand.concurrency and share is not None and not share.concurrency:
            return  # holds nothing and wants nothing
        lease.renew(book.ask(host.info.id, demand, lease.seen, now), now)
        host.limits.lease_origin(lease.share(now), now)
        host.note_lease()

    def _expire(self) -> None:
        self._directory.expire(self.events.now)
        self.events.after(EXPIRE_S, self._expire)

    def _outcome(self, bound_s: float, wall_s: float) -> Outcome:
        living = [host for host in self.hosts.values() if host.shape.dies_s == math.inf]
        ends = sorted(host.ended_at if host.ended_at is not None else self.events.now for host in living)
        fastest = max(host.shape.up_bps for host in living)
        slow = sum(h.sent_bytes for h in self.hosts.values() if h.shape.up_bps < SLOW_PART * fastest)
        sent = sum(host.sent_bytes for host in self.hosts.values())
        return Outcome(
            hosts=len(self.hosts),
            pieces=self.piece_count,
            size_bytes=self.size_bytes,
            makespan_s=ends[-1],
            bound_s=bound_s,
            ratio=ends[-1] / bound_s,
            median_s=ends[len(ends) // 2],
            origin_ratio=self.origin.sent_bytes / (self.piece_count * self.piece_bytes),
            slow_share=slow / sent if sent else 0.0,
            unfinished=sum(host.ended_at is None for host in living),
            events=self.events.count,
            wall_s=wall_s,
        )
