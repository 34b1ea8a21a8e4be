"""What a host has learnt about another one by asking it. No I/O: the time is given."""

from collections import deque
from collections.abc import Sequence

DEAD_FIRST_S = 1.0
DEAD_MAX_S = 30.0
PAUSED_S = 5.0
BAN_FIRST_S = 60.0
BAN_MAX_S = 3600.0
BANDWIDTH_UNKNOWN = 64.0 * (1 << 20)
"""Bytes per second that a host is believed to have before anything is known; it is soon corrected."""
SMOOTHING = 0.3
HEDGE_MIN_S = 0.1
HEDGE_SAMPLES = 200
HEDGE_SAMPLES_MIN = 10
HEDGE_UNKNOWN_S = 1.0


class PeerHealth:
    """One other host: whether to ask it now, and how fast it was."""

    __slots__ = (
        "_bans",
        "_failures",
        "banned_until",
        "busy_until",
        "dead_until",
        "in_flight",
        "rate",
        "requests",
    )

    def __init__(self) -> None:
        self.dead_until = self.busy_until = self.banned_until = 0.0
        self.in_flight = 0
        """Bytes that are asked for and not yet here."""
        self.requests = 0
        """Requests that are under way for what it was known to have."""
        self.rate = 0.0
        """Bytes per second of all requests together, smoothed; 0 when unknown."""
        self._failures = self._bans = 0

    def is_usable(self, now: float) -> bool:
        """Neither dead nor banned, as far as known."""
        return now >= self.dead_until and now >= self.banned_until

    def is_free(self, now: float) -> bool:
        """Usable, and not busy."""
        return self.is_usable(now) and now >= self.busy_until

    def due_s(self, size_bytes: int) -> float:
        """How long `size_bytes` more would take, behind what is asked for already."""
        return (self.in_flight + size_bytes) / (self.rate or BANDWIDTH_UNKNOWN)

    def note_done(self, size_bytes: int, duration_s: float, others_bytes: int) -> None:
        """A request was answered in full; meanwhile others were open to the same host."""
        self._failures = 0
        rate = (size_bytes + others_bytes) / max(duration_s, 1e-4)
        self.rate = rate if not self.rate else (1 - SMOOTHING) * self.rate + SMOOTHING * rate

    def note_dead(self, now: float) -> None:
        """It does not answer: left alone for a while, longer each time."""
        self.dead_until = now + min(DEAD_MAX_S, DEAD_FIRST_S * 2**self._failures)
        self._failures = min(self._failures + 1, 16)

    def note_busy(self, now: float, retry_after_s: float) -> None:
        """It has asked to be left alone for a moment."""
        self.busy_until = now + min(max(retry_after_s, 0.05), 5.0)

    def note_paused(self, now: float) -> None:
        """It has been told to send nothing."""
        self.dead_until = max(self.dead_until, now + PAUSED_S)

    def note_wrong(self, now: float) -> None:
        """It has sent wrong bytes."""
        self.banned_until = now + min(BAN_MAX_S, BAN_FIRST_S * 2**self._bans)
        self._bans = min(self._bans + 1, 16)


class HedgeTimer:
    """When a second request is worth it: after what 95 of 100 took (Dean and Barroso, 2013)."""

    def __init__(self) -> None:
        self._durations: deque[float] = deque(maxlen=HEDGE_SAMPLES)

    def note(self, duration_s: float) -> None:
        """A request took so long until it was answered in full."""
        self._durations.append(duration_s)

    def after_s(self) -> float:
        """How long to wait for the first request."""
        if len(self._durations) < HEDGE_SAMPLES_MIN:
            return HEDGE_UNKNOWN_S
        return max(HEDGE_MIN_S, percentile(sorted(self._durations), 0.95))


def percentile(ordered: Sequence[float], part: float) -> float:
    """The value that `part` of `ordered` (not empty) do not exceed."""
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]
