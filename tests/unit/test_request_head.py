"""Heads of requests to a scheduler: what is taken, and what two readers could take differently is not."""

import pytest

from backend.peers.request_head import Head, HeadInvalid, read_head

LINE = b"POST /v1/announce HTTP/1.1\r\nHost: x"


def test_what_clients_send() -> None:
    assert read_head(LINE + b"\r\nContent-Length: 12") == Head("POST", "/v1/announce", 12, False)
    assert read_head(LINE + b"\r\nconnection: Close") == Head("POST", "/v1/announce", 0, True)
    assert read_head(b"GET / HTTP/1.0").is_last


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"\x16\x03\x01", 400),
        (b"POST /a b HTTP/1.1\r\nHost: x", 400),
        (b"GET / HTTP/2.0\r\nHost: x", 400),
        (b"GET / HTTP/1.1", 400),
        (LINE + b"\r\nHost: y", 400),
        (LINE + b"\r\nContent-Length: 1\r\nContent-Length: 1", 400),
        (LINE + b"\r\nContent-Length: -1", 400),
        (LINE + b"\r\nContent-Length: +1", 400),
        (LINE + b"\r\nContent-Length: 9999999999999", 400),
        (LINE + b"\r\nContent-Length : 1", 400),
        (LINE + b"\r\nA: b\r\n c", 400),
        (LINE + b"\r\nA: b\nContent-Length: 1", 400),
        (LINE + b"\r\nTransfer-Encoding: chunked", 411),
    ],
)
def test_what_is_refused(head: bytes, status: int) -> None:
    with pytest.raises(HeadInvalid) as caught:
        read_head(head)
    assert caught.value.status == status
