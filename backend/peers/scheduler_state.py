"""What a scheduler knows, and what it answers. No I/O: time and chance are given.

All of it is soft: a scheduler that has just started asks each host to tell everything again, and knows after
one round what the last one knew. Nothing that a host says is trusted further than its own holdings: numbers
are bounded here, and wrong bytes are found by whoever receives them.

Each host is told about `NEIGHBOURS_MAX` others for each blob that it wants, always the same ones as long as
they live, and after the first time only what they got since. So an answer costs the same in a cluster of any
size; owners are found through the members, whom everybody knows.
"""

import math
import random
from collections.abc import Iterable
from typing import ClassVar

import msgspec

from backend.peers.announce_check import BLOBS_MAX, fault_of
from backend.peers.known_hosts import BlobSwarm, Held, KnownHost, patience_s
from backend.peers.lease_book import LeaseBook
from backend.peers.leases import OriginShare, split_share
from backend.peers.membership import Membership
from backend.peers.pace import Pace
from backend.peers.piece import PieceSet
from backend.peers.ranking import Candidate, Ranker, RuleRanker
from backend.peers.scope import ScopeRule
from backend.peers.wire import (
    Announce,
    Answer,
    ClusterLimits,
    HolderChange,
    Holding,
    HostInfo,
    MemberChange,
    Terms,
    Traffic,
)
from rafs.errors import NydusError

NEIGHBOURS_MAX = 40
SETTLE_S = 5.0
"""A new scheduler does not tell hosts that know each other who is there before it has heard all of them: most
often it then knows what they know, and has nothing to tell."""
REPORTERS_MIN = 2
"""One host's word is not enough to ban another for all."""
BAN_S = 300.0
CANDIDATES_MAX = 200
"""Hosts of a swarm that are looked at when neighbours are chosen."""
CANDIDATES_FOR_EACH = 8
"""When few are to be chosen."""


class AnnounceRefused(NydusError):
    """A host tells what cannot be true."""

    message = "announcement of {host}: {why}"
    exit_code: ClassVar[int] = 151


