"""Many hosts that announce themselves, played by one process: raw sockets, one epoll, no HTTP library.

Each keeps the protocol: two connections that stay, one for announcements and one on which it waits for terms;
the next announcement comes as long after the last answer as that said, and tells the pieces that came since.
After a lost connection it comes back after a pause of its own, as an agent does. Of answers only what the
protocol needs is decoded.
"""

import heapq
import random
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from backend.peers.membership import digest_of
from backend.peers.piece import PieceSet
from backend.peers.scheduler_link import RETRY_GROWTH, RETRY_MAX_S, RETRY_MIN_S
from backend.peers.wire import ANNOUNCE_TARGET, TERMS_TARGET, Announce, Holding, HostInfo

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
    wants_everything: bool = False


class _Terms(msgspec.Struct):
    version: int
    peers_enabled: bool


@dataclass(slots=True)
class Line:
    """A connection of a host, and what has arrived on it."""

    host: "Host"
    is_watch: bool
    connection: socket.socket
    received: bytearray = field(default_factory=bytearray)


@dataclass(slots=True)
class Host:
    """One host that is played. `told_epoch`: the life of the scheduler that knows all it has."""

    number: int
    info: HostInfo
    todo: list[int]
    pieces: PieceSet
    epoch: str = ""
    told_epoch: str = ""
    sequence: int = 0
    version: int = -1
    heard_at: float = 0.0
    sent_at: float = 0.0
    failures: int = 0
    terms: int = -1
    is_enabled: bool = True
    announcing: Line | None = None
    watching: Line | None = None


@dataclass(slots=True)
class Load:
    """What was measured since it was put in place."""

    latencies_s: list[float] = field(default_factory=list)
    answer_bytes: int = 0
    interval_s: float = 0.0
    sent: int = 0


