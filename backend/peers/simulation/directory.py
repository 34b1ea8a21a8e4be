"""How the hosts of a simulation learn of each other: announcements to a scheduler, at its interval.

`Exchange` runs every announcement through `SchedulerState` and `Swarm.take`. Of the answers to 10,000 hosts
that join at once most is the list of members, 10,000 for each: `SharedExchange` lets `SchedulerState` choose
the neighbours, and then keeps one list of members and one ranking for all, and lets each host learn at its
own announcements what its neighbours had told at theirs. That is what an answer says, but for its bytes: the
same at the same moment.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from backend.peers.known_hosts import SILENT_INTERVALS, SILENT_MIN_S
from backend.peers.owners import OwnerRanking
from backend.peers.piece import PieceSet
from backend.peers.scheduler_state import SchedulerState
from backend.peers.wire import Announce, Holding, HostInfo

if TYPE_CHECKING:
    from backend.peers.simulation.host import SimHost

EPOCH = "simulated"
JOIN_ROUNDS = 3
"""After so many rounds each host has its neighbours: the first ones to join find few others."""


class Directory(Protocol):
    """What tells hosts of each other."""

    @property
    def interval_s(self) -> float:
        """Between two announcements of a host."""
        ...

    def join(self, hosts: Sequence["SimHost"]) -> None:
        """These hosts announce themselves for the first time."""
        ...

    def announce(self, host: "SimHost", now: float) -> None:
        """A host tells what it has, and hears what others have."""
        ...

    def expire(self, now: float) -> None:
        """Hosts that have fallen silent are forgotten."""
        ...


class Exchange:
    """Every announcement in full."""

    def __init__(self, state: SchedulerState, blob_id: str, pieces: int) -> None:
        self._state = state
        self._blob_id = blob_id
        self._pieces = pieces
        self._known: dict[str, tuple[int, int]] = {}  # host -> sequence, version of the members

    @property
    def interval_s(self) -> float:
        """See `Directory`."""
        return self._state.interval_s

    def join(self, hosts: Sequence["SimHost"]) -> None:
        """See `Directory`."""
        for _ in range(JOIN_ROUNDS):
            for host in hosts:
                self.announce(host, 0.0)

    def announce(self, host: "SimHost", now: float) -> None:
        """See `Directory`."""
        name = host.info.id
        is_first = name not in self._known
        sequence, version = self._known.get(name, (0, -1))
        holding = Holding(self._blob_id, self._pieces, bytes(host.pieces) if is_first else None, host.fresh)
        host.fresh = []
        wanted = [self._blob_id] if host.ended_at is None else []
        announce = Announce(
            host.info,
            "" if is_first else EPOCH,
            sequence,
            version,
            is_everything=is_first,
            holdings=[holding],
            wanted=wanted,
            uploads=len(host.link.sending),
        )
        answer = self._state.announce(announce, "127.0.0.1", now)
        self._known[name] = answer.sequence, answer.members.version
        host.swarm.take(answer)

    def expire(self, now: float) -> None:
        """See `Directory`."""
        self._state.expire(now)


class SharedExchange:
    """Neighbours by `SchedulerState`, the rest in common."""

    def __init__(self, state: SchedulerState, blob_id: str, pieces: int) -> None:
        self._state = state
        self._blob_id = blob_id
        self._pieces = pieces
        self._members: dict[str, HostInfo] = {}
        self._ranking = OwnerRanking(())
        self._hosts: dict[str, SimHost] = {}
        self._told: dict[str, PieceSet] = {}
        self._heard: dict[str, dict[str, PieceSet]] = {}
        self._neighbours: dict[str, list[str]] = {}
        self._changes: dict[str, int] = {}
        self._known: dict[str, dict[str, int]] = {}
        self._versions: dict[str, int] = {}
        self._silent_since: dict[str, float] = {}

    @property
    def interval_s(self) -> float:
        """See `Directory`."""
        return self._state.interval_s

    def join(self, hosts: Sequence["SimHost"]) -> None:
        """See `Directory`."""
        for host in hosts:
            self._hosts[host.info.id] = host
            self._members[host.info.id] = host.info
            self._told[host.info.id] = PieceSet(self._pieces)
            self._heard[host.info.id] = {}
            self._known[host.info.id] = {}
            self._neighbours[host.info.id] = []
        for number in range(2):  # who chooses among all needs one round
            for host in hosts:
                self._choose_neighbours(host, number)
        self._share()

    def _choose_neighbours(self, host: "SimHost", number: int) -> None:
        holding = Holding(self._blob_id, self._pieces, bytes(host.pieces) if not number else None)
        announce = Announce(
            host.info,
            EPOCH,
            number,
            self._versions.get(host.info.id, -1),
            is_everything=not number,
            holdings=[holding],
            wanted=[self._blob_id] if number else [],
        )
        answer = self._state.announce(announce, "127.0.0.1", 0.0)
        self._versions[host.info.id] = answer.members.version
        self._neighbours[host.info.id] += [change.host_id for change in answer.holders]

    def announce(self, host: "SimHost", now: float) -> None:
        """See `Directory`."""
        name = host.info.id
        if host.fresh:
            self._told[name].update(host.fresh)
            self._changes[name] = self._changes.get(name, 0) + 1
            host.fresh = []
        if host.ended_at is not None:
            return
        known = self._known[name]
        changes, told = self._changes, self._told
        for neighbour in self._neighbours[name]:
            change = changes.get(neighbour, 0)
            if known.get(neighbour) != change and neighbour in told:
                known[neighbour] = change
                host.swarm.note_more(self._blob_id, neighbour, told[neighbour])

    def expire(self, now: float) -> None:
        """See `Directory`."""
        gone = [host for host in self._hosts.values() if not host.is_alive]
        for host in gone:
            since = self._silent_since.setdefault(host.info.id, now)
            if now - since > max(SILENT_MIN_S, SILENT_INTERVALS * self.interval_s):
                self._forget(host.info.id)

    def _forget(self, name: str) -> None:
        del self._hosts[name], self._members[name], self._told[name]
        del self._heard[name], self._neighbours[name]
        for heard in self._heard.values():
            heard.pop(name, None)
        self._share()

    def _share(self) -> None:
        self._ranking = OwnerRanking(self._members)
        for host in self._hosts.values():
            self._share_with(host)

    def _share_with(self, host: "SimHost") -> None:
        host.swarm.share(self._members, self._ranking, self._blob_id, self._heard[host.info.id])
