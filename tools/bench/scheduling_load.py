"""Many hosts that announce themselves, played by one process: raw sockets, one epoll, no HTTP library.

Each keeps the protocol: its connection stays, the next announcement comes as long after the last answer as
that said, and tells the pieces that came since. Of answers only what the protocol needs is decoded.
"""

import heapq
import random
import select
import socket
import time
from dataclasses import dataclass, field

import msgspec

from backend.peers.piece import PieceSet
from backend.peers.wire import ANNOUNCE_TARGET, Announce, Holding, HostInfo

BLOB = "b" * 64
RECEIVE_BYTES = 1 << 18
HEAD_END = b"\r\n\r\n"
LENGTH = b"content-length:"


class _Members(msgspec.Struct):
    version: int


class _Heard(msgspec.Struct):
    epoch: str
    sequence: int
    interval_s: float
    members: _Members
    peers_enabled: bool = True
    wants_everything: bool = False


@dataclass(slots=True)
class Host:
    """One host that is played, and its connection."""

    info: HostInfo
    connection: socket.socket
    todo: list[int]
    pieces: PieceSet
    epoch: str = ""
    sequence: int = 0
    version: int = -1
    heard_at: float = 0.0
    sent_at: float = 0.0
    is_told: bool = False
    is_enabled: bool = True
    received: bytearray = field(default_factory=bytearray)


@dataclass(slots=True)
class Load:
    """What was measured since the last `reset`."""

    latencies_s: list[float] = field(default_factory=list)
    answer_bytes: int = 0
    interval_s: float = 0.0


class Hosts:
    """See above. `pieces_a_second` is how fast each host gets more of the blob."""

    def __init__(self, port: int, count: int, pieces: int, pieces_a_second: float) -> None:
        self.load = Load()
        self.hosts: list[Host] = []
        self._count = pieces
        self._pieces_a_second = pieces_a_second
        self._chance = random.Random(1)
        self._poll = select.epoll()
        self._by_descriptor: dict[int, Host] = {}
        self._due: list[tuple[float, int]] = []
        for number in range(count):
            connection = socket.create_connection(("127.0.0.1", port))
            todo = list(range(pieces))
            self._chance.shuffle(todo)
            info = HostInfo(f"host-{number}", f"http://127.0.0.1:{10_000 + number}", f"zone-{number % 3}")
            host = Host(info, connection, todo, PieceSet(pieces))
            self.hosts.append(host)
            self._by_descriptor[connection.fileno()] = host
            self._poll.register(connection, select.EPOLLIN)

    def start(self, over_s: float) -> None:
        """Has every host announce itself for the first time within `over_s`."""
        now = time.monotonic()
        for number in range(len(self.hosts)):
            heapq.heappush(self._due, (now + over_s * number / len(self.hosts), number))

    def play(self, until: float) -> None:
        """Announces until `until` (`time.monotonic`)."""
        numbers = {host.connection.fileno(): number for number, host in enumerate(self.hosts)}
        while (now := time.monotonic()) < until:
            while self._due and self._due[0][0] <= now:
                self._announce(self.hosts[heapq.heappop(self._due)[1]])
            next_at = min(until, self._due[0][0]) if self._due else until
            for descriptor, _ in self._poll.poll(max(0.0, next_at - time.monotonic())):
                host = self._by_descriptor[descriptor]
                heard = self._receive(host)
                if heard is not None:
                    self._take(host, heard, numbers[descriptor])

    def close(self) -> None:
        """Closes all connections."""
        for host in self.hosts:
            host.connection.close()
        self._poll.close()

    def _announce(self, host: Host) -> None:
        now = time.monotonic()
        elapsed_s = now - host.heard_at if host.heard_at else 0.0
        count = int(elapsed_s * self._pieces_a_second + self._chance.random())
        fresh = [host.todo.pop() for _ in range(min(count, len(host.todo)))]
        host.pieces.update(fresh)
        if host.is_told:
            holdings = [Holding(BLOB, self._count, added=fresh)] if fresh else []
        else:
            holdings = [Holding(BLOB, self._count, bytes(host.pieces))]
        announce = Announce(
            host.info,
            host.epoch,
            host.sequence,
            host.version,
            is_everything=not host.is_told,
            holdings=holdings,
            wanted=[BLOB] if host.todo else [],
        )
        body = msgspec.json.encode(announce)
        head = (
            f"POST {ANNOUNCE_TARGET} HTTP/1.1\r\nHost: scheduler\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        host.sent_at = now
        host.connection.sendall(head.encode() + body)

    def _receive(self, host: Host) -> _Heard | None:
        data = host.connection.recv(RECEIVE_BYTES)
        if not data:
            raise SystemExit(f"the scheduler has hung up on {host.info.id}")
        host.received += data
        end = host.received.find(HEAD_END)
        if end < 0:
            return None
        head = bytes(host.received[:end]).lower()
        at = head.index(LENGTH) + len(LENGTH)
        length = int(head[at:].split(b"\r\n", 1)[0])
        whole = end + len(HEAD_END) + length
        if len(host.received) < whole:
            return None
        if b" 200 " not in head[:16]:
            raise SystemExit(f"the scheduler says {bytes(host.received[:300])!r}")
        self.load.answer_bytes += whole
        heard = msgspec.json.decode(memoryview(host.received)[end + len(HEAD_END) :], type=_Heard)
        host.received = bytearray()
        return heard

    def _take(self, host: Host, heard: _Heard, number: int) -> None:
        now = time.monotonic()
        self.load.latencies_s.append(now - host.sent_at)
        self.load.interval_s = heard.interval_s
        host.epoch, host.sequence, host.version = heard.epoch, heard.sequence, heard.members.version
        host.is_told, host.heard_at = not heard.wants_everything, now
        host.is_enabled = heard.peers_enabled
        heapq.heappush(self._due, (now + (0.0 if heard.wants_everything else heard.interval_s), number))
