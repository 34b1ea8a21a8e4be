"""A client that costs little: the kernel throws the bodies away, so the server is what is measured.

One thread a connection, one request after the other. recv(2) with MSG_TRUNC on TCP counts without copying.
"""

import random
import re
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HEAD_MAX_BYTES = 4096
DISCARD_BYTES = 1 << 20
MIB = 1 << 20
KIB = 1 << 10
CHECKED = 4
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
RANGE = re.compile(rb"[=,](\d+)-(\d+)")


@dataclass(frozen=True, slots=True)
class Scene:
    """What is asked for: `ranges` ranges of `size_bytes` in each request, on so many connections."""

    name: str
    size_bytes: int
    ranges: int
    connections: int
    adjacent: bool = False

    def requests(self, target: str, file_bytes: int, count: int = 32) -> list[bytes]:
        """Heads of requests at random places of the file, the same ones each time."""
        chance = random.Random(self.name)
        return [self._request(target, file_bytes, chance) for _ in range(count)]

    def _request(self, target: str, file_bytes: int, chance: random.Random) -> bytes:
        places = file_bytes // self.size_bytes
        if self.adjacent:
            first = chance.randrange(places - self.ranges)
            numbers: Sequence[int] = range(first, first + self.ranges)
        else:
            # Even numbers only: no two of them touch.
            numbers = sorted(2 * number for number in chance.sample(range(places // 2), self.ranges))
        ranges = ",".join(f"{n * self.size_bytes}-{(n + 1) * self.size_bytes - 1}" for n in numbers)
        return f"GET {target} HTTP/1.1\r\nHost: peer\r\nRange: bytes={ranges}\r\n\r\n".encode()


def run_load(port: int, scene: Scene, requests: Sequence[bytes], seconds: float) -> tuple[int, float]:
    """Asks for `seconds`; returns the requests that were answered and the time that they took."""
    start = time.perf_counter()
    counts = [0] * scene.connections
    failures: list[Exception] = []

    def ask(number: int) -> None:
        try:
            with socket.create_connection(("127.0.0.1", port)) as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                scratch = bytearray(DISCARD_BYTES)
                turn = number
                while time.perf_counter() - start < seconds:
                    sock.sendall(requests[turn % len(requests)])
                    _discard(sock, scratch)
                    turn, counts[number] = turn + 1, counts[number] + 1
        except (OSError, ValueError) as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(scene.connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return sum(counts), time.perf_counter() - start


def _discard(sock: socket.socket, scratch: bytearray) -> None:
    _, length, begun = _read_head(sock)
    left = length - len(begun)
    while left:
        count = sock.recv_into(scratch, min(left, len(scratch)), socket.MSG_TRUNC | socket.MSG_WAITALL)
        if count == 0:
            raise ConnectionError("closed in the middle of a body")
        left -= count


def _read_head(sock: socket.socket) -> tuple[bytes, int, bytes]:
    """The head of an answer, the length of its body, and what has come of that with it."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(HEAD_MAX_BYTES)
        if not more:
            raise ConnectionError("closed in the middle of a head")
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = LENGTH.search(head)
    if length is None or not head.startswith(b"HTTP/1.1 206"):
        raise ValueError(head[:80])
    return head, int(length[1]), body


def check_answers(port: int, scene: Scene, requests: Sequence[bytes], file: Path) -> None:
    """Asks a few times and looks for every range in the answer. Raises `ValueError`."""
    content = file.read_bytes()
    with socket.create_connection(("127.0.0.1", port)) as sock:
        for request in requests[:CHECKED]:
            sock.sendall(request)
            _, length, body = _read_head(sock)
            while len(body) < length and (more := sock.recv(length - len(body))):
                body += more
            place = 0
            for first, last in RANGE.findall(request):
                wanted = content[int(first) : int(last) + 1]
                place = body.find(wanted, place) + len(wanted)
                if place < len(wanted):
                    raise ValueError(f"{scene.name}: wrong bytes")
