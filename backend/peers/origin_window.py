"""How many ranges an owner asks the origin for at a time. No I/O.

Others wait for what it brings. On a link that is full, more requests only make each one slower, and everybody
gets everything late; on a fast link with a long way, few requests leave it empty. So the number follows how
long they take.
"""

SLOTS_MIN = 1
SLOTS_MAX = 12
SLOTS_FIRST = 1
SLOW_S = 0.5
"""Longer than this a MiB takes only where the link is the limit."""
FAST_S = 0.25
SMOOTHING = 0.3
USUAL_FIRST_S = 1.0
"""What a MiB is believed to take before anything is known."""
PATIENCE = 2.5
"""So many times as long as usual is not chance: of two connections on one full link, one may get nothing for
ten seconds while the other is served (seen with BBR on a queue of 50 ms)."""
PATIENCE_MIN_S = 0.2


class OriginWindow:
    """The number of slots, adapted."""

    def __init__(self) -> None:
        self.slots = SLOTS_FIRST
        self._usual_per_mib_s = USUAL_FIRST_S

    def patience_s(self, size_bytes: int) -> float:
        """After how long a request of so many bytes is taken for one that starves."""
        return max(PATIENCE_MIN_S, PATIENCE * self._usual_per_mib_s * max(size_bytes, 1 << 18) / (1 << 20))

    def note(self, size_bytes: int, duration_s: float) -> None:
        """A request has taken so long."""
        per_mib_s = duration_s * (1 << 20) / max(size_bytes, 1 << 18)
        self._usual_per_mib_s += SMOOTHING * (per_mib_s - self._usual_per_mib_s)
        if per_mib_s > SLOW_S:
            self.slots = max(SLOTS_MIN, self.slots - 1)
        elif per_mib_s < FAST_S:
            self.slots = min(SLOTS_MAX, self.slots + 1)
