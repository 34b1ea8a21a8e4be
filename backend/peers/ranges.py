"""The Range header and the bodies that answer it: RFC 9110, section 14.

Ranges are half open here, [offset, end), and inclusive in the headers. Nothing in this file does I/O.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

UNIT = b"bytes="
# A file offset is below 2**63, which has 19 digits; more are no offset, and int() of many takes long.
_ONE = re.compile(rb"(\d{1,19})-(\d{0,19})|-(\d{1,19})")
CONTENT_TYPE = b"application/octet-stream"


class RangesRefused(ValueError):
    """A Range header that is not answered: malformed, out of bounds, or with too many ranges."""


class Span(NamedTuple):
    """Bytes [offset, end) of a file, and what is sent before them."""

    offset: int
    end: int
    lead: bytes = b""


@dataclass(frozen=True, slots=True)
class Body:
    """Spans of a file, one after the other, and what is sent last; `length` is that of all of it."""

    spans: tuple[Span, ...]
    tail: bytes
    length: int


def parse_ranges(header: bytes, size_bytes: int, ranges_max: int) -> list[tuple[int, int]] | None:
    """The satisfiable ranges of a Range header, in order; None for a unit that is not bytes.

    Raises `RangesRefused` when none is satisfiable, when one is malformed, and for more than `ranges_max`.
    """
    if header[: len(UNIT)].lower() != UNIT:
        return None
    specs = header[len(UNIT) :].split(b",", ranges_max)
    if len(specs) > ranges_max:
        raise RangesRefused(f"more than {ranges_max} ranges")
    found = [_one_range(spec.strip(), size_bytes) for spec in specs]
    ranges = [each for each in found if each is not None]
    if not ranges:
        raise RangesRefused(f"no byte of the range is within {size_bytes} bytes")
    return ranges


def _one_range(spec: bytes, size_bytes: int) -> tuple[int, int] | None:
    match = _ONE.fullmatch(spec)
    if match is None:
        raise RangesRefused("malformed range")
    first, last, suffix = match.groups()
    if suffix is not None:
        offset, end = max(0, size_bytes - int(suffix)), size_bytes
    else:
        offset = int(first)
        end = min(int(last) + 1, size_bytes) if last else size_bytes
        if last and int(last) < offset:
            raise RangesRefused("malformed range: its end is before its start")
    return (offset, end) if offset < end else None


def merge_ranges(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in the order of their offsets; those that overlap or touch have become one."""
    merged: list[tuple[int, int]] = []
    for offset, end in sorted(ranges):
        if merged and offset <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((offset, end))
    return merged


def content_range(offset: int, end: int, size_bytes: int) -> bytes:
    """The value of Content-Range."""
    return b"bytes %d-%d/%d" % (offset, end - 1, size_bytes)


def single_body(offset: int, end: int) -> Body:
    """One range, or all of a file."""
    spans = (Span(offset, end),) if end > offset else ()
    return Body(spans, b"", end - offset)


def multipart_body(ranges: Sequence[tuple[int, int]], size_bytes: int, boundary: bytes) -> Body:
    """multipart/byteranges: RFC 9110, section 14.6. `boundary` must not occur in the parts."""
    form = b"\r\n--%s\r\nContent-Type: %s\r\nContent-Range: bytes %%d-%%d/%d\r\n\r\n"
    lead = form % (boundary, CONTENT_TYPE, size_bytes)
    spans = tuple(Span(offset, end, lead % (offset, end - 1)) for offset, end in ranges)
    tail = b"\r\n--%s--\r\n" % boundary
    length = len(tail) + sum(len(span.lead) + span.end - span.offset for span in spans)
    return Body(spans, tail, length)


def slices(spans: Sequence[Span], slice_max: int, small_max: int) -> Iterator[list[Span]]:
    """Cuts a body into slices of `slice_max` bytes of the file at most.

    A span of more than `small_max` bytes is alone in its slices; smaller ones in a row share one.
    """
    batch: list[Span] = []
    batch_bytes = 0
    for span in spans:
        size = span.end - span.offset
        if batch and (size > small_max or batch_bytes + size > slice_max):
            yield batch
            batch, batch_bytes = [], 0
        if size > small_max:
            yield from _cut(span, slice_max)
        else:
            batch.append(span)
            batch_bytes += size
    if batch:
        yield batch


def _cut(span: Span, slice_max: int) -> Iterator[list[Span]]:
    lead = span.lead
    for offset in range(span.offset, span.end, slice_max):
        yield [Span(offset, min(offset + slice_max, span.end), lead)]
        lead = b""
