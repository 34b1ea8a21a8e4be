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


class OriginWindow:
    """The number of slots, adapted."""

    def __init__(self) -> None:
        self.slots = SLOTS_FIRST

    def note(self, size_bytes: int, duration_s: float) -> bool:
        """A request has taken so long; whether the number has changed."""
        before = self.slots
        per_mib_s = duration_s * (1 << 20) / max(size_bytes, 1 << 18)
        if per_mib_s > SLOW_S:
            self.slots = max(SLOTS_MIN, self.slots - 1)
        elif per_mib_s < FAST_S:
            self.slots = min(SLOTS_MAX, self.slots + 1)
        return self.slots != before
