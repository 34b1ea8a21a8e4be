"""Rates of links, written as `tc` takes them, and what of them is left for payload."""

import re
from dataclasses import dataclass

PATTERN = re.compile(r"(?P<number>\d+)(?P<unit>[kmg])bit")
FACTORS = {"k": 10**3, "m": 10**6, "g": 10**9}
# A full TCP segment with timestamps has 1,448 bytes of payload; the shaper counts its frame with 1,514.
PAYLOAD_SHARE = 1448 / 1514
# The timer that gives tokens back ticks with 250 Hz on the slowest kernels; a GSO packet has up to 64 KiB.
TICK_S = 0.004
LEAST_BURST_BYTES = 96 << 10


@dataclass(frozen=True, slots=True)
class Rate:
    """Bits per second, 10^6 to the megabit."""

    bits_per_s: int

    @property
    def bytes_per_s(self) -> float:
        """Bytes on the link in a second, headers included."""
        return self.bits_per_s / 8

    @property
    def burst_bytes(self) -> int:
        """What may be sent at once without the mean rate being missed."""
        return max(LEAST_BURST_BYTES, int(self.bytes_per_s * TICK_S * 2))

    def __str__(self) -> str:
        return f"{self.bits_per_s}bit"


def parse_rate(text: str) -> Rate:
    """`50mbit`, `1gbit`. Raises `ValueError`."""
    match = PATTERN.fullmatch(text.strip().lower())
    if match is None or not int(match["number"]):
        raise ValueError(f"not a rate: {text!r}; write for example 50mbit")
    return Rate(int(match["number"]) * FACTORS[match["unit"]])
