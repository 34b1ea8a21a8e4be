"""Which hosts another one should know as sources of a blob: one small interface and its rules. No I/O."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from backend.peers.wire import HostInfo

FAR_PART = 4
"""One neighbour in so many is taken from other zones although there are enough near ones: so that what one
zone has gets into the others."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A host that might be a source: `uploads` it is sending now, `have` of the blob's pieces, and how many
    hosts know it as a neighbour already."""

    host: HostInfo
    uploads: int
    have: int
    known_by: int


class Ranker(Protocol):
    """Chooses neighbours."""

    def choose(
        self, asking: HostInfo, candidates: Sequence[Candidate], count: int, chance: random.Random
    ) -> list[str]:
        """At most `count` host ids out of `candidates`, the most useful first."""
        ...


class RuleRanker:
    """By zone, then by how many others lean on a host already, then by its load; equals by chance."""

    def choose(
        self, asking: HostInfo, candidates: Sequence[Candidate], count: int, chance: random.Random
    ) -> list[str]:
        """See `Ranker`."""

        def order(candidate: Candidate) -> tuple[int, int, float]:
            return candidate.known_by, candidate.uploads, chance.random()

        near = sorted((c for c in candidates if c.host.zone == asking.zone), key=order)
        far = sorted((c for c in candidates if c.host.zone != asking.zone), key=order)
        from_far = min(len(far), max(count // FAR_PART, count - len(near)))
        chosen = near[: count - from_far] + far[:from_far]
        return [candidate.host.id for candidate in chosen]
