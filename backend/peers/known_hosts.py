"""What a scheduler keeps of each host, and of each blob in a scope. No I/O, no clock."""

import random
from dataclasses import dataclass, field

from backend.peers.piece import PieceSet
from backend.peers.wire import HostInfo, Traffic

SILENT_INTERVALS = 4
"""A host that has not been heard of for so many intervals has gone."""
SILENT_MIN_S = 5.0
"""But not before: a scheduler that is late itself would forget everybody, and be told everything again, which
makes it later. Others find out by themselves, within a second, that a host has died."""


@dataclass(slots=True)
class Held:
    """A host's pieces of one blob; `order` as they came, so that "since then" is a slice."""

    pieces: PieceSet
    order: list[int] = field(default_factory=list)
    generation: int = 0


@dataclass(slots=True)
class KnownHost:
    """A host as it has told of itself."""

    info: HostInfo
    group: str
    heard_at: float
    interval_s: float = 0.0
    sequence: int = 0
    uploads: int = 0
    traffic: Traffic = field(default_factory=Traffic)
    holdings: dict[str, Held] = field(default_factory=dict)
    # blob -> neighbour -> (generation, how many of its pieces were told)
    told: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)


def patience_s(host: KnownHost) -> float:
    """Seconds after which a host that is silent has gone."""
    return max(SILENT_MIN_S, SILENT_INTERVALS * host.interval_s)


class BlobSwarm:
    """The hosts that have told of one blob in one scope."""

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces
        self.hosts: dict[str, int] = {}
        self.names: list[str] = []
        self.known_by: dict[str, int] = {}

    def add(self, name: str) -> None:
        """A host has joined; its place in `names` is what `hosts` has of it."""
        if name not in self.hosts:
            self.hosts[name] = len(self.names)
            self.names.append(name)

    def remove(self, name: str) -> None:
        """A host has gone: the last one takes its place."""
        place, last = self.hosts.pop(name), self.names.pop()
        if last != name:
            self.names[place], self.hosts[last] = last, place
        self.known_by.pop(name, None)

    def some(self, count: int, chance: random.Random) -> list[str]:
        """So many by chance, or all."""
        return list(self.names) if count >= len(self.names) else chance.sample(self.names, count)
