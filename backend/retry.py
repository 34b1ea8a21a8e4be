"""Trying again, within a budget of attempts and of time.

Concurrency: a `RetryPolicy` is immutable and shared; each `Attempts` belongs to one task.
"""

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import trio

from rafs.errors import NydusError

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how long an operation is tried.

    `attempts` counts the first one; no pause starts that would end later than `total_s` after the
    first attempt. Pauses double from `first_delay_s` to `longest_delay_s` and are shortened by up to
    a half at random, so that many hosts that failed together do not come back together. A source
    that names a pause (Retry-After) gets at least that. `clock`, `sleep` and `random` are parameters for
    simulation.
    """

    attempts: int = 6
    total_s: float = 60.0
    first_delay_s: float = 0.2
    longest_delay_s: float = 10.0
    clock: Callable[[], float] = trio.current_time
    sleep: Callable[[float], Awaitable[object]] = trio.sleep
    random: Callable[[], float] = random.random

    async def run(self, operation: Callable[[], Awaitable[Result]]) -> Result:
        """What `operation` returns; raises its error when that is not retryable or the budget is spent."""
        attempts = Attempts(self)
        while True:
            try:
                return await operation()
            except NydusError as error:
                await attempts.pause(error)


class Attempts:
    """The budget of one operation in progress."""

    __slots__ = ("_failed", "_policy", "_started")

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self.progressed()

    @property
    def failed(self) -> bool:
        """Whether an attempt failed since the operation last got further."""
        return self._failed > 0

    def progressed(self) -> None:
        """The operation got further than before: the whole budget is there again."""
        self._started = self._policy.clock()
        self._failed = 0

    async def pause(self, error: NydusError) -> None:
        """Sleeps before the next attempt; raises `error` when there must be none."""
        policy = self._policy
        self._failed += 1
        if not error.retryable or self._failed >= policy.attempts:
            raise error
        delay_s = self._delay_s(error)
        if policy.clock() + delay_s > self._started + policy.total_s:
            raise error
        await policy.sleep(delay_s)

    def _delay_s(self, error: NydusError) -> float:
        policy = self._policy
        full_s = min(policy.longest_delay_s, policy.first_delay_s * 2 ** (self._failed - 1))
        asked_s = getattr(error, "retry_after_s", None) or 0.0
        return float(max(full_s * (1 - policy.random() / 2), asked_s))
