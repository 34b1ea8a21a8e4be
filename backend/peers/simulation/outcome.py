"""What a simulation has found."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run. `ratio` is makespan / bound, `origin_ratio` bytes of the origin / unique bytes; `slow_share`
    the part of all bytes between hosts that those with less than half of the fastest link sent."""

    hosts: int
    pieces: int
    size_bytes: int
    makespan_s: float
    bound_s: float
    ratio: float
    median_s: float
    origin_ratio: float
    slow_share: float
    unfinished: int
    events: int
    wall_s: float
