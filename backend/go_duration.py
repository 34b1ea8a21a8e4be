"""Durations as Kubernetes writes them: `12h`, `1h30m`, `10.5s` (Go, time.ParseDuration)."""

import re

_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|ms|s|m|h)")
_LONGEST_TEXT = 64


def parse_duration(text: str) -> float:
    """Seconds. Raises `ValueError` for what is no duration, and for a negative one."""
    if text == "0":
        return 0.0
    position, total_s = 0, 0.0
    while position < len(text) <= _LONGEST_TEXT:
        part = _PART.match(text, position)
        if part is None:
            break
        total_s += float(part[1]) * _UNITS_S[part[2]]
        position = part.end()
    if position == 0 or position != len(text):
        raise ValueError(f"{text[:_LONGEST_TEXT]!r} is not a duration such as 1h30m")
    return total_s