class SchedulerState:
    """See above."""

    def __init__(
        self,
        epoch: str,
        scope: ScopeRule | None = None,
        ranker: Ranker | None = None,
        chance: random.Random | None = None,
        leases: LeaseBook | None = None,
        *,
        schedulers: int = 1,
        settled_at: float = -math.inf,
    ) -> None:
        """`epoch` names this life of the scheduler, unlike any earlier one. `leases`: without, no limit.

        `schedulers`: among how many the limits of the origin are split. `settled_at`: see `SETTLE_S`.
        """
        self.terms = Terms()
        self.pace = Pace()
        self._schedulers, self._settled_at = schedulers, settled_at
        self._leases = leases or LeaseBook(OriginShare(), 0.0)
        self.epoch = epoch
        self.refused = 0
        self.hosts: dict[str, KnownHost] = {}
        self._scope = scope or ScopeRule()
        self._ranker = ranker or RuleRanker()
        self._chance = chance or random.Random()
        self._members: dict[str, Membership] = {}
        self._swarms: dict[tuple[str, str], BlobSwarm] = {}
        self._reports: dict[str, dict[str, float]] = {}
        self._gone = Traffic()

    @property
    def interval_s(self) -> float:
        """How often a host that wants or gets something should announce itself."""
        return self.pace.interval_s(len(self.hosts))

    @property
    def limits(self) -> ClusterLimits:
        """Those that count now."""
        return self.terms.limits

    def announce(self, announce: Announce, address: str, now: float, reporter: str = "") -> Answer:
        """Takes an announcement from `address` in and gives the answer. Raises `AnnounceRefused`.

        `reporter`: as whose its reports of liars count; without, the host's.
        """
        self._check(announce)
        host = self._host_of(announce, address, now)
        if announce.is_leaving:
            self._remove(host)
            self._leases.leave(host.info.id)
            return Answer(self.epoch, 0, self.interval_s, MemberChange(0))
        knows_each_other = announce.epoch == self.epoch and announce.sequence == host.sequence
        if not knows_each_other:
            self._forget_told(host)
        host.sequence += 1
        host.uploads, host.traffic = announce.uploads, announce.traffic
        understood = knows_each_other or announce.is_everything
        if understood:
            self._take_holdings(host, announce)
        self._note_reports(announce, reporter or host.info.id, now)
        wanted = [] if announce.is_standby else announce.wanted
        host.interval_s = self._interval_of(announce)
        return Answer(
            epoch=self.epoch,
            sequence=host.sequence,
            interval_s=host.interval_s,
            members=self._members_for(host, announce, now),
            holders=self._holders_for(host, wanted),
            peers_enabled=self.terms.peers_enabled,
            banned=self._banned(now),
            wants_everything=not understood,
            scope=self.certificate_scope(announce.host, address),
            limits=self.limits.hosts,
            lease=self._leases.ask(host.info.id, announce.origin_wants, announce.lease_seen, now),
        )

    def certificate_scope(self, host: HostInfo, address: str) -> str:
        """See `ScopeRule`."""
        return self._scope.certificate_scope(host, address)

    def change_terms(self, terms: Terms) -> None:
        """Other limits from now on, or another switch. Raises `LimitInvalid` for one that cannot be split."""
        part = split_share(terms.limits.origin, self._schedulers)
        if part != split_share(self.limits.origin, self._schedulers):
            self._leases.change(part)
        self.terms = terms

    def change_limits(self, limits: ClusterLimits) -> None:
        """`change_terms` for those that a scheduler is started with."""
        self.change_terms(msgspec.structs.replace(self.terms, limits=limits))

    def granted(self, now: float) -> OriginShare:
        """What all hosts together may ask of the origin at this moment."""
        return self._leases.granted(now)

    def expire(self, now: float) -> None:
        """Forgets hosts that have fallen silent. To be called now and then."""
        for host in [host for host in self.hosts.values() if now - host.heard_at > patience_s(host)]:
            self._remove(host)

    def traffic(self) -> Traffic:
        """Bytes of all hosts, those that have gone too."""
        return sum((host.traffic for host in self.hosts.values()), self._gone)

    def swarms(self) -> Iterable[tuple[str, str, int, int, int]]:
        """Scope, blob, hosts, number of pieces, pieces that somebody has."""
        for (group, blob_id), swarm in self._swarms.items():
            union = PieceSet(swarm.pieces)
            for host_id in swarm.hosts:
                union.merge(self.hosts[host_id].holdings[blob_id].pieces)
            yield group, blob_id, len(swarm.hosts), swarm.pieces, len(union)

    def banned_count(self, now: float) -> int:
        """Hosts that nobody is to use."""
        return len(self._banned(now))

    # -- what hosts say

    def _check(self, announce: Announce) -> None:
        if why := fault_of(announce):
            self._refuse(announce.host.id[:64], why)

    def _refuse(self, host_id: str, why: str) -> None:
        self.refused += 1
        raise AnnounceRefused(host=host_id, why=why)

    def _host_of(self, announce: Announce, address: str, now: float) -> KnownHost:
        info = announce.host
        group = self._scope.group_of(info, address)
        host = self.hosts.get(info.id)
        if host is not None and host.group != group:
            self._remove(host)
            host = None
        if host is None:
            host = self.hosts[info.id] = KnownHost(info, group, now)
        host.info, host.heard_at = info, now
        self._members.setdefault(group, Membership()).put(info)
        return host

    def _take_holdings(self, host: KnownHost, announce: Announce) -> None:
        if announce.is_everything:
            kept = {holding.blob_id for holding in announce.holdings}
            for blob_id in [blob_id for blob_id in host.holdings if blob_id not in kept]:
                self._drop(host, blob_id)
        for blob_id in announce.dropped:
            self._drop(host, blob_id)
        for holding in announce.holdings:
            self._take_holding(host, holding)

    def _take_holding(self, host: KnownHost, holding: Holding) -> None:
        held = host.holdings.get(holding.blob_id)
        if held is None or held.pieces.count != holding.pieces:
            if held is not None:
                self._drop(host, holding.blob_id)
            if len(host.holdings) >= BLOBS_MAX:
                return
            held = host.holdings[holding.blob_id] = Held(PieceSet(holding.pieces))
            self._join(host, holding)
        if holding.have is not None:
            try:
                pieces = PieceSet(holding.pieces, holding.have)
            except ValueError as error:
                self.refused += 1
                raise AnnounceRefused(host=host.info.id, why=str(error)) from None
            held.pieces, held.order = pieces, list(pieces)
            held.generation += 1
        for piece in holding.added:
            if piece not in held.pieces:
                held.pieces.add(piece)
                held.order.append(piece)

    def _join(self, host: KnownHost, holding: Holding) -> None:
        key = (host.group, holding.blob_id)
        swarm = self._swarms.setdefault(key, BlobSwarm(holding.pieces))
        # Who tells another number of pieces than the first has another idea of the blob: of no use to it.
        swarm.add(host.info.id)

    def _drop(self, host: KnownHost, blob_id: str) -> None:
        if host.holdings.pop(blob_id, None) is None:
            return
        self._forget_told(host, blob_id)
        key = (host.group, blob_id)
        swarm = self._swarms[key]
        swarm.remove(host.info.id)
        if not swarm.hosts:
            del self._swarms[key]

    def _forget_told(self, host: KnownHost, *blobs: str) -> None:
        """A host no longer follows its neighbours for these blobs, or any."""
        for blob_id in blobs or list(host.told):
            swarm = self._swarms.get((host.group, blob_id))
            for neighbour in host.told.pop(blob_id, ()):
                if swarm is not None and neighbour in swarm.known_by:
                    swarm.known_by[neighbour] -= 1

    def _remove(self, host: KnownHost) -> None:
        self._forget_told(host)
        for blob_id in list(host.holdings):
            self._drop(host, blob_id)
        self._members[host.group].remove(host.info.id)
        if not self._members[host.group].hosts:
            del self._members[host.group]
        self._gone += host.traffic
        del self.hosts[host.info.id]

    # -- what they hear

    def _interval_of(self, announce: Announce) -> float:
        is_idle = not (announce.wanted or announce.holdings or announce.uploads)
        if announce.is_everything or not is_idle or any(msgspec.structs.astuple(announce.origin_wants)):
            return self.interval_s
        has_leases = self.limits.origin != OriginShare()
        return self.pace.idle_interval_s(len(self.hosts), has_leases=has_leases)

    def _members_for(self, host: KnownHost, announce: Announce, now: float) -> MemberChange:
        members = self._members[host.group]
        if announce.is_standby:
            return MemberChange(-1)
        version = announce.members_version if announce.epoch == self.epoch else -1
        if announce.epoch and announce.epoch != self.epoch and not announce.is_everything:
            return MemberChange(-1)  # it is told to announce itself again, at once
        if version < 0 and announce.members_digest:
            if announce.members_digest == members.digest:
                return MemberChange(members.version)
            if now < self._settled_at:
                return MemberChange(-1)
        return members.since(version, now)

    def _holders_for(self, host: KnownHost, wanted: list[str]) -> list[HolderChange]:
        changes: list[HolderChange] = []
        for blob_id in [blob_id for blob_id in host.told if blob_id not in wanted]:
            self._forget_told(host, blob_id)
        for blob_id in wanted:
            swarm = self._swarms.get((host.group, blob_id))
            if swarm is None:
                continue
            told = host.told.setdefault(blob_id, {})
            for neighbour in self._neighbours(host, blob_id, swarm, told):
                change = self._change_of(neighbour, blob_id, swarm.pieces, told)
                if change is not None:
                    changes.append(change)
        return changes

    def _neighbours(
        self, host: KnownHost, blob_id: str, swarm: BlobSwarm, told: dict[str, tuple[int, int]]
    ) -> list[str]:
        for gone in [name for name in told if name not in swarm.hosts]:
            del told[gone]
        room = NEIGHBOURS_MAX - len(told)
        others = len(swarm.hosts) - 1 - len(told)
        if room > 0 and others > 0:
            drawn = swarm.some(min(CANDIDATES_MAX, room * CANDIDATES_FOR_EACH) + len(told) + 1, self._chance)
            names = [name for name in drawn if name != host.info.id and name not in told]
            candidates = [self._candidate(name, blob_id, swarm) for name in names]
            for name in self._ranker.choose(host.info, candidates, room, self._chance):
                told[name] = (-1, 0)
                swarm.known_by[name] = swarm.known_by.get(name, 0) + 1
        return list(told)

    def _candidate(self, name: str, blob_id: str, swarm: BlobSwarm) -> Candidate:
        host = self.hosts[name]
        return Candidate(
            host.info, host.uploads, len(host.holdings[blob_id].order), swarm.known_by.get(name, 0)
        )

    def _change_of(
        self, neighbour: str, blob_id: str, pieces: int, told: dict[str, tuple[int, int]]
    ) -> HolderChange | None:
        held = self.hosts[neighbour].holdings[blob_id]
        if held.pieces.count != pieces:
            return None
        generation, position = told[neighbour]
        told[neighbour] = (held.generation, len(held.order))
        if generation != held.generation:
            return HolderChange(blob_id, neighbour, pieces, have=bytes(held.pieces))
        if position == len(held.order):
            return None
        return HolderChange(blob_id, neighbour, pieces, added=held.order[position:])

    # -- liars

    def _note_reports(self, announce: Announce, reporter: str, now: float) -> None:
        for bad in announce.bad_peers[:64]:
            if bad.host_id in self.hosts and bad.host_id != announce.host.id:
                self._reports.setdefault(bad.host_id, {})[reporter] = now

    def _banned(self, now: float) -> list[str]:
        """Hosts that several others have caught sending wrong bytes."""
        banned: list[str] = []
        for host_id, reporters in list(self._reports.items()):
            for reporter in [name for name, at in reporters.items() if now - at > BAN_S]:
                del reporters[reporter]
            if not reporters:
                del self._reports[host_id]
            elif len(reporters) >= REPORTERS_MIN:
                banned.append(host_id)
        return banned
