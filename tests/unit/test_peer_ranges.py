"""The Range header of peers: what is understood, merged, refused, and how the answer is laid out."""

import email
import email.policy
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.peers.ranges import (
    RangesRefused,
    Span,
    content_range,
    merge_ranges,
    multipart_body,
    parse_ranges,
    single_body,
    slices,
)

SIZE = 1000
MANY = 16


@pytest.mark.parametrize(
    ("header", "ranges"),
    [
        (b"bytes=0-0", [(0, 1)]),
        (b"bytes=0-999", [(0, 1000)]),
        (b"bytes=0-1000", [(0, 1000)]),
        (b"bytes=999-", [(999, 1000)]),
        (b"bytes=-1", [(999, 1000)]),
        (b"bytes=-5000", [(0, 1000)]),
        (b"Bytes=5-6", [(5, 7)]),
        (b"bytes=5-6, 7-9 ,\t1-2", [(5, 7), (7, 10), (1, 3)]),
        (b"bytes=5-6,5000-6000", [(5, 7)]),
        (b"bytes=0-9223372036854775807", [(0, 1000)]),
    ],
)
def test_ranges_that_are_understood(header: bytes, ranges: list[tuple[int, int]]) -> None:
    assert parse_ranges(header, SIZE, MANY) == ranges


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b"bytes=1000-", "within"),
        (b"bytes=1000-2000,3000-", "within"),
        (b"bytes=-0", "within"),
        (b"bytes=", "malformed"),
        (b"bytes=-", "malformed"),
        (b"bytes=,", "malformed"),
        (b"bytes=5-4", "malformed"),
        (b"bytes=a-b", "malformed"),
        (b"bytes=0x5-6", "malformed"),
        (b"bytes=+5-6", "malformed"),
        (b"bytes=5 -6", "malformed"),
        (b"bytes=1-2,,3-4", "malformed"),
        (b"bytes=--5", "malformed"),
        (b"bytes=" + b"9" * 20 + b"-", "malformed"),
        (b"bytes=" + b"9" * 10000 + b"-", "malformed"),
        (b"bytes=\xb2-\xb3", "malformed"),
        (b"bytes=" + b",".join([b"1-2"] * (MANY + 1)), "more than 16"),
    ],
)
def test_ranges_that_are_refused(header: bytes, why: str) -> None:
    with pytest.raises(RangesRefused, match=why):
        parse_ranges(header, SIZE, MANY)


def test_other_units_are_not_ours() -> None:
    assert parse_ranges(b"items=0-5", SIZE, MANY) is None


def test_an_empty_file_has_no_ranges() -> None:
    with pytest.raises(RangesRefused):
        parse_ranges(b"bytes=0-", 0, MANY)
    assert single_body(0, 0).spans == ()


@given(st.binary(max_size=64))
def test_any_header_is_refused_or_within_the_file(header: bytes) -> None:
    try:
        ranges = parse_ranges(b"bytes=" + header, SIZE, MANY)
    except RangesRefused:
        return
    assert ranges is not None
    assert all(0 <= offset < end <= SIZE for offset, end in ranges)


spans = st.tuples(st.integers(0, SIZE - 1), st.integers(1, 60)).map(
    lambda pair: (pair[0], min(SIZE, pair[0] + pair[1]))
)


@given(st.lists(spans, min_size=1, max_size=MANY))
def test_merged_ranges_are_the_same_bytes_apart_from_each_other(ranges: list[tuple[int, int]]) -> None:
    header = b"bytes=" + b",".join(b"%d-%d" % (offset, end - 1) for offset, end in ranges)
    assert parse_ranges(header, SIZE, MANY) == ranges
    merged = merge_ranges(ranges)
    assert {byte for each in merged for byte in range(*each)} == {byte for e in ranges for byte in range(*e)}
    assert all(left[1] < right[0] for left, right in itertools.pairwise(merged))


def test_adjacent_ranges_become_one() -> None:
    assert merge_ranges([(4096, 8192), (0, 4096), (8192, 9000)]) == [(0, 9000)]


@given(st.lists(spans, min_size=2, max_size=MANY), st.integers(1, 80), st.integers(0, 40))
def test_slices_are_the_body_in_its_order(
    ranges: list[tuple[int, int]], slice_max: int, small_max: int
) -> None:
    body = multipart_body(merge_ranges(ranges), SIZE, b"b")
    small_max = min(small_max, slice_max)
    batches = list(slices(body.spans, slice_max, small_max))
    assert all(sum(span.end - span.offset for span in batch) <= slice_max for batch in batches)
    assert all(len(batch) == 1 or max(s.end - s.offset for s in batch) <= small_max for batch in batches)
    assert _sent(tuple(span for batch in batches for span in batch)) == _sent(body.spans)


@given(st.lists(spans, min_size=1, max_size=MANY))
def test_a_multipart_body_is_read_by_others(ranges: list[tuple[int, int]]) -> None:
    content, merged = bytes(number % 251 for number in range(SIZE)), merge_ranges(ranges)
    body = multipart_body(merged, SIZE, b"of-a-test")
    data = _sent(body.spans, content) + body.tail
    assert len(data) == body.length
    head = b"Content-Type: multipart/byteranges; boundary=of-a-test\r\n"
    message = email.message_from_bytes(head + data, policy=email.policy.HTTP)
    parts = list(message.iter_parts())
    assert [part["Content-Range"].encode() for part in parts] == [
        content_range(offset, end, SIZE) for offset, end in merged
    ]


def _sent(spans: tuple[Span, ...], content: bytes = bytes(range(256)) * 4) -> bytes:
    return b"".join(span.lead + content[span.offset : span.end] for span in spans)
