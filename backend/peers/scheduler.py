"""The scheduler as a server: `SchedulerState` behind JSON over HTTP, see docs/peers.md.

Concurrency: everything that touches the state is free of checkpoints. One task forgets silent hosts.
"""

import os
import socket
import time
from collections.abc import Callable

import msgspec
import trio

from backend.json_api import ApiRequest, PlainText, serve_api
from backend.metrics import CONTENT_TYPE, METRICS_TARGET
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
from backend.peers.tls import PeerTls
from backend.peers.wire import (
    ANNOUNCE_TARGET,
    LIMITS_TARGET,
    STATUS_TARGET,
    SWITCH_TARGET,
    Announce,
    Answer,
    HostInfo,
    LimitsChange,
    Traffic,
)

CONNECTIONS_MAX = 20_000
EXPIRE_PAUSE_S = 0.5
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
    """

    def __init__(
        self,
        state: SchedulerState,
        *,
        trusts_addresses: bool = False,
        tls: PeerTls | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tls = tls
        self._names: dict[str, str] = {}
        self._announcements = 0
        self.state = state
        self._trusts_addresses = trusts_addresses
        self._clock = clock

    async def serve(self, listener: socket.socket) -> None:
        """Answers until cancelled, and closes the listener."""
        routes = {
            ("POST", ANNOUNCE_TARGET): self._announce,
            ("GET", STATUS_TARGET): self._status,
            ("POST", SWITCH_TARGET): self._switch,
            ("GET", LIMITS_TARGET): self._limits,
            ("POST", LIMITS_TARGET): self._change_limits,
            ("GET", METRICS_TARGET): self._metrics,
        }
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._expire)
            if self._tls is not None:
                nursery.start_soon(self._tls.keep_fresh)
            context = self._tls.server if self._tls else None
            await serve_api(listener, routes, connections_max=CONNECTIONS_MAX, ssl_context=context)

    async def _announce(self, call: ApiRequest) -> Answer:
        await trio.lowlevel.checkpoint()
        announce = msgspec.json.decode(call.body, type=Announce)
        if self._tls:
            self._check_certificate(announce.host, call)
        elif not self._trusts_addresses and host_of(announce.host.url) != call.peer:
            self.state.refused += 1
            why = f"it comes from {call.peer} and names an upload server at {announce.host.url[:128]}"
            raise AnnounceRefused(host=announce.host.id[:64], why=why)
        answer = self.state.announce(announce, call.peer, self._clock())
        self._announcements += 1
        return answer

    def _check_certificate(self, host: HostInfo, call: ApiRequest) -> None:
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

    def _identity(self, call: ApiRequest) -> PeerIdentity:
        identity = peer_identity(call.certificate, call.peer)
        require_current(identity, time.time())
        return identity

    def _check_admin(self, call: ApiRequest) -> None:
        if self._tls:
            require_scope(self._identity(call), ADMIN_SCOPE)

    async def _status(self, call: ApiRequest) -> SchedulerStatus:
        await trio.lowlevel.checkpoint()
        state, now = self.state, self._clock()
        hosts = [
            HostStatus(h.info, h.group, now - h.heard_at, h.uploads, len(h.holdings), h.traffic)
            for h in state.hosts.values()
        ]
        return SchedulerStatus(
            epoch=state.epoch,
            peers_enabled=state.peers_enabled,
            interval_s=state.interval_s,
            refused=state.refused,
            traffic=state.traffic(),
            hosts=hosts,
            blobs=[SwarmStatus(*swarm) for swarm in state.swarms()],
            limits=self._limits_status(),
        )

    async def _limits(self, call: ApiRequest) -> LimitsStatus:
        await trio.lowlevel.checkpoint()
        return self._limits_status()

    async def _change_limits(self, call: ApiRequest) -> LimitsStatus:
        await trio.lowlevel.checkpoint()
        self._check_admin(call)
        change = msgspec.json.decode(call.body, type=LimitsChange)
        self.state.change_limits(change.applied_to(self.state.limits))
        return self._limits_status()

    def _limits_status(self) -> LimitsStatus:
        limits = self.state.limits
        return LimitsStatus(limits.hosts, limits.origin, self.state.granted(self._clock()))

    async def _metrics(self, call: ApiRequest) -> PlainText:
        await trio.lowlevel.checkpoint()
        text = scheduler_metrics(self.state, self._announcements, self._clock())
        return PlainText(text, CONTENT_TYPE)

    async def _switch(self, call: ApiRequest) -> Switch:
        await trio.lowlevel.checkpoint()
        self._check_admin(call)
        wanted = msgspec.json.decode(call.body, type=Switch)
        self.state.peers_enabled = wanted.peers_enabled
        return wanted

    async def _expire(self) -> None:
        while True:
            await trio.sleep(EXPIRE_PAUSE_S)
            self.state.expire(self._clock())
            for host_id in self._names.keys() - self.state.hosts.keys():
                del self._names[host_id]


def new_leases(clock: Callable[[], float] = time.monotonic) -> LeaseBook:
    """A book whose numbers are above those of any scheduler before."""
    return LeaseBook(OriginShare(), clock(), first_number=int(time.time() * 1000))


def new_epoch() -> str:
    """A name for this life of a scheduler."""
    return os.urandom(8).hex()
