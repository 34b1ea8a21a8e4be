"""Measures several subjects in turn, round after round: a disturbance shall not hit one of them alone.

Every second round goes backwards, because the next one gets what a subject leaves behind: memory, caches.
"""

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from tools.bench.ledger import Ledger
from tools.bench.process import CommandFailed
from tools.failure import one_line


class Named(Protocol):
    """Something with a name."""

    @property
    def name(self) -> str:
        """The name under which it is reported."""


S = TypeVar("S", bound=Named)

WHY_CHARACTERS = 400


def interleave(
    scene: str, subjects: Iterable[S], rounds: int, measure: Callable[[S, int], None], ledger: Ledger
) -> None:
    """Calls `measure(subject, round)` for each; one that fails is noted and then left out."""
    alive = list(subjects)
    for number in range(rounds):
        for subject in list(alive) if number % 2 == 0 else alive[::-1]:
            try:
                measure(subject, number)
            except (CommandFailed, OSError) as error:
                ledger.miss(f"{scene}: {subject.name}", why(error), failed=True)
                alive.remove(subject)


def why(error: Exception) -> str:
    """The reason in one line of a length that can be read."""
    return one_line(str(error))[:WHY_CHARACTERS]
