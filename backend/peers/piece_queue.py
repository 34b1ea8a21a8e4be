"""Which of the pieces that this host lacks, and that nobody waits for, is asked for next: the rarest.

Without that all hosts draw on the same full links for what is everywhere soon, and at the end everybody waits
for the few that have the rest (Legout et al., "Rarest first and choke algorithms are enough", 2006).

Concurrency: for the trio thread. `dispatch` has no checkpoint: what it decides is counted at once.
"""

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import trio

from backend.peers.swarm import AskPeer, Choice, Pause, Swarm

ASKED_MAX = 12
"""Requests of this host that nobody waits for, to all other hosts together."""
SAMPLED = 32
"""Pieces that are compared each time: enough to find a rare one, few enough to look at for each request."""
PAUSE_MIN_S = 0.02
PAUSE_MAX_S = 0.25


@dataclass(eq=False, slots=True)
class Wanted:
    """A part of a piece that somebody wants to have brought. `tried` may grow."""

    blob_id: str
    piece: int
    size_bytes: int
    tried: Collection[str]
    decided: trio.Event = field(default_factory=trio.Event)
    choice: Choice | None = None


class PieceQueue:
    """See above."""

    def __init__(self, swarm: Swarm, chance: random.Random, clock: Callable[[], float]) -> None:
        self._swarm = swarm
        self._chance = chance
        self._clock = clock
        self._waiting: list[Wanted] = []
        self._asked = 0

    async def choose(self, wanted: Wanted) -> Choice:
        """Waits until it is decided whom to ask, or that nobody can be asked now (`Pause`). A checkpoint.

        Whoever gets an `AskPeer` calls `release` when the request has ended.
        """
        wanted.choice, wanted.decided = None, trio.Event()
        self._waiting.append(wanted)
        self.dispatch()
        try:
            with trio.move_on_after(PAUSE_MAX_S):
                await wanted.decided.wait()
        except trio.Cancelled:
            self._withdraw(wanted)
            raise
        if wanted in self._waiting:
            self._waiting.remove(wanted)
        return wanted.choice or Pause(PAUSE_MIN_S)

    def release(self, choice: Choice) -> None:
        """A request that was decided here has ended."""
        if isinstance(choice, AskPeer):
            health = self._swarm.health_of(choice.host.id)
            health.requests -= not choice.is_owner
            health.errands -= choice.is_owner
            self._asked -= 1
            self.dispatch()

    def _withdraw(self, wanted: Wanted) -> None:
        if wanted in self._waiting:
            self._waiting.remove(wanted)
        elif wanted.choice is not None:
            self.release(wanted.choice)

    def dispatch(self) -> None:
        """Decides what can be decided now; for when a request has ended, or others have got something."""
        now = self._clock()
        sample = self._waiting
        if len(sample) > SAMPLED:
            sample = self._chance.sample(sample, SAMPLED)
        for wanted in sorted(sample, key=self._rarity):
            choice = self._swarm.choose(
                wanted.blob_id, wanted.piece, wanted.size_bytes, now, wanted.tried, is_urgent=False
            )
            if isinstance(choice, Pause):
                continue
            if isinstance(choice, AskPeer):
                if self._asked >= ASKED_MAX:
                    continue
                health = self._swarm.health_of(choice.host.id)
                health.requests += not choice.is_owner
                health.errands += choice.is_owner
                self._asked += 1
            wanted.choice = choice
            self._waiting.remove(wanted)
            wanted.decided.set()

    def _rarity(self, wanted: Wanted) -> tuple[bool, int, float]:
        """What somebody has comes before what nobody has, of which owners take care."""
        holders = self._swarm.holder_count(wanted.blob_id, wanted.piece)
        return not holders, holders, self._chance.random()
