"""The head of a request to an API, as strictly as its few clients allow. No I/O.

Whatever two readers could understand differently is refused: lengths that are named twice or not in digits,
bodies of unknown length, lines that go on in the next one.
"""

import re
from dataclasses import dataclass

HEAD_END = b"\r\n\r\n"
LENGTH_DIGITS_MAX = 12

_REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) ([!-~]{1,4096}) HTTP/1\.([01])")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")


class HeadInvalid(ValueError):
    """What was sent is no request that is understood here; `status` is what to answer."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass(frozen=True, slots=True)
class Head:
    """Method, target, bytes of the body, and whether the client ends the connection after the answer."""

    method: str
    target: str
    length: int
    is_last: bool


def read_head(head: bytes) -> Head:
    """Reads a head, without the empty line at its end. Raises `HeadInvalid`."""
    first, *lines = head.split(b"\r\n")
    line = _REQUEST_LINE.fullmatch(first)
    if line is None:
        raise HeadInvalid(400, "not an HTTP request")
    length: bytes | None = None
    hosts, is_last = 0, line[3] == b"0"
    for text in lines:
        header = _HEADER.fullmatch(text)
        if header is None:
            raise HeadInvalid(400, "not an HTTP request")
        name, value = header[1].lower(), header[2].rstrip()
        if name == b"content-length":
            if length is not None or not value.isdigit() or len(value) > LENGTH_DIGITS_MAX:
                raise HeadInvalid(400, "not an HTTP request")
            length = value
        elif name == b"transfer-encoding":
            raise HeadInvalid(411, "a body needs Content-Length")
        elif name == b"connection":
            is_last = is_last or b"close" in value.lower()
        elif name == b"host":
            hosts += 1
    if hosts > 1 or (hosts == 0 and line[3] == b"1"):
        raise HeadInvalid(400, "not an HTTP request")
    return Head(line[1].decode(), line[2].decode(), int(length or 0), is_last)
