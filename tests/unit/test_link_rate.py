"""How fast a link is, and how far ahead of a reader is fetched over it."""

import pytest

from backend.link_rate import LinkRate
from backend.readahead import (
    AHEAD_S,
    WINDOW_LEAST_BYTES,
    WINDOW_MAX_BYTES,
    WINDOW_MIN_BYTES,
    WINDOW_SURE_BYTES,
    Readahead,
)

MIB = 1 << 20


class Link:
    """A link whose time is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.rate = LinkRate(lambda: self.now)

    def bring(self, size_bytes: int, seconds: float) -> None:
        with self.rate.transfer(size_bytes):
            self.now += seconds


def test_transfers_side_by_side_are_counted_together_and_pauses_are_not() -> None:
    link = Link()
    with link.rate.transfer(MIB), link.rate.transfer(MIB):
        link.now += 1.0
    assert link.rate.bps == 2 * MIB
    link.now += 1000.0
    link.bring(2 * MIB, 1.0)
    assert link.rate.bps == 2 * MIB


def test_small_requests_are_counted_together() -> None:
    link = Link()
    for _ in range(255):
        link.bring(4096, 0.01)
    assert link.rate.bps == 0
    link.bring(4096, 0.01)
    assert link.rate.bps == pytest.approx(MIB / 2.56)


def test_what_fails_brings_nothing_and_takes_its_time() -> None:
    link = Link()

    def bring_nothing() -> None:
        with link.rate.transfer(MIB):
            link.now += 1.0
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        bring_nothing()
    link.bring(MIB, 1.0)
    assert link.rate.bps == MIB / 2


@pytest.mark.parametrize(
    ("bps", "window"),
    [
        (0, WINDOW_MAX_BYTES),
        (1 * MIB, WINDOW_SURE_BYTES),
        (12 * MIB, round(12 * MIB * AHEAD_S)),
        (400 * MIB, WINDOW_MAX_BYTES),
    ],
)
def test_windows_grow_to_what_the_link_brings_in_a_moment(bps: int, window: int) -> None:
    link = Link()
    if bps:
        link.bring(bps, 1.0)
    readahead = Readahead(link=link.rate)
    readahead.on_miss(0, 1)
    stream = readahead.on_miss(1, 2)
    assert stream is not None
    for chunk in range(2, 200, 2):
        readahead.advance(stream, chunk + 2)
        readahead.on_marker(chunk)
    assert stream.window_bytes == window


def test_the_first_window_is_small_where_the_largest_is() -> None:
    link = Link()
    link.bring(8 * MIB, 1.0)
    slow, unknown = Readahead(link=link.rate), Readahead(link=Link().rate)
    for readahead, first in ((slow, WINDOW_LEAST_BYTES), (unknown, WINDOW_MIN_BYTES)):
        readahead.on_miss(0, 1)
        stream = readahead.on_miss(1, 2)
        assert stream is not None
        assert stream.window_bytes == first
