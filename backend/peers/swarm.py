"""Whom a host knows, what they have, and whom to ask for a piece. No I/O: time and chance are given.

Nothing here waits for a scheduler: it answers from what the last announcement brought. Without any, the host
is alone and goes to the origin.
"""

import math
import random
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from backend.peers.health import HedgeTimer, PeerHealth
from backend.peers.owners import OwnerRanking
from backend.peers.piece import PieceSet
from backend.peers.wire import Answer, HolderChange, HostInfo

SAMPLED = 4
"""Holders that are compared for each request: more would send everybody to the same one."""
OWNER_TRIES = 3
FAR_FACTOR = 2.0
"""A host of another zone is asked when it promises to be this much faster."""
PIECES_MAX = 1 << 16
COMMON = 4
"""What so many hosts have is not rare, and not counted any further."""
REQUESTS_MAX = 12
REQUESTS_OF_PEER = range(2, 7)
"""What nobody waits for is asked of a host so many times at once, the fewer the more hosts there are: what
one cannot send soon another one may have by then."""
ERRANDS_MAX = 4
"""Requests to owners, of all together, that nobody waits for: they last, and keep others from being made."""
ERRANDS_PAUSE_S = 0.25


@dataclass(frozen=True, slots=True)
class AskPeer:
    """Ask this host; `is_owner`: it is to bring from the origin what it lacks."""

    host: HostInfo
    is_owner: bool = False


@dataclass(frozen=True, slots=True)
class AskOrigin:
    """Go to the origin. `is_owner`: because it is this host's part; else because nobody is left."""

    is_owner: bool


@dataclass(frozen=True, slots=True)
class Pause:
    """Those who have it, or are to bring it, are busy: ask again after `delay_s`, or, where that is 0, when
    a request of this host has ended."""

    delay_s: float


Choice = AskPeer | AskOrigin | Pause


