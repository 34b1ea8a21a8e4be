"""The scheduler as a server: `SchedulerState` behind JSON over HTTP, see docs/peers.md.

Concurrency: everything that touches the state is free of checkpoints, in the one task of `EventServer`.
One task forgets silent hosts and watches how busy that one is, one follows each other scheduler
(`terms_follower`).
"""

import os
import socket
import time
from collections.abc import Callable, Sequence

import msgspec
import trio

from backend.json_api import ApiError, PlainText, failed
from backend.metrics import CONTENT_TYPE, METRICS_TARGET
from backend.peers.event_server import Answered, Connection, EventServer
from backend.peers.identity import (
    CertificateRefused,
    PeerIdentity,
    host_of,
    peer_identity,
    require_address,
    require_current,
    require_scope,
)
from backend.peers.lease_book import LeaseBook
from backend.peers.leases import OriginShare
from backend.peers.limit_settings import LimitSettings
from backend.peers.scheduler_metrics import scheduler_metrics
from backend.peers.scheduler_state import AnnounceRefused, SchedulerState
from backend.peers.shared_bodies import SharedBodies
from backend.peers.terms_follower import follow_terms
from backend.peers.tls import PeerTls
from backend.peers.wire import (
    ANNOUNCE_TARGET,
    LIMITS_TARGET,
    STATUS_TARGET,
    SWITCH_TARGET,
    TERMS_TARGET,
    Announce,
    Answer,
    ClusterLimits,
    HostInfo,
    LimitsChange,
    Terms,
    Traffic,
)

CONNECTIONS_MAX = 40_000
"""Two of each host: announcements, and what is held until terms change."""
TICK_S = 0.5
WATCH_S = 20.0
"""How long a watch is held without news; clients wait a little longer."""
ANNOUNCES = msgspec.json.Decoder(Announce)
ADMIN_SCOPE = "admin"


class SwarmStatus(msgspec.Struct, frozen=True):
    """A blob in a scope: hosts that take part, its number of pieces, and those that somebody has."""

    scope: str
    blob_id: str
    hosts: int
    pieces: int
    pieces_held: int


class HostStatus(msgspec.Struct, frozen=True):
    """A host and its traffic in bytes."""

    host: HostInfo
    scope: str
    silent_s: float
    uploads: int
    blobs: int
    traffic: Traffic


class SchedulerStatus(msgspec.Struct, frozen=True):
    """What the scheduler knows at this moment."""

    epoch: str
    peers_enabled: bool
    interval_s: float
    refused: int
    traffic: Traffic
    hosts: list[HostStatus]
    blobs: list[SwarmStatus]
    limits: "LimitsStatus"


class LimitsStatus(msgspec.Struct, frozen=True):
    """The limits of the cluster; `granted`: what all hosts together may ask of the origin at the moment."""

    hosts: LimitSettings
    origin: OriginShare
    granted: OriginShare


class Switch(msgspec.Struct, frozen=True):
    """Whether hosts use each other at all."""

    peers_enabled: bool


