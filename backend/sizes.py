"""Sizes and rates as users write them: `1MiB`, `64k`, `50MiB/s`."""

import re

PATTERN = re.compile(r"(?P<number>\d+)\s*(?P<unit>[kmgt]?)(?:i?b)?", re.IGNORECASE)
FACTORS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes; k, KiB and KB all mean 1024. Raises `ValueError` for anything that is not a size."""
    match = PATTERN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not a size: {text!r}; write for example 1MiB")
    return int(match["number"]) * FACTORS[match["unit"].lower()]


def parse_rate(text: str) -> int | None:
    """Bytes per second: a size, with or without `/s`; `none` means no limit and gives None.

    Bits (`Mbit/s`) are refused instead of taken for bytes. Raises `ValueError`.
    """
    trimmed = text.strip()
    if trimmed.lower() in ("none", "unlimited"):
        return None
    try:
        return parse_size(trimmed.removesuffix("/s"))
    except ValueError:
        raise ValueError(f"not a rate: {text!r}; write for example 50MiB/s, or none") from None