class Swarm:
    """See above."""

    def __init__(self, own_id: str, zone: str = "", chance: random.Random | None = None) -> None:
        self.own_id = own_id
        self.members: dict[str, HostInfo] = {}
        self.health: dict[str, PeerHealth] = {}
        self.hedge = HedgeTimer()
        self.enabled = True
        self.errands = 0
        """Requests under way, that nobody waits for, for what owners are to bring from the origin."""
        self._zone = zone
        self._chance = chance or random.Random()
        self._ranking = OwnerRanking([own_id])
        self._holders: dict[str, dict[str, PieceSet]] = {}
        self._pieces: dict[str, int] = {}
        self._commonness: dict[str, list[int]] = {}
        """Until what others have changes."""
        self._own: dict[str, PieceSet] = {}
        self._own_of: OwnerRanking | None = None
        self._banned: frozenset[str] = frozenset()

    # -- what is heard

    def take(self, answer: Answer) -> None:
        """Takes over what a scheduler answered."""
        change = answer.members
        if change.full:
            self.members = {host.id: host for host in change.joined}
        else:
            self.members.update((host.id, host) for host in change.joined)
            for gone in change.left:
                self.members.pop(gone, None)
        if change.full or change.joined or change.left:
            self._rank()
        for holding in answer.holders:
            self._take_holding(holding)
            self._commonness.pop(holding.blob_id, None)
        self.enabled = answer.peers_enabled
        self._banned = frozenset(answer.banned)

    def share(
        self, members: dict[str, HostInfo], ranking: OwnerRanking, blob_id: str, holders: dict[str, PieceSet]
    ) -> None:
        """Takes over tables that somebody else keeps: those of thousands of hosts in one process."""
        self.members, self._ranking = members, ranking
        self._holders[blob_id] = holders
        self._commonness.pop(blob_id, None)

    def forget_all(self) -> None:
        """No scheduler knows this host any more: what others have is learnt anew."""
        self._holders.clear()
        self._commonness.clear()

    def note_blob(self, blob_id: str, pieces: int) -> None:
        """The blob is of interest, and has so many pieces."""
        self._pieces[blob_id] = pieces
        holders = self._holders.get(blob_id, {})
        for name in [name for name, held in holders.items() if held.count != pieces]:
            del holders[name]
        self._commonness.pop(blob_id, None)

    def forget_blob(self, blob_id: str) -> None:
        """The blob is of no interest any more."""
        self._holders.pop(blob_id, None)
        self._pieces.pop(blob_id, None)
        self._commonness.pop(blob_id, None)

    def note_holder(self, blob_id: str, host_id: str, piece: int, count: int) -> None:
        """Another host was found to have a piece."""
        if host_id in self.members and host_id != self.own_id:
            self._commonness.pop(blob_id, None)
            self._holders.setdefault(blob_id, {}).setdefault(host_id, PieceSet(count)).add(piece)

    def note_moved(self, blob_id: str, from_id: str, to_id: str, piece: int, count: int) -> None:
        """A host has sent this one on to another for a piece: it is that one that has it, for this host."""
        holders = self._holders.get(blob_id, {})
        held, known = holders.get(from_id), holders.get(to_id)
        if known is not None and held is not None and piece < held.count == known.count:
            # As many have it as before, or one less: not worth counting all again.
            held.discard(piece)
            known.add(piece)
        else:
            self.note_absent(blob_id, from_id, piece)
            self.note_holder(blob_id, to_id, piece, count)

    def note_more(self, blob_id: str, host_id: str, told: PieceSet) -> None:
        """A known host has these pieces, too."""
        known = self._holders.setdefault(blob_id, {}).setdefault(host_id, PieceSet(told.count))
        masks = self._commonness.get(blob_id)
        if masks is not None:
            _count(masks, told.mask & ~known.mask)
        known.merge(told)

    def note_absent(self, blob_id: str, host_id: str, piece: int) -> None:
        """A host has not what it was thought to have."""
        pieces = self._holders.get(blob_id, {}).get(host_id)
        if pieces is not None and piece < pieces.count:
            pieces.discard(piece)
            self._commonness.pop(blob_id, None)

    def health_of(self, host_id: str) -> PeerHealth:
        """What was learnt about a host."""
        health = self.health.get(host_id)
        if health is None:
            health = self.health[host_id] = PeerHealth()
        return health

    def host_at(self, url: str) -> HostInfo | None:
        """The member whose upload server is at `url`."""
        return next((host for host in self.members.values() if host.url == url), None)

    # -- what is decided

    @property
    def is_alone(self) -> bool:
        """Whether there is nobody to ask."""
        return not self.enabled or len(self.members) <= (self.own_id in self.members)

    def is_owner(self, blob_id: str, piece: int, now: float) -> bool:
        """Whether this host is to bring a piece from the origin: no usable host is before it."""
        for name in self._ranked(blob_id, piece):
            if name == self.own_id:
                return True
            if self._is_usable(name, now):
                return False
        return True

    def may_bring(self, blob_id: str, piece: int) -> bool:
        """Whether this host may be asked to bring a piece: it is first, or not far behind it.

        Who asks knows why it does not ask those before. This host looks for itself: it asks them, and goes to
        the origin when they fail. As everybody asks only those before itself, nobody waits for itself.
        """
        return self.own_id in self._ranked(blob_id, piece)[:OWNER_TRIES]

    def own_pieces(self, blob_id: str, count: int) -> PieceSet:
        """The pieces, of so many, for which this host comes first, whoever is usable."""
        if self._own_of is not self._ranking:
            self._own_of, self._own = self._ranking, {}
        own = self._own.get(blob_id)
        if own is None or own.count != count:
            own = self._own[blob_id] = PieceSet(count)
            own.update(piece for piece in range(count) if self._ranked(blob_id, piece)[0] == self.own_id)
        return own

    def offer(self, blob_id: str, lacking: int, now: float) -> int:
        """What of the mask `lacking` one host has that may be asked for more now: the best of some."""
        limit, best_s, offer = self._requests_max(), math.inf, 0
        compared = 0
        for name, pieces in self._in_some_order(blob_id):
            mask = pieces.mask & lacking
            if not mask or not self._is_usable(name, now):
                continue
            health = self.health_of(name)
            if now < health.busy_until or health.requests >= limit:
                continue
            due_s = self._due_s(name, 0)
            if due_s < best_s:
                best_s, offer = due_s, mask
            compared += 1
            if compared == SAMPLED:
                break
        return offer

    def commonness(self, blob_id: str) -> Sequence[int]:
        """Masks of the pieces that at least one known host has, at least two, and so on up to `COMMON`."""
        found = self._commonness.get(blob_id)
        if found is None:
            found = self._commonness[blob_id] = [0] * COMMON
            for pieces in self._holders.get(blob_id, {}).values():
                _count(found, pieces.mask)
        return found

    def holder_count(self, blob_id: str, piece: int) -> int:
        """How many of the known hosts have a piece; `COMMON` stands for more, too."""
        holders = self._holders.get(blob_id)
        if not holders:
            return 0
        one_of_them = next(iter(holders.values()))
        if piece >= one_of_them.count:
            return 0
        place, count = one_of_them.place_of(piece), 0
        for mask in self.commonness(blob_id):
            if not mask >> place & 1:
                break
            count += 1
        return count

    def choose(
        self,
        blob_id: str,
        piece: int,
        size_bytes: int,
        now: float,
        tried: Collection[str] = (),
        *,
        is_urgent: bool = True,
    ) -> Choice:
        """Whom to ask for `size_bytes` of a piece; `tried` were asked for it before, in vain.

        What is not urgent waits while those who have it are busy with other requests of this host.
        """
        if self.is_alone:
            return AskOrigin(is_owner=True)
        limit = sys.maxsize if is_urgent else self._requests_max()
        free: list[str] = []
        is_full, busy_until = False, math.inf
        is_had = self.holder_count(blob_id, piece)
        for name, pieces in self._in_some_order(blob_id) if is_had else ():
            if (
                piece >= pieces.count
                or piece not in pieces
                or name in tried
                or not self._is_usable(name, now)
            ):
                continue
            health = self.health_of(name)
            if now < health.busy_until:
                busy_until = min(busy_until, health.busy_until)
            elif health.requests >= limit:
                is_full = True
            else:
                free.append(name)
                if len(free) == SAMPLED:
                    break
        if free:
            return AskPeer(self.members[self._best(free, size_bytes)])
        if is_full:
            return Pause(0.0)
        if busy_until < math.inf:
            return Pause(busy_until - now)
        choice = self._owner(blob_id, piece, now, tried)
        # Most of what nobody has yet comes without being asked for: its owner wants it, too.
        if isinstance(choice, AskPeer) and not is_urgent and self.errands >= ERRANDS_MAX:
            return Pause(ERRANDS_PAUSE_S)
        return choice

    def other_holder(
        self, blob_id: str, piece: int, size_bytes: int, now: float, but: Collection[str]
    ) -> HostInfo | None:
        """Whom to ask a second time, while the first is slow."""
        choice = self.choose(blob_id, piece, size_bytes, now, but)
        return choice.host if isinstance(choice, AskPeer) and not choice.is_owner else None

    def _owner(self, blob_id: str, piece: int, now: float, tried: Collection[str]) -> Choice:
        failed = 0
        for name in self._ranked(blob_id, piece):
            if name == self.own_id:
                return AskOrigin(is_owner=True)
            if name in tried:
                failed += 1
                if failed >= OWNER_TRIES:
                    break
            elif self._is_usable(name, now):
                health = self.health_of(name)
                if not health.is_free(now):
                    return Pause(health.busy_until - now)
                return AskPeer(self.members[name], is_owner=True)
        return AskOrigin(is_owner=False)

    def _ranked(self, blob_id: str, piece: int) -> Sequence[str]:
        pieces = self._pieces.get(blob_id)
        return self._ranking.ranked(blob_id, piece, max(pieces, piece + 1) if pieces else piece + 1)

    def _requests_max(self) -> int:
        wanted = REQUESTS_MAX // max(1, len(self.members) - 1)
        return min(max(wanted, REQUESTS_OF_PEER.start), REQUESTS_OF_PEER.stop - 1)

    def _is_usable(self, name: str, now: float) -> bool:
        if name not in self.members or name in self._banned or name == self.own_id:
            return False
        health = self.health.get(name)
        return health is None or health.is_usable(now)

    def _in_some_order(self, blob_id: str) -> list[tuple[str, PieceSet]]:
        """Who is known to have some of a blob, from a place by chance on: the first ones found will do."""
        known = list(self._holders.get(blob_id, {}).items())
        start = int(self._chance.random() * len(known))
        return known[start:] + known[:start]

    def _best(self, names: list[str], size_bytes: int) -> str:
        return min(names, key=lambda name: self._due_s(name, size_bytes))

    def _due_s(self, name: str, size_bytes: int) -> float:
        factor = 1.0 if self.members[name].zone == self._zone else FAR_FACTOR
        return factor * self.health_of(name).due_s(size_bytes)

    def _rank(self) -> None:
        self._ranking = OwnerRanking({*self.members, self.own_id})
        for name in [name for name in self.health if name not in self.members]:
            del self.health[name]
        self._commonness.clear()
        for holders in self._holders.values():
            for name in [name for name in holders if name not in self.members]:
                del holders[name]

    def _take_holding(self, change: HolderChange) -> None:
        pieces = self._pieces.get(change.blob_id, change.pieces)
        if change.host_id == self.own_id or not 0 <= change.pieces <= PIECES_MAX or change.pieces != pieces:
            return  # who divides the blob into others is of no use
        holders = self._holders.setdefault(change.blob_id, {})
        known = holders.get(change.host_id)
        try:
            if change.have is not None or known is None or known.count != change.pieces:
                known = holders[change.host_id] = PieceSet(change.pieces, change.have or b"")
            known.update(change.added)
        except (ValueError, IndexError):
            holders.pop(change.host_id, None)  # nonsense: as if it had nothing


def _count(masks: list[int], more: int) -> None:
    """One more host has the pieces of the mask `more`."""
    for level, mask in enumerate(masks):
        masks[level], more = mask | more, mask & more
        if not more:
            return