class Scheduler:
    """See above. `trusts_addresses`: hosts may name an upload server at another address than their own.

    With `tls` hosts are who their certificates say; to change something needs one for `ADMIN_SCOPE`.
    `others`: URLs of schedulers that the same hosts announce themselves to.
    """

    def __init__(
        self,
        state: SchedulerState,
        *,
        trusts_addresses: bool = False,
        tls: PeerTls | None = None,
        others: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tls, self._others = tls, others
        self._names: dict[str, str] = {}
        self._announcements = 0
        self.state = state
        self._trusts_addresses = trusts_addresses
        self._clock = clock
        self._watching: dict[Connection, float] = {}
        self._members = SharedBodies()
        self._routes: dict[tuple[str, str], Callable[[Connection, bytes], object]] = {
            ("POST", ANNOUNCE_TARGET): self._announce,
            ("GET", STATUS_TARGET): self._status,
            ("GET", TERMS_TARGET): lambda connection, body: self.state.terms,
            ("POST", SWITCH_TARGET): self._switch,
            ("GET", LIMITS_TARGET): self._limits,
            ("POST", LIMITS_TARGET): self._change_limits,
            ("GET", METRICS_TARGET): self._metrics,
        }

    async def serve(self, listener: socket.socket) -> None:
        """Answers until cancelled, and closes the listener."""
        context = self._tls.server if self._tls else None
        server = EventServer(
            listener, self._handle, connections_max=CONNECTIONS_MAX, tls=context, clock=self._clock
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tick, server)
            if self._tls is not None:
                nursery.start_soon(self._tls.keep_fresh)
            for url in self._others:
                client = self._tls.client if self._tls else None
                nursery.start_soon(follow_terms, url, client, self.take_terms)
            await server.run()

    def take_terms(self, terms: Terms) -> None:
        """Another scheduler has been told these; they count when they are later than those known here."""
        if terms.version > self.state.terms.version:
            self._put_terms(terms)

    def _handle(self, connection: Connection, method: str, target: str, body: bytes) -> Answered | None:
        path, _, query = target.partition("?")
        is_watch = (method, path) == ("GET", TERMS_TARGET)
        if is_watch and query == f"seen={self.state.terms.version}":
            self._watching[connection] = self._clock() + WATCH_S
            return None
        handler = self._routes.get((method, path))
        if handler is None:
            methods = [known for known, known_path in self._routes if known_path == path]
            why = f"only {', '.join(methods)}" if methods else "no such resource"
            return Answered(405 if methods else 404, msgspec.json.encode(ApiError(why)))
        try:
            answer = handler(connection, body)
            if isinstance(answer, Answer):
                return Answered(200, self._members.encode(answer))
            if isinstance(answer, PlainText):
                return Answered(200, answer.text.encode(), answer.content_type.encode())
            return Answered(200, msgspec.json.encode(answer))
        except Exception as error:
            status, why_failed = failed(error, f"{method} {path}")
            return Answered(status, msgspec.json.encode(why_failed))

    def _put_terms(self, terms: Terms) -> None:
        """Every host that watches hears of them at once: one body for all."""
        self.state.change_terms(terms)
        body = msgspec.json.encode(terms)
        watching, self._watching = self._watching, {}
        for connection in watching:
            connection.answer(Answered(200, body))

    def _changed(self, peers_enabled: bool, limits: ClusterLimits) -> None:
        version = max(int(time.time() * 1000), self.state.terms.version + 1)
        self._put_terms(Terms(version, peers_enabled, limits))

    def _announce(self, call: Connection, body: bytes) -> Answer:
        announce = ANNOUNCES.decode(body)
        reporter = announce.host.id
        if self._tls:
            self._check_certificate(announce.host, call)
        elif not self._trusts_addresses and host_of(announce.host.url) != call.peer:
            self.state.refused += 1
            why = f"it comes from {call.peer} and names an upload server at {announce.host.url[:128]}"
            raise AnnounceRefused(host=announce.host.id[:64], why=why)
        else:
            self._check_id(announce.host)
            reporter = call.peer if not self._trusts_addresses else reporter  # a machine may take any ids
        answer = self.state.announce(announce, call.peer, self._clock(), reporter)
        self._announcements += 1
        return answer

    def _check_id(self, host: HostInfo) -> None:
        """Without certificates the address is all that is known of a host: nobody elsewhere takes its id.

        Raises `AnnounceRefused`. A host that has moved is taken when its silence at the old place is over.
        """
        known = self.state.hosts.get(host.id)
        if known is not None and host_of(known.info.url) != host_of(host.url):
            self.state.refused += 1
            why = f"there is one of that name at {host_of(known.info.url)}; host_id in [peers] gives another"
            raise AnnounceRefused(host=host.id[:64], why=why)

    def _check_certificate(self, host: HostInfo, call: Connection) -> None:
        """The host may be reached where it says, belongs to its scope, and nobody else has its id.

        Raises `CertificateRefused`.
        """
        try:
            identity = self._identity(call)
            require_address(identity, host_of(host.url))
            if scope := self.state.certificate_scope(host, call.peer):
                require_scope(identity, scope)
            if host.id in self.state.hosts and self._names.get(host.id, identity.name) != identity.name:
                raise CertificateRefused(peer=identity.name, why=f"another host is {host.id[:64]}")
        except CertificateRefused:
            self.state.refused += 1
            raise
        self._names[host.id] = identity.name

    def _identity(self, call: Connection) -> PeerIdentity:
        identity = peer_identity(call.certificate, call.peer)
        require_current(identity, time.time())
        return identity

    def _check_admin(self, call: Connection) -> None:
        if self._tls:
            require_scope(self._identity(call), ADMIN_SCOPE)

    def _status(self, call: Connection, body: bytes) -> SchedulerStatus:
        state, now = self.state, self._clock()
        hosts = [
            HostStatus(h.info, h.group, now - h.heard_at, h.uploads, len(h.holdings), h.traffic)
            for h in state.hosts.values()
        ]
        return SchedulerStatus(
            epoch=state.epoch,
            peers_enabled=state.terms.peers_enabled,
            interval_s=state.interval_s,
            refused=state.refused,
            traffic=state.traffic(),
            hosts=hosts,
            blobs=[SwarmStatus(*swarm) for swarm in state.swarms()],
            limits=self._limits_status(),
        )

    def _limits(self, call: Connection, body: bytes) -> LimitsStatus:
        return self._limits_status()

    def _change_limits(self, call: Connection, body: bytes) -> LimitsStatus:
        self._check_admin(call)
        change = msgspec.json.decode(body, type=LimitsChange)
        self._changed(self.state.terms.peers_enabled, change.applied_to(self.state.limits))
        return self._limits_status()

    def _limits_status(self) -> LimitsStatus:
        limits = self.state.limits
        return LimitsStatus(limits.hosts, limits.origin, self.state.granted(self._clock()))

    def _metrics(self, call: Connection, body: bytes) -> PlainText:
        text = scheduler_metrics(self.state, self._announcements, self._clock())
        return PlainText(text, CONTENT_TYPE)

    def _switch(self, call: Connection, body: bytes) -> Switch:
        self._check_admin(call)
        wanted = msgspec.json.decode(body, type=Switch)
        self._changed(wanted.peers_enabled, self.state.limits)
        return wanted

    async def _tick(self, server: EventServer) -> None:
        began, busy_s = self._clock(), server.busy_s
        while True:
            await trio.sleep(TICK_S)
            now = self._clock()
            self.state.pace.note((server.busy_s - busy_s) / max(now - began, TICK_S))
            began, busy_s = now, server.busy_s
            self.state.expire(now)
            for host_id in self._names.keys() - self.state.hosts.keys():
                del self._names[host_id]
            self._end_watches(now)

    def _end_watches(self, now: float) -> None:
        """Answers those that have waited long enough, so that hosts which are no more are found out."""
        over = [each for each, at in self._watching.items() if at < now or not each.is_open]
        body = msgspec.json.encode(self.state.terms) if over else b""
        for connection in over:
            del self._watching[connection]
            connection.answer(Answered(200, body))


def new_leases(clock: Callable[[], float] = time.monotonic) -> LeaseBook:
    """A book whose numbers are above those of any scheduler before."""
    return LeaseBook(OriginShare(), clock(), first_number=int(time.time() * 1000))


def new_epoch() -> str:
    """A name for this life of a scheduler."""
    return os.urandom(8).hex()
