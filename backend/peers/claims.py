"""Who may go on first where several limits apply at once: claims in strict order of class. Sans-I/O.

A claim is let through in parts of a quantum, each when every gate on its way is ready at the same time. A
gate is ready whatever the size of the part, so a claim is held up by more urgent ones and by older ones of
its class, never by less urgent ones for longer than their last part; and one that waits for a gate of its
own (its task, the origin) does not hold up those that do not need that gate.
"""

import math
from collections import deque
from collections.abc import Callable

from backend.peers.bucket import Gate
from backend.priority import FetchClass


class Claim:
    """A wish for `amount` units of every gate in `gates`."""

    __slots__ = ("fetch_class", "gates", "is_granted", "left", "on_granted", "paid")

    def __init__(
        self,
        amount: float,
        fetch_class: FetchClass,
        gates: tuple[Gate, ...],
        on_granted: Callable[[], object] | None = None,
    ) -> None:
        """`on_granted` is called within `ClaimQueue.pump` as soon as the whole amount is paid.

        Raises `ValueError` for a negative amount, or no gate.
        """
        if amount < 0 or not gates:
            raise ValueError(f"cannot claim {amount} units of {len(gates)} gates")
        self.left = amount
        self.paid = 0.0
        self.fetch_class = fetch_class
        self.gates = gates
        self.on_granted = on_granted
        self.is_granted = False

    def pay_what_may_pass(self, now: float, closed: set[Gate]) -> bool:
        """Takes parts until everything is paid or a gate is not ready, which is added to `closed`.

        Returns whether everything is paid.
        """
        while not self.is_granted:
            if not closed.isdisjoint(self.gates) or self._is_blocked(now, closed):
                return False
            part = min(self.left, *(gate.quantum for gate in self.gates))
            for gate in self.gates:
                gate.take(part, now)
            self.left -= part
            self.paid += part
            self.is_granted = self.left <= 0
        return True

    def _is_blocked(self, now: float, closed: set[Gate]) -> bool:
        for gate in self.gates:
            if gate.ready_in(now) > 0:
                closed.add(gate)
                return True
        return False

    def refund(self, now: float) -> None:
        """Gives back what was paid, when nothing came of it."""
        for gate in self.gates:
            gate.give_back(self.paid, now)
        self.paid = 0.0


class ClaimQueue:
    """The claims that wait, by class and then by age.

    The oldest is paid in full before the next begins: of all who share a gate one alone has paid for
    bytes that are still to come, so what passes is off by its amount at the most.
    """

    def __init__(self) -> None:
        self._waiting: dict[FetchClass, deque[Claim]] = {each: deque() for each in FetchClass}

    def __len__(self) -> int:
        return sum(len(claims) for claims in self._waiting.values())

    def add(self, claim: Claim) -> None:
        """Puts a claim at the end of its class; `pump` lets it through, perhaps at once."""
        self._waiting[claim.fetch_class].append(claim)

    def withdraw(self, claim: Claim, now: float) -> None:
        """Takes a claim back, granted or not; what it has paid is there again."""
        if not claim.is_granted:
            self._waiting[claim.fetch_class].remove(claim)
        claim.refund(now)

    def raise_to(self, claim: Claim, fetch_class: FetchClass) -> None:
        """Makes a claim at least as urgent as `fetch_class`; the next `pump` heeds it."""
        if claim.is_granted or claim.fetch_class <= fetch_class:
            return
        self._waiting[claim.fetch_class].remove(claim)
        claim.fetch_class = fetch_class
        self._waiting[fetch_class].append(claim)

    def pump(self, now: float) -> list[Claim]:
        """Lets through what may pass at `now`; returns the claims that are paid in full, in that order."""
        granted: list[Claim] = []
        closed: set[Gate] = set()  # found so at `now`; taking more does not open them
        for fetch_class, waiting in self._waiting.items():
            kept = deque(claim for claim in waiting if not claim.pay_what_may_pass(now, closed))
            if len(kept) < len(waiting):
                granted += (claim for claim in waiting if claim.is_granted)
                self._waiting[fetch_class] = kept
        for claim in granted:
            if claim.on_granted is not None:
                claim.on_granted()
        return granted

    def next_at(self, now: float) -> float:
        """When to pump again if nothing happens before: `inf` when only a change can help."""
        ways = {claim.gates for claims in self._waiting.values() for claim in claims}
        waits = {gate: gate.ready_in(now) for gate in set().union(*ways)}
        return now + min((max(waits[gate] for gate in way) for way in ways), default=math.inf)

    def waiting(self, gate: Gate) -> float:
        """Units that those who wait still want of `gate`."""
        claims = (claim for claims in self._waiting.values() for claim in claims)
        return sum(claim.left for claim in claims if any(each is gate for each in claim.gates))

    def gates_in_use(self) -> set[Gate]:
        """Every gate that somebody waits for."""
        return {gate for claims in self._waiting.values() for claim in claims for gate in claim.gates}
