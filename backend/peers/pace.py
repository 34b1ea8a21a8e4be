"""How often hosts should announce themselves. No I/O: what the scheduler was busy with is told."""

from backend.peers.leases import LEASE_S

INTERVAL_MIN_S = 0.25
INTERVAL_MAX_S = 2.0
"""Leases of the origin are renewed in time, also when one answer is late."""
IDLE_FACTOR = 2.5
"""A host that lacks nothing and has nothing new announces itself so much less often."""
IDLE_MAX_S = INTERVAL_MAX_S * IDLE_FACTOR
HOSTS_A_SECOND = 2500
"""Announcements that one core answers with room to spare; `tools/bench/scheduling.py`."""
BUSY_PART = 0.6
"""Of the time; above it answers begin to be late, as work comes in bursts."""
STRAIN_MAX = 8.0
STRAIN_STEP_MAX = 2.0
RELIEF = 0.9

assert INTERVAL_MAX_S < LEASE_S


class Pace:
    """The interval follows the number of hosts, and is longer while the scheduler is late.

    What may not wait for an announcement, limits and the switch, goes by another way (`/v1/terms`).
    """

    def __init__(self) -> None:
        self._strain = 1.0

    def note(self, busy_part: float) -> None:
        """The part of the time since the last call, 0 to 1, that went into serving."""
        if busy_part > BUSY_PART:
            self._strain = min(STRAIN_MAX, self._strain * min(STRAIN_STEP_MAX, busy_part / BUSY_PART))
        else:
            self._strain = max(1.0, self._strain * RELIEF)

    def interval_s(self, hosts: int) -> float:
        """For a host that wants or gets something."""
        wanted = max(INTERVAL_MIN_S, hosts / HOSTS_A_SECOND) * self._strain
        return round(min(INTERVAL_MAX_S, wanted), 3)

    def idle_interval_s(self, hosts: int, *, has_leases: bool) -> float:
        """For a host at rest; `has_leases`: it holds a part of a limit, which it must renew."""
        most = INTERVAL_MAX_S if has_leases else IDLE_MAX_S
        return round(min(most, self.interval_s(hosts) * IDLE_FACTOR), 3)
