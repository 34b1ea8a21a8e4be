"""Which of the pieces that this host lacks, and that nobody waits for, is asked for next. No I/O.

The rarest: without that all hosts draw on the same full links for what is everywhere soon, and at the end
everybody waits for the few that have the rest (Legout et al., "Rarest first and choke algorithms are enough",
2006). Among those that are equally rare by chance, so that hosts have different ones to give.
"""

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass

from backend.peers.health import PeerHealth
from backend.peers.swarm import AskPeer, Choice, Pause, Swarm

ASKED_MAX = 12
"""Requests of this host that nobody waits for, to all other hosts together."""
SAMPLED = 32
"""Pieces that are compared each time: enough to find a rare one, few enough to look at for each request."""


@dataclass(eq=False, slots=True)
class Wanted:
    """A part of a piece that is to be brought. `tried` may grow; `decided` is told whom to ask, once.

    `again_at`: before that there is no use in looking again, if nothing is heard.
    """

    blob_id: str
    piece: int
    size_bytes: int
    tried: Collection[str]
    decided: Callable[[Choice], None]
    again_at: float = 0.0


class PieceQueue:
    """See above. What is decided is counted in the same step, so that it holds for the next decision."""

    def __init__(self, swarm: Swarm, chance: random.Random, clock: Callable[[], float]) -> None:
        self._swarm = swarm
        self._chance = chance
        self._clock = clock
        self._waiting: dict[Wanted, None] = {}
        # By the choice itself: a host may have left, and be known anew, before its request has ended.
        self._asked: dict[int, PeerHealth] = {}

    @property
    def asked(self) -> int:
        """Requests that are under way."""
        return len(self._asked)

    @property
    def has_room(self) -> bool:
        """Whether more should be wanted: what is wanted can be asked for at once."""
        return len(self._asked) + len(self._waiting) < ASKED_MAX

    def add(self, wanted: Wanted) -> None:
        """Something is wanted from the next `dispatch` on, until it is decided or withdrawn."""
        self._waiting[wanted] = None

    def withdraw(self, wanted: Wanted) -> None:
        """It is no longer wanted; harmless when it is decided."""
        self._waiting.pop(wanted, None)

    def release(self, choice: Choice) -> None:
        """A request that was decided here has ended."""
        health = self._asked.pop(id(choice), None)
        if health is not None and isinstance(choice, AskPeer):
            health.requests -= not choice.is_owner
            self._swarm.errands -= choice.is_owner
            self.dispatch(anew=choice.is_owner)

    def dispatch(self, *, anew: bool = False) -> None:
        """Decides what can be decided now; for when a request has ended or, `anew`, others have got
        something."""
        now = self._clock()
        waiting = [wanted for wanted in self._waiting if anew or wanted.again_at <= now]
        if len(waiting) > SAMPLED:
            waiting = self._chance.sample(waiting, SAMPLED)
        decisions: list[tuple[Wanted, Choice]] = []
        is_full = len(self._asked) >= ASKED_MAX
        for rarity, wanted in sorted(((self._rarity(each), each) for each in waiting), key=_first):
            is_offered = not rarity[0]
            if is_offered and is_full:
                continue
            choice = self._swarm.choose(
                wanted.blob_id, wanted.piece, wanted.size_bytes, now, wanted.tried, is_urgent=False
            )
            if isinstance(choice, Pause):
                wanted.again_at = now + choice.delay_s
                continue
            if not self._may_go(choice):
                continue
            del self._waiting[wanted]
            decisions.append((wanted, choice))
        for wanted, choice in decisions:
            wanted.decided(choice)

    def _may_go(self, choice: Choice) -> bool:
        """Counts a request, if there is room for it; who goes to the origin needs none."""
        if isinstance(choice, AskPeer):
            if len(self._asked) >= ASKED_MAX:
                return False
            health = self._asked[id(choice)] = self._swarm.health_of(choice.host.id)
            health.requests += not choice.is_owner
            self._swarm.errands += choice.is_owner
        return True

    def _rarity(self, wanted: Wanted) -> tuple[bool, int, float]:
        """What somebody has comes before what nobody has, of which owners take care."""
        holders = self._swarm.holder_count(wanted.blob_id, wanted.piece)
        return not holders, holders, self._chance.random()


def _first(pair: tuple[tuple[bool, int, float], Wanted]) -> tuple[bool, int, float]:
    return pair[0]
