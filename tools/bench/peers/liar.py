"""A relay in front of a peer's server that flips bytes of every blob it sends: a host that lies.

`python -m tools.bench.peers.liar HOST PORT`. Other answers pass as they are: it is trusted until it matters.
"""

import contextlib
import socket
import sys
import threading
from collections.abc import Iterator

PORT = 8999
FLIPPED_EVERY_BYTES = 4096
BLOB_TYPES = (b"application/octet-stream", b"multipart/byteranges")
END_OF_HEAD = b"\r\n\r\n"
MOST_HEAD_BYTES = 64 << 10
BLOCK_BYTES = 64 << 10
NO_BODY = (b"204", b"304")


def main(host: str, port: int) -> None:
    """Serves until killed."""
    with socket.create_server(("0.0.0.0", PORT), backlog=128) as listener:
        while True:
            client, _ = listener.accept()
            threading.Thread(target=relay, args=(client, (host, port)), daemon=True).start()


def relay(client: socket.socket, address: tuple[str, int]) -> None:
    """Relays one connection, its answers with flipped bytes."""
    with client, contextlib.suppress(OSError, ValueError), socket.create_connection(address) as server:
        threading.Thread(target=_copy, args=(client, server), daemon=True).start()
        for data in lying(_blocks(server)):
            client.sendall(data)


def lying(answers: Iterator[bytes]) -> Iterator[bytes]:
    """A stream of HTTP/1.1 answers with bytes of the bodies of blobs flipped. Raises `ValueError`."""
    pending = b""
    for block in answers:
        pending += block
        while (end := pending.find(END_OF_HEAD)) >= 0:
            head, pending = pending[: end + len(END_OF_HEAD)], pending[end + len(END_OF_HEAD) :]
            yield head
            size, is_blob = _body(head)
            while True:
                part, pending = pending[:size], pending[size:]
                size -= len(part)
                yield flipped(part) if is_blob else part
                if not size:
                    break
                pending = next(answers, b"")
                if not pending:
                    return
        if len(pending) > MOST_HEAD_BYTES:
            raise ValueError("not an HTTP answer")


def flipped(data: bytes) -> bytes:
    """`data` with one byte in each few KiB flipped."""
    changed = bytearray(data)
    for place in range(0, len(changed), FLIPPED_EVERY_BYTES):
        changed[place] ^= 0xFF
    return bytes(changed)


def _body(head: bytes) -> tuple[int, bool]:
    """The length of the body behind `head`, and whether it is of a blob."""
    status, *lines = head.split(b"\r\n")
    fields = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)
    }
    code = status.split()[1]
    if code in NO_BODY or code.startswith(b"1"):
        return 0, False
    return int(fields.get(b"content-length", b"0")), fields.get(b"content-type", b"").startswith(BLOB_TYPES)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        for data in _blocks(source):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def _blocks(source: socket.socket) -> Iterator[bytes]:
    while data := source.recv(BLOCK_BYTES):
        yield data


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
