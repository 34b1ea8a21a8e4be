"""The least time that a number of hosts can need, whatever the program does. Headers are not counted."""

from collections.abc import Sequence

from tools.bench.peers.rate import Rate


def bound_s(unique_bytes: float, wanted_bytes: Sequence[float], origin: Rate, host: Rate) -> float:
    """The makespan when hosts also send to each other; `wanted_bytes` is what each of them wants.

    max(F/u_s, F/d, N F/(u_s + sum u_i)) when all want the same F: the registry sends every byte at least once
    with u_s, a host receives what it wants with d, and all that is received was sent by somebody. Mundinger,
    Weber and Weiss, "Optimal scheduling of peer-to-peer file dissemination" (2008), reach it.
    """
    sending = origin.bytes_per_s + len(wanted_bytes) * host.bytes_per_s
    return max(
        unique_bytes / origin.bytes_per_s, max(wanted_bytes) / host.bytes_per_s, sum(wanted_bytes) / sending
    )


def bound_without_peers_s(wanted_bytes: Sequence[float], origin: Rate, host: Rate) -> float:
    """The makespan when all of it comes from the registry."""
    return max(sum(wanted_bytes) / origin.bytes_per_s, max(wanted_bytes) / host.bytes_per_s)
