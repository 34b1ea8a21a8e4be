"""Reads what another host answers with several ranges: content type, Content-Range, then the body."""

import contextlib

from backend.peers.multipart import AnswerRefused, PartialAnswer

ASKED = ((0, 5), (100, 108), (4096, 4100))
_PART = b"\r\n--b0\r\nContent-Type: application/octet-stream\r\nContent-Range: bytes %d-%d/9999\r\n\r\n"
_BODY = b"".join(_PART % (offset, end - 1) + bytes(end - offset) for offset, end in ASKED) + b"\r\n--b0--\r\n"
SEEDS = (
    b"multipart/byteranges; boundary=b0\n\n" + _BODY,
    b'multipart/byteranges; boundary="b0"\n\n' + _BODY[2:],
    b"application/octet-stream\nbytes 100-107/9999\n12345678",
)


def exercise(data: bytes) -> None:
    """An answer is refused, or it has ranges that were asked for, each once, and in order."""
    kind, bounds, body = [*data.split(b"\n", 2), b"", b""][:3]
    headers = {b"content-type": kind, b"content-range": bounds, b"content-length": b"%d" % len(body)}
    buffer = memoryview(bytearray(sum(end - offset for offset, end in ASKED)))
    with contextlib.suppress(AnswerRefused):
        answer = PartialAnswer.of(headers, ASKED)
        found = [answer.single] if answer.single else answer.place(memoryview(body), ASKED, buffer)
        assert set(found) <= set(ASKED)
        assert found == sorted(set(found))


if __name__ == "__main__":
    from tests.fuzz.driver import run

    run("fuzz_peer_answer")
