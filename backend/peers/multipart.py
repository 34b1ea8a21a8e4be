"""Several ranges in one request, as who asks sees them: the Range header, and what an answer has of them.

RFC 9110, sections 14 and 15.3.7. Ranges are half open, [offset, end). No I/O.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

Ranges = Sequence[tuple[int, int]]

RANGES_MAX = 128
"""In one request: half of what a server takes, and a head of a few KiB."""
LEAD_MAX_BYTES = 512
"""What may stand before a part, and behind the last one."""

_CONTENT_RANGE = re.compile(rb"bytes (\d{1,19})-(\d{1,19})/(?:\d{1,19}|\*)")
_MULTIPART = re.compile(rb'multipart/byteranges; *boundary="?([0-9A-Za-z\'()+_,./:=? -]{1,70})"?')
_LENGTH = re.compile(rb"\d{1,19}")


class AnswerRefused(ValueError):
    """An answer that is not one to what was asked."""


def range_header(ranges: Ranges) -> bytes:
    """The value of Range, for ranges that are in order and do not touch."""
    return b"bytes=" + b",".join(b"%d-%d" % (offset, end - 1) for offset, end in ranges)


@dataclass(frozen=True, slots=True)
class PartialAnswer:
    """What the head of a 206 promises: `length` bytes, one range of them or parts divided by `boundary`."""

    length: int
    single: tuple[int, int] | None
    boundary: bytes = b""

    @classmethod
    def of(cls, headers: dict[bytes, bytes], asked: Ranges) -> "PartialAnswer":
        """Raises `AnswerRefused` for a head that promises something else than (some of) what was asked."""
        length_text = headers.get(b"content-length", b"")
        if not _LENGTH.fullmatch(length_text):
            raise AnswerRefused("no length")
        length = int(length_text)
        total = sum(end - offset for offset, end in asked)
        if length > total + LEAD_MAX_BYTES * (len(asked) + 1):
            raise AnswerRefused("more than was asked for")
        parts = _MULTIPART.fullmatch(headers.get(b"content-type", b""))
        if parts:
            return cls(length, None, parts[1])
        single = _range_of(headers.get(b"content-range", b""))
        if single is None or single not in asked or length != single[1] - single[0]:
            raise AnswerRefused("another range than asked for")
        return cls(length, single)

    def place(self, body: memoryview, asked: Ranges, buffer: memoryview) -> list[tuple[int, int]]:
        """Copies the parts of a multipart body to their places in `buffer`, which has all ranges in a row.

        The ranges that were there, in order, which may be fewer than asked for. Raises `AnswerRefused` for
        one that was not asked for, or comes twice, or is torn.
        """
        places: dict[tuple[int, int], int] = {}
        at = 0
        for each in asked:
            places[each] = at
            at += each[1] - each[0]
        found: list[tuple[int, int]] = []
        position = 0
        while True:
            lead = _lead_at(body, position)
            if lead.startswith(b"--" + self.boundary + b"--"):
                return sorted(found)
            head, blank, _ = lead.partition(b"\r\n\r\n")
            if not blank or not head.startswith(b"--" + self.boundary + b"\r\n"):
                raise AnswerRefused("not the parts that its head promises")
            position += _skipped(body, position) + len(head) + len(blank)
            part = _range_of(_header(head, b"content-range"))
            if part is None or part not in places:
                raise AnswerRefused("a part that was not asked for, or twice")
            size = part[1] - part[0]
            if position + size > len(body):
                raise AnswerRefused("a part that ends early")
            at = places.pop(part)
            buffer[at : at + size] = body[position : position + size]
            position += size
            found.append(part)


def _skipped(body: memoryview, position: int) -> int:
    """The line break that belongs to a delimiter; the first one may have none."""
    return 2 if bytes(body[position : position + 2]) == b"\r\n" else 0


def _lead_at(body: memoryview, position: int) -> bytes:
    start = position + _skipped(body, position)
    return bytes(body[start : start + LEAD_MAX_BYTES])


def _header(head: bytes, name: bytes) -> bytes:
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.strip().lower() == name:
            return value.strip()
    return b""


def _range_of(value: bytes) -> tuple[int, int] | None:
    found = _CONTENT_RANGE.fullmatch(value)
    return (int(found[1]), int(found[2]) + 1) if found else None
