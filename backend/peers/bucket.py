"""What a claim has to pass: a rate, or a number of places. Sans-I/O: the clock is passed in.

Times are seconds of one monotonic clock, rates are units per second (bytes or requests).
"""

import math
from typing import Protocol

QUANTUM_BYTES = 256 << 10
"""The largest part that is let through in one go, and so the largest debt: what a socket takes at a time."""

BURST_S = 0.1
"""A bucket holds what flows in this time, and is in debt by no more than that.

Over any `t` seconds at most rate * (t + 2 * BURST_S) passes: 4 % more than the limit over 5 s.
A caller that wakes up later than this after the bucket became ready loses rate.
"""

TOLERANCE_S = 1e-6
"""A bucket this short of ready counts as ready: sums of floats do not hit zero."""


class Gate(Protocol):
    """Something that a claim has to pass."""

    @property
    def quantum(self) -> float:
        """The most that may be taken in one go."""
        ...

    def ready_in(self, now: float) -> float:
        """Seconds until something may be taken; 0 is now, `inf` not before a change."""
        ...

    def take(self, amount: float, now: float) -> None:
        """Takes `amount`, at most a quantum, from a gate that is ready."""
        ...

    def give_back(self, amount: float, now: float) -> None:
        """Undoes `take` for what was not used."""
        ...


class TokenBucket:
    """A rate with debt: a part passes when the bucket is not in debt, and may put it into debt.

    That needs no test of the part's size, so a bucket that many share starves nobody who wants much.
    """

    __slots__ = ("_largest", "_rate", "_settled_at", "_tokens", "passed")

    def __init__(self, rate: float | None, now: float, *, largest: float = QUANTUM_BYTES) -> None:
        """A full bucket. `rate` None is without limit, 0 stopped; `largest` bounds the quantum."""
        self._largest = largest
        self._rate = rate
        self._tokens = self._most
        self._settled_at = now
        self.passed = 0.0
        """Units taken so far, what was given back not counted."""

    @property
    def rate(self) -> float | None:
        """Units per second; None is without limit, 0 stopped."""
        return self._rate

    @property
    def quantum(self) -> float:
        """The most that may be taken in one go: what flows in `BURST_S`, within 1 and `largest`."""
        if self._rate is None:
            return math.inf
        return max(1.0, min(self._largest, self._rate * BURST_S))

    def change(self, rate: float | None, now: float) -> None:
        """Another rate from now on. Old credit and debt are cut to what the new rate allows."""
        self._settle(now)
        was_limited = self._rate is not None
        self._rate = rate
        self._tokens = max(-self.quantum, min(self._tokens, self._most)) if was_limited else 0.0

    def ready_in(self, now: float) -> float:
        """As `Gate.ready_in`."""
        if self._rate is None:
            return 0.0
        if self._rate == 0:
            return math.inf
        self._settle(now)
        wait_s = -self._tokens / self._rate
        return wait_s if wait_s > TOLERANCE_S else 0.0

    def take(self, amount: float, now: float) -> None:
        """As `Gate.take`."""
        self._settle(now)
        self._tokens -= amount
        self.passed += amount

    def give_back(self, amount: float, now: float) -> None:
        """As `Gate.give_back`."""
        self._settle(now)
        self._tokens = min(self._tokens + amount, self._most)
        self.passed -= amount

    def is_rested(self, now: float) -> bool:
        """Whether a new bucket would behave the same."""
        self._settle(now)
        return self._rate is None or self._tokens >= self._most

    @property
    def _most(self) -> float:
        return 0.0 if self._rate is None else self._rate * BURST_S

    def _settle(self, now: float) -> None:
        """Lets in what has flowed since the last call; a clock that went back counts as standing still."""
        elapsed_s = max(0.0, now - self._settled_at)
        self._settled_at = now
        if self._rate is None:
            self._tokens = 0.0
        else:
            self._tokens = min(self._tokens + elapsed_s * self._rate, self._most)


class Places:
    """How many may be inside at once: `take(1)` enters, `give_back(1)` leaves."""

    __slots__ = ("busy", "limit")

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        """None is without limit. A lower one drives nobody out."""
        self.busy = 0.0

    @property
    def quantum(self) -> float:
        """One place for each claim."""
        return 1.0

    def ready_in(self, now: float) -> float:
        """As `Gate.ready_in`; a place becomes free by `give_back`, not by time."""
        return 0.0 if self.limit is None or self.busy < self.limit else math.inf

    def take(self, amount: float, now: float) -> None:
        """As `Gate.take`."""
        self.busy += amount

    def give_back(self, amount: float, now: float) -> None:
        """As `Gate.give_back`."""
        self.busy -= amount
