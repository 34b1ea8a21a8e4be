"""The scheduler's side of leases: splits the limits of the origin among the hosts that ask. Sans-I/O.

A host asks with every announce for what it needs, and gets a share for `LEASE_S`. The sum of what live leases
allow never exceeds the limit:

- A lease counts until the host says that it has seen a later one, or until it expires: an answer may be
  lost, and the host goes on with the lease before. A share that shrinks is free for others one announce
  later.
- A silent host keeps what it held until that expires. Then it takes itself back to its floor, and the book
  keeps as much free for `FORGET_S`, unless the host says goodbye.
- A book that is new grants no more than floors for `LEASE_S`: the one before it may have lent everything.

Shares are max-min fair: everyone gets what it wants up to one level. A small part of the rates is split
evenly among all hosts, so that new work starts before the next announce. Requests at once are whole
numbers: what a level of whole numbers leaves over goes to some hosts for the time of a lease, then to those
that waited longest.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from backend.peers.leases import LEASE_S, Lease, OriginShare

FORGET_S = 30.0
LEVEL_S = 0.25
"""How old the level may be: between two of its computations an announce costs constant time. Without any
limit there is none, and hosts are gone through once in the time of a lease."""

STANDING_PART = 0.04
"""The part of the rates that hosts without work hold; more would be missed by those who have."""

FLOOR_HOSTS = 8
"""A floor is never more than an eighth of the limit, however few hosts the book knows."""

GRANTS_KEPT = 8
"""So many unconfirmed leases of a host are told apart; one that asks on without reading the answers keeps the
largest of them for longer, which is its own loss."""

Amounts = tuple[float, float, float]
"""Bytes per second, requests per second, requests at once; `inf` is without limit."""

NOTHING: Amounts = (0.0, 0.0, 0.0)
PLACES = 2


@dataclass(slots=True)
class _Grant:
    number: int
    amounts: Amounts
    expires_at: float


@dataclass(slots=True)
class _Host:
    asked_at: float
    wants: Amounts = NOTHING
    grants: list[_Grant] = field(default_factory=list)
    floor: Amounts = NOTHING
    held: Amounts = NOTHING
    turn_since: float | None = None  # holds one of the places that the level leaves over
    turn_ended: float = -math.inf


class LeaseBook:
    """Who holds how much of a limit. `first_number` must rise over restarts, as a wall clock in ms does."""

    def __init__(self, limit: OriginShare, now: float, first_number: int = 1) -> None:
        self._limit = _amounts(limit)
        self._hosts: dict[str, _Host] = {}
        self._total = list(NOTHING)
        self._number = first_number
        self._opens_at = now + LEASE_S
        self._levels: list[float] = [math.inf] * 3
        self._levelled_at = -math.inf

    @property
    def known_hosts(self) -> int:
        """How many hosts floors are kept for."""
        return len(self._hosts)

    @property
    def _level_s(self) -> float:
        return LEVEL_S if any(each != math.inf for each in self._limit) else LEASE_S

    def change(self, limit: OriginShare) -> None:
        """Another limit; leases that exceed it run on until they are renewed, `LEASE_S` at most."""
        self._limit = _amounts(limit)
        self._levelled_at = -math.inf

    def ask(self, name: str, wants: OriginShare, seen: int, now: float) -> Lease:
        """A lease for what `name` wants (None: as much as there is), which has seen lease number `seen`."""
        host = self._hosts.setdefault(name, _Host(now))
        host.asked_at = now
        host.wants = self._sane(wants)
        host.grants = [each for each in host.grants if each.number >= seen and each.expires_at > now]
        self._account(host, NOTHING)
        if now - self._levelled_at >= self._level_s or now < self._levelled_at:
            self._level(now)
        self._account(host, self._held_by_grants(host))
        host.floor = self._floor()
        amounts = self._grant(host, now)
        self._remember(host, amounts, now)
        return Lease(self._number, _share(amounts), _share(host.floor), LEASE_S)

    def leave(self, name: str) -> None:
        """The host says goodbye: it uses nothing any more."""
        host = self._hosts.pop(name, None)
        if host is not None:
            self._account(host, NOTHING)

    def granted(self, now: float) -> OriginShare:
        """The sum of what live leases allow; no number for what has no limit."""
        live = [self._live(host, now) for host in self._hosts.values()]
        bps, rps, places = (
            math.inf if limit == math.inf else amount
            for amount, limit in zip(_sum(live), self._limit, strict=True)
        )
        return _share((bps, rps, places))

    def _live(self, host: _Host, now: float) -> Amounts:
        return _most(each.amounts for each in host.grants if each.expires_at > now)

    def _grant(self, host: _Host, now: float) -> Amounts:
        fair = [
            math.inf if limit == math.inf else min(want, level)
            for want, level, limit in zip(self._with_standing(host), self._levels, self._limit, strict=True)
        ]
        if self._levels[PLACES] != math.inf:
            fair[PLACES] = min(host.wants[PLACES], math.floor(self._levels[PLACES]))
            fair[PLACES] += host.turn_since is not None and host.wants[PLACES] > fair[PLACES]
        if now < self._opens_at:
            fair = [min(amount, floor) for amount, floor in zip(fair, host.floor, strict=True)]
        return _rounded(min(*pair) for pair in zip(fair, self._free_for(host), strict=True))

    def _free_for(self, host: _Host) -> list[float]:
        """What others leave: its own leases before do not add to a new one, which replaces them."""
        return [
            math.inf if limit == math.inf else max(0.0, limit - (total - held))
            for limit, total, held in zip(self._limit, self._total, host.held, strict=True)
        ]

    def _remember(self, host: _Host, amounts: Amounts, now: float) -> None:
        self._number += 1
        host.grants.append(_Grant(self._number, amounts, now + LEASE_S))
        if len(host.grants) > GRANTS_KEPT:
            oldest = host.grants.pop(0)
            host.grants[0].amounts = _most([oldest.amounts, host.grants[0].amounts])
        self._account(host, self._held_by_grants(host))

    def _held_by_grants(self, host: _Host) -> Amounts:
        return _most(each.amounts for each in host.grants)

    def _account(self, host: _Host, held: Amounts) -> None:
        """Enters what a host may use at most; the total follows. What has no limit counts as nothing."""
        counted = [0.0 if amount == math.inf else amount for amount in held]
        for index, amount in enumerate(counted):
            self._total[index] += amount - host.held[index]
        host.held = (counted[0], counted[1], counted[2])

    def _level(self, now: float) -> None:
        """Goes through all hosts: drops what is over and finds the level."""
        self._levelled_at = now
        self._sweep(now)
        live = [host for host in self._hosts.values() if now - host.asked_at < LEASE_S]
        silent = _sum(host.held for host in self._hosts.values() if now - host.asked_at >= LEASE_S)
        wants = [self._with_standing(host) for host in live]
        for index, limit in enumerate(self._limit):
            self._levels[index] = _water_level([each[index] for each in wants], limit - silent[index])
        self._take_turns(live, self._limit[PLACES] - silent[PLACES], now)

    def _sweep(self, now: float) -> None:
        for name, host in list(self._hosts.items()):
            if now - host.asked_at >= LEASE_S + FORGET_S:
                self.leave(name)
                continue
            host.grants = [each for each in host.grants if each.expires_at > now]
            is_silent = now - host.asked_at >= LEASE_S
            self._account(host, host.floor if is_silent else self._held_by_grants(host))
        self._total = list(_sum(host.held for host in self._hosts.values()))  # floats add up errors

    def _take_turns(self, live: list[_Host], places: float, now: float) -> None:
        """Hands out the places that a level of whole numbers leaves over, each for the time of a lease."""
        base = math.floor(self._levels[PLACES]) if self._levels[PLACES] != math.inf else math.inf
        wanting = [host for host in live if host.wants[PLACES] > base]
        for host in self._hosts.values():
            over = host.turn_since is not None and now - host.turn_since >= LEASE_S
            if over or (host.turn_since is not None and host.wants[PLACES] <= base):
                host.turn_since, host.turn_ended = None, now
        if not wanting:
            return
        left_over = places - sum(min(host.wants[PLACES], base) for host in live)
        in_turn = sorted(wanting, key=lambda host: (host.turn_since is None, host.turn_ended))
        for rank, host in enumerate(in_turn):
            if rank < left_over:
                host.turn_since = now if host.turn_since is None else host.turn_since
            elif host.turn_since is not None:
                host.turn_since, host.turn_ended = None, now

    def _with_standing(self, host: _Host) -> Amounts:
        hosts = max(len(self._hosts), 1)
        standing = [
            0.0 if limit == math.inf else limit * STANDING_PART / hosts for limit in self._limit[:PLACES]
        ]
        place = 1.0 if math.inf > self._limit[PLACES] >= hosts / STANDING_PART else 0.0
        return _most([host.wants, (standing[0], standing[1], place)])

    def _floor(self) -> Amounts:
        """The limit divided by the hosts; one request at once, as none would be a stop."""
        bps, rps, places = (limit / max(len(self._hosts), FLOOR_HOSTS) for limit in self._limit)
        return _rounded((bps, rps, max(1.0, places) if self._limit[PLACES] else 0.0))

    def _sane(self, wants: OriginShare) -> Amounts:
        """What a host may want at most is everything, whatever it says."""
        asked = zip(_amounts(wants), self._limit, strict=True)
        bps, rps, places = (min(max(want, 0.0), limit) for want, limit in asked)
        return bps, rps, places


def _amounts(share: OriginShare) -> Amounts:
    bps, rps, places = (
        math.inf if each is None else float(each) for each in (share.bps, share.rps, share.concurrency)
    )
    return bps, rps, places


def _share(amounts: Amounts) -> OriginShare:
    bps, rps, places = (None if each == math.inf else each for each in amounts)
    return OriginShare(None if bps is None else int(bps), rps, None if places is None else int(places))


def _rounded(amounts: Iterable[float]) -> Amounts:
    """Whole bytes and places, rounded down."""
    bps, rps, places = amounts
    return bps // 1 if bps != math.inf else bps, rps, places // 1 if places != math.inf else places


def _most(several: Iterable[Amounts]) -> Amounts:
    bps, rps, places = NOTHING
    for each in several:
        bps, rps, places = max(bps, each[0]), max(rps, each[1]), max(places, each[2])
    return bps, rps, places


def _sum(several: Iterable[Amounts]) -> Amounts:
    bps, rps, places = NOTHING
    for each in several:
        bps, rps, places = bps + each[0], rps + each[1], places + each[2]
    return bps, rps, places


def _water_level(wants: list[float], limit: float) -> float:
    """Up to where everyone gets what it wants, so that all of `limit` is given; `inf` if it does."""
    left = max(limit, 0.0)
    for index, want in enumerate(sorted(wants)):
        level = left / (len(wants) - index)
        if want > level:
            return level
        left -= want
    return math.inf
