"""Foreground traffic of the host comes first: when serving peers gives way, and how far. Sans-I/O.

The rule. While an on-demand fetch of this host is in flight, serving is held to a tenth of the host's
upload limit, provided that this makes the fetches faster. Whether it does is measured, not assumed: for
`TRIAL_S` of fetching serving yields, for as long it does not, and it yields on only if the fetches were
`FASTER` times as fast meanwhile. The verdict holds for 2 s of fetching, for twice as long each time it is
confirmed, 32 s at most. No fetch in flight: no yielding. No fetch for `REST_S`: the next one is given the
benefit of the doubt again.

Why not yield whenever a fetch is in flight: at the start of a model all hosts fetch on demand all the time,
from each other. Each would serve at a tenth, all would be slow, and being slow would look like a reason to
yield. Here such a common slowness shows in the trial: yielding did not help, so serving goes on; the trials
cost about 4 % of the upload over the first 10 s and less later. Where the two do compete (a link that is
shared by both directions, a disk, one core) the trial shows it within 0.2 s.
"""

import enum
import math

TRIAL_S = 0.1
FASTER = 1.2
FLOOR_SHARE = 0.1
FIRST_HOLD_S = 2.0
LONGEST_HOLD_S = 32.0
REST_S = 5.0
METER_S = 0.25
"""How long the speed of serving is measured where the host has no upload limit to take a tenth of."""


class Phase(enum.Enum):
    """What serving does while a fetch is in flight."""

    TRY_YIELDING = "serving yields, to see what that gives"
    TRY_SERVING = "serving does not yield, for comparison"
    YIELDING = "yielding has helped"
    SERVING = "yielding has not helped"


class YieldRule:
    """One host's rule: told of fetches and of bytes, it answers at what rate serving may go on."""

    def __init__(self, now: float) -> None:
        self._now = now
        self._in_flight = 0
        self._idle_since = now
        self._received: dict[Phase, int] = {}
        self._start()
        self._served_in_trial = 0
        self._metered_bytes = 0
        self._metered_s = 0.0
        self._speed_bps: float | None = None

    @property
    def phase(self) -> Phase:
        """Where the rule stands; the phases go on only while a fetch is in flight."""
        return self._phase

    def started(self, now: float) -> None:
        """An on-demand fetch of this host begins."""
        self._advance(now)
        if self._in_flight == 0 and now - self._idle_since >= REST_S:
            self._start()
        self._in_flight += 1

    def ended(self, now: float) -> None:
        """An on-demand fetch is over, whatever came of it."""
        self._advance(now)
        self._in_flight -= 1
        if self._in_flight == 0:
            self._idle_since = now

    def received(self, n_bytes: int, now: float) -> None:
        """Bytes of an on-demand fetch have arrived."""
        self._advance(now)
        self._received[self._phase] = self._received.get(self._phase, 0) + n_bytes

    def served(self, n_bytes: int, now: float) -> None:
        """Bytes have gone to peers."""
        self._advance(now)
        if self._phase is Phase.TRY_SERVING:
            self._served_in_trial += n_bytes
        if not self.yields(now):
            self._metered_bytes += n_bytes

    def yields(self, now: float) -> bool:
        """Whether serving gives way at this moment."""
        self._advance(now)
        return self._gives_way

    def rate_bps(self, host_up_bps: int | None, now: float) -> float | None:
        """What serving may send now, bytes per second; None is whatever the host's limit is.

        The tenth is that of the limit, or of the speed of serving measured before where there is none.
        """
        if not self.yields(now):
            return None
        whole = self._speed_bps if host_up_bps is None else host_up_bps
        return None if whole is None else whole * FLOOR_SHARE

    def next_at(self, now: float) -> float:
        """When the answer of `rate_bps` changes by time alone; `inf` while nothing is in flight."""
        self._advance(now)
        return now + self._left_s if self._in_flight else math.inf

    def _start(self) -> None:
        self._hold_s = FIRST_HOLD_S
        self._verdict: Phase | None = None
        self._try()

    def _try(self) -> None:
        self._phase = Phase.TRY_YIELDING
        self._left_s = TRIAL_S
        self._received.clear()
        self._served_in_trial = 0

    def _advance(self, now: float) -> None:
        """Moves the phases on by the time with a fetch in flight since the last call."""
        elapsed_s = max(0.0, now - self._now)
        self._now = now
        if not self._gives_way:
            self._meter(elapsed_s)
        if self._in_flight == 0:
            return
        self._left_s -= elapsed_s
        if self._left_s <= 1e-9:
            self._next_phase()

    def _next_phase(self) -> None:
        if self._phase is Phase.TRY_YIELDING:
            self._phase, self._left_s = Phase.TRY_SERVING, TRIAL_S
        elif self._phase is Phase.TRY_SERVING:
            self._judge()
        else:
            self._try()

    def _judge(self) -> None:
        yielding = self._received.get(Phase.TRY_YIELDING, 0)
        serving = self._received.get(Phase.TRY_SERVING, 0)
        helped = self._served_in_trial > 0 and yielding > 0 and yielding >= FASTER * serving
        verdict = Phase.YIELDING if helped else Phase.SERVING
        confirmed = verdict is self._verdict
        self._hold_s = min(self._hold_s * 2, LONGEST_HOLD_S) if confirmed else FIRST_HOLD_S
        self._phase = self._verdict = verdict
        self._left_s = self._hold_s

    @property
    def _gives_way(self) -> bool:
        return self._in_flight > 0 and self._phase in (Phase.TRY_YIELDING, Phase.YIELDING)

    def _meter(self, elapsed_s: float) -> None:
        self._metered_s += elapsed_s
        if self._metered_s >= METER_S:
            if self._metered_bytes:
                self._speed_bps = self._metered_bytes / self._metered_s
            self._metered_bytes, self._metered_s = 0, 0.0
