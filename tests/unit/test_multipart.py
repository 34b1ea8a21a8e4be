"""Several ranges in one request: what is asked for together, and answers, right and wrong ones."""

import contextlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.extents import BlobExtent
from backend.peers.multipart import RANGES_MAX, AnswerRefused, PartialAnswer, range_header
from backend.peers.portion import (
    GAP_BYTES,
    ChunkSpan,
    decoded_portion,
    encoded_portion,
    join_small,
)
from backend.peers.ranges import multipart_body, parse_ranges

CONTENT = random.Random(1).randbytes(100_000)
ASKED = [(0, 10), (500, 700), (90_000, 100_000)]
BOUNDARY = b"0123456789abcdef"
TYPE = b"multipart/byteranges; boundary=" + BOUNDARY


def rendered(ranges: list[tuple[int, int]], boundary: bytes = BOUNDARY) -> bytes:
    """The body that our server sends."""
    body = multipart_body(ranges, len(CONTENT), boundary)
    return b"".join(span.lead + CONTENT[span.offset : span.end] for span in body.spans) + body.tail


def placed(body: bytes, asked: list[tuple[int, int]] = ASKED) -> tuple[list[tuple[int, int]], bytes]:
    headers = {b"content-length": b"%d" % len(body), b"content-type": TYPE}
    buffer = bytearray(sum(end - offset for offset, end in asked))
    found = PartialAnswer.of(headers, asked).place(memoryview(body), asked, memoryview(buffer))
    return found, bytes(buffer)


def wanted(ranges: list[tuple[int, int]]) -> bytes:
    return b"".join(CONTENT[offset:end] for offset, end in ranges)


def test_all_parts_are_put_where_they_belong() -> None:
    assert parse_ranges(range_header(ASKED), len(CONTENT), 256) == ASKED
    assert placed(rendered(ASKED)) == (ASKED, wanted(ASKED))
    assert placed(rendered(ASKED)[2:]) == (ASKED, wanted(ASKED))  # RFC 2046: no line break before the first
    assert placed(rendered(ASKED[::-1])) == (ASKED, wanted(ASKED))


def test_an_answer_may_have_some_of_the_ranges() -> None:
    found, buffer = placed(rendered(ASKED[1:]))
    assert found == ASKED[1:]
    assert buffer == bytes(10) + wanted(ASKED[1:])
    assert placed(rendered([]))[0] == []
    single = {b"content-length": b"200", b"content-range": b"bytes 500-699/100000"}
    assert PartialAnswer.of(single, ASKED).single == (500, 700)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\r\n",
        rendered(ASKED)[:-30],
        rendered(ASKED)[:400],
        rendered([(1, 11)]),
        rendered([(0, 10), (0, 10)]),
        rendered([(0, 9)]),
        rendered(ASKED, b"another boundary"),
        rendered(ASKED).replace(b"bytes 500-", b"bytes 5000000000000000000000-"),
        rendered(ASKED).replace(b"Content-Range", b"X-Range"),
        b"--"
        + BOUNDARY
        + b"\r\nContent-Range: bytes 0-9/100000\r\n"
        + b"X: y\r\n" * 5000
        + b"\r\n"
        + bytes(10),
    ],
)
def test_wrong_bodies_are_refused(body: bytes) -> None:
    if len(body) > 25_000:
        with pytest.raises(AnswerRefused, match="more than was asked for"):
            placed(body)
    else:
        with pytest.raises(AnswerRefused):
            placed(body)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {b"content-length": b"200"},
        {b"content-length": b"-1", b"content-type": TYPE},
        {b"content-length": b"99999999999999", b"content-type": TYPE},
        {b"content-length": b"200", b"content-range": b"bytes 501-700/100000"},
        {b"content-length": b"199", b"content-range": b"bytes 500-699/100000"},
        {b"content-length": b"200", b"content-type": b"multipart/byteranges"},
        {b"content-length": b"200", b"content-type": b'multipart/byteranges; boundary="'},
    ],
)
def test_heads_that_promise_something_else_are_refused(headers: dict[bytes, bytes]) -> None:
    with pytest.raises(AnswerRefused):
        PartialAnswer.of(headers, ASKED)


@given(st.binary(max_size=300), st.integers(0, 600))
def test_whatever_is_sent_nothing_else_is_raised(noise: bytes, at: int) -> None:
    body = rendered(ASKED[:2])
    with contextlib.suppress(AnswerRefused):
        placed(body[:at] + noise + body[at + len(noise) :], ASKED[:2])


def extent(start: int, size: int, decoded_size: int | None = None) -> BlobExtent:
    return BlobExtent(range(start, start + 1), start, size, decoded_size or size, is_compressed=True)


def test_scattered_chunks_are_asked_for_together_and_near_ones_as_one() -> None:
    chunks = [ChunkSpan(0, 0, 4096), ChunkSpan(1, 4096 + GAP_BYTES, 4096), ChunkSpan(2, 1 << 20, 4096)]
    portion = decoded_portion(chunks)
    assert portion.ranges == ((0, 8192 + GAP_BYTES), (1 << 20, (1 << 20) + 4096))
    buffer = memoryview(bytearray(portion.size_bytes))
    assert len(portion.view(buffer, 1 << 20, 4096)) == 4096
    buffer[8192 + GAP_BYTES] = 7
    assert portion.view(buffer, 1 << 20, 1)[0] == 7
    with pytest.raises(ValueError, match="in no range"):
        portion.view(buffer, 1 << 20, 4097)


def test_too_many_ranges_become_one() -> None:
    chunks = [ChunkSpan(n, n << 16, 4096) for n in range(RANGES_MAX + 1)]
    assert decoded_portion(chunks).ranges == ((0, (RANGES_MAX << 16) + 4096),)
    assert len(decoded_portion(chunks[1:]).ranges) == RANGES_MAX
    assert encoded_portion([extent(n << 16, 100) for n in range(RANGES_MAX + 1)], chunks) is None


def test_encoded_ranges_have_nothing_between_the_extents() -> None:
    portion = encoded_portion([extent(300, 50), extent(0, 100), extent(100, 100)], [])
    assert portion is not None
    assert portion.ranges == ((0, 200), (300, 350))


def test_small_runs_share_a_request_up_to_its_limits() -> None:
    small = [[extent(n << 20, 4096)] for n in range(300)]
    joined = join_small(small, 4 << 20)
    assert [len(run) for run in joined] == [RANGES_MAX, RANGES_MAX, 300 - 2 * RANGES_MAX]
    large = [
        [extent(0, 3 << 20)],
        [extent(5 << 20, 4096)],
        [extent(6 << 20, 4096)],
        [extent(7 << 20, 1 << 20)],
    ]
    assert [len(run) for run in join_small(large, 4 << 20)] == [1, 2, 1]
    assert [len(run) for run in join_small([[extent(n << 20, 200_000)] for n in range(6)], 500_000)] == [
        2,
        2,
        2,
    ]
