"""How fast the network brings bytes to this host, as far as it was seen. No I/O: the time is given."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

SAMPLE_BYTES = 1 << 20
"""Small requests tell of a way that is long, not of a link that is narrow: they are counted together."""
LONG_BYTES = 2 << 20
"""So much is enough for a sample while others are still on their way, of which nothing was counted yet."""
SMOOTHING = 0.5


class LinkRate:
    """All transfers together, while there is at least one; those that fail count as time and no bytes."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.bps = 0.0
        """Bytes per second, smoothed; 0 while nothing is known."""
        self._clock = clock
        self._active = self._bytes = 0
        self._since = self._busy_s = 0.0

    @contextmanager
    def transfer(self, size_bytes: int) -> Iterator[None]:
        """`size_bytes` are received within the block."""
        self._account()
        self._active += 1
        try:
            yield
            self._bytes += size_bytes
        finally:
            self._account()
            self._active -= 1
            enough = LONG_BYTES if self._active else SAMPLE_BYTES
            if self._bytes >= enough and self._busy_s > 0:
                rate = self._bytes / self._busy_s
                self.bps = rate if not self.bps else self.bps + SMOOTHING * (rate - self.bps)
                self._bytes, self._busy_s = 0, 0.0

    def _account(self) -> None:
        now = self._clock()
        if self._active:
            self._busy_s += now - self._since
        self._since = now