class Hosts:
    """See above. `pieces_a_second` is how fast each of them gets more of the blob; `idle` is the part that
    has all of it. `know_all`: they know each other already, as after the restart of a scheduler."""

    def __init__(self, port: int, count: int, pieces: int, pieces_a_second: float, idle: float = 0.0) -> None:
        self.load = Load()
        self.hosts: list[Host] = []
        self._port, self._count, self._pieces_a_second = port, pieces, pieces_a_second
        self._chance = random.Random(1)
        self._poll = select.epoll()
        self._lines: dict[int, Line] = {}
        self._due: list[tuple[float, int, bool]] = []
        self._at: dict[tuple[int, bool], float] = {}
        for number in range(count):
            todo = list(range(pieces)) if number >= idle * count else []
            held = PieceSet(pieces)
            if not todo:
                held.update(range(pieces))
            self._chance.shuffle(todo)
            info = HostInfo(f"host-{number}", f"http://127.0.0.1:{10_000 + number}", f"zone-{number % 3}")
            self.hosts.append(Host(number, info, todo, held))
        self._digest = digest_of(host.info for host in self.hosts)
        self.know_all = False

    def start(self, over_s: float) -> None:
        """Has every host announce itself for the first time within `over_s`."""
        for host in self.hosts:
            self._open(host, is_watch=False)
            self._open(host, is_watch=True)
        now = time.monotonic()
        for host in self.hosts:
            at = now + over_s * host.number / len(self.hosts)
            self._plan(host, at, is_watch=False)
            self._plan(host, at, is_watch=True)

    def play(self, until: float, done: Callable[[], bool] = lambda: False) -> None:
        """Announces until `until` (`time.monotonic`), or until `done`."""
        while (now := time.monotonic()) < until and not done():
            while self._due and self._due[0][0] <= now:
                at, number, is_watch = heapq.heappop(self._due)
                if self._at.get((number, is_watch)) == at:  # else a lost connection has come between
                    self._send(self.hosts[number], is_watch=is_watch)
            next_at = min(until, self._due[0][0]) if self._due else until
            for descriptor, _ in self._poll.poll(max(0.0, next_at - time.monotonic())):
                line = self._lines.get(descriptor)
                if line is not None:
                    self._read(line)

    def close(self) -> None:
        """Closes all connections."""
        for line in list(self._lines.values()):
            self._close(line)
        self._poll.close()

    def _send(self, host: Host, *, is_watch: bool) -> None:
        line = host.watching if is_watch else host.announcing
        try:
            if line is None:
                line = self._open(host, is_watch=is_watch)
            line.connection.sendall(self._watch_of(host) if is_watch else self._announce_of(host))
        except OSError:
            self._failed(host, line, is_watch=is_watch)

    def _plan(self, host: Host, at: float, *, is_watch: bool) -> None:
        self._at[host.number, is_watch] = at
        heapq.heappush(self._due, (at, host.number, is_watch))

    def _open(self, host: Host, *, is_watch: bool) -> Line:
        connection = socket.create_connection(("127.0.0.1", self._port))
        line = Line(host, is_watch, connection)
        self._lines[connection.fileno()] = line
        self._poll.register(connection, select.EPOLLIN)
        if is_watch:
            host.watching = line
        else:
            host.announcing = line
        return line

    def _failed(self, host: Host, line: Line | None, *, is_watch: bool) -> None:
        if line is not None:
            self._close(line)
        if is_watch:
            host.watching, host.terms = None, -1
        else:
            host.announcing, host.told_epoch = None, ""
            host.failures += 1
        pause_s = min(RETRY_MAX_S, RETRY_MIN_S * RETRY_GROWTH ** min(host.failures, 16))
        at = time.monotonic() + pause_s * (0.5 + self._chance.random())
        self._plan(host, at, is_watch=is_watch)

    def _close(self, line: Line) -> None:
        if self._lines.pop(line.connection.fileno(), None) is not None:
            self._poll.unregister(line.connection)
        line.connection.close()

    def _watch_of(self, host: Host) -> bytes:
        return f"GET {TERMS_TARGET}?seen={host.terms} HTTP/1.1\r\nHost: scheduler\r\n\r\n".encode()

    def _announce_of(self, host: Host) -> bytes:
        now = time.monotonic()
        elapsed_s = now - host.heard_at if host.heard_at else 0.0
        count = int(elapsed_s * self._pieces_a_second + self._chance.random())
        fresh = [host.todo.pop() for _ in range(min(count, len(host.todo)))]
        host.pieces.update(fresh)
        is_told = bool(host.told_epoch)
        if is_told:
            holdings = [Holding(BLOB, self._count, added=fresh)] if fresh else []
        else:
            holdings = [Holding(BLOB, self._count, bytes(host.pieces))]
        announce = Announce(
            host.info,
            host.epoch,
            host.sequence,
            host.version,
            members_digest=self._digest if self.know_all and (host.version < 0 or not is_told) else "",
            is_everything=not is_told,
            holdings=holdings,
            wanted=[BLOB] if host.todo else [],
        )
        body = msgspec.json.encode(announce)
        head = (
            f"POST {ANNOUNCE_TARGET} HTTP/1.1\r\nHost: scheduler\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        host.sent_at = now
        self.load.sent += 1
        return head.encode() + body

    def _read(self, line: Line) -> None:
        try:
            data = line.connection.recv(RECEIVE_BYTES)
        except OSError:
            data = b""
        if not data:
            self._failed(line.host, line, is_watch=line.is_watch)
            return
        line.received += data
        body = self._body_of(line)
        if body is not None and line.is_watch:
            self._take_terms(line.host, msgspec.json.decode(body, type=_Terms))
        elif body is not None:
            self._take(line.host, msgspec.json.decode(body, type=_Heard))

    def _body_of(self, line: Line) -> bytes | None:
        end = line.received.find(HEAD_END)
        if end < 0:
            return None
        head = bytes(line.received[:end]).lower()
        at = head.index(LENGTH) + len(LENGTH)
        start = end + len(HEAD_END)
        whole = start + int(head[at:].split(b"\r\n", 1)[0])
        if len(line.received) < whole:
            return None
        if b" 200 " not in head[:16]:
            raise SystemExit(f"the scheduler says {bytes(line.received[:300])!r}")
        body = bytes(line.received[start:])
        line.received = bytearray()
        if not line.is_watch:
            self.load.answer_bytes += whole
        return body

    def _take(self, host: Host, heard: _Heard) -> None:
        now = time.monotonic()
        self.load.latencies_s.append(now - host.sent_at)
        self.load.interval_s = heard.interval_s
        host.epoch, host.sequence, host.version = heard.epoch, heard.sequence, heard.members.version
        host.told_epoch = "" if heard.wants_everything else heard.epoch
        host.heard_at, host.failures = now, 0
        pause_s = 0.0 if heard.wants_everything else heard.interval_s
        self._plan(host, now + pause_s, is_watch=False)

    def _take_terms(self, host: Host, terms: _Terms) -> None:
        host.terms, host.is_enabled = terms.version, terms.peers_enabled
        self._plan(host, time.monotonic(), is_watch=True)
