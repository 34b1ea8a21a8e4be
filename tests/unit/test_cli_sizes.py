"""Sizes as users write and read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.sizes import parse_rate, parse_size
from tools.sizes import format_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("4096", 4096),
        ("4k", 4096),
        ("1MiB", 1 << 20),
        ("1 MB", 1 << 20),
        ("16M", 16 << 20),
        ("2gib", 2 << 30),
    ],
)
def test_sizes_are_read(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "MiB", "1.5MiB", "-1", "1 PiBs", "0x10", "1e6"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "rate_bps"),
    [
        ("50MiB/s", 50 << 20),
        (" 1 GB/s", 1 << 30),
        ("4096", 4096),
        ("0", 0),
        ("none", None),
        ("Unlimited", None),
    ],
)
def test_rates_are_read(text: str, rate_bps: int | None) -> None:
    assert parse_rate(text) == rate_bps


@pytest.mark.parametrize("text", ["", "/s", "50Mbit/s", "50 mbps", "-1/s", "1MiB/min"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a rate"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (200 << 20, "200 MiB"),
        (1 << 60, "1024 PiB"),
    ],
)
def test_sizes_are_shown(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@given(st.integers(min_value=0, max_value=1 << 40))
def test_plain_numbers_round_trip(size_bytes: int) -> None:
    assert parse_size(str(size_bytes)) == size_bytes
