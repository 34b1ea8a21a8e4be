"""Short JSON requests on thousands of connections that are kept: plain sockets, one epoll, no task for each.

h11 and a task per connection cost four times what the scheduler does with an announcement. Of HTTP/1.1
this takes what clients of an API send: a head of `HEAD_MAX_BYTES`, a body whose length is named, requests one
after the other on a connection. Everything else is refused.

Concurrency: one task. Between two checkpoints a batch of ready sockets is served, each as far as what has
arrived goes. Handlers are free of checkpoints; one that keeps its answer back ("held") gives it later. A
client has `REQUEST_TIMEOUT_S` for a request that it has begun and for taking an answer, and `IDLE_TIMEOUT_S`
in between.
"""

import errno
import logging
import select
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import trio

from backend.json_api import BODY_MAX_BYTES, HEAD_MAX_BYTES, IDLE_TIMEOUT_S, REQUEST_TIMEOUT_S
from backend.peers.http_heads import STATUS_LINES
from backend.peers.request_head import HEAD_END, HeadInvalid, read_head

log = logging.getLogger(__name__)

RECEIVE_BYTES = 1 << 16
BATCH = 256
ACCEPTS = 64
SWEEP_PAUSE_S = 0.5
NEVER = float("inf")
WAITING = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Answered(NamedTuple):
    """Status, body and content type of an answer."""

    status: int
    body: bytes
    kind: bytes = b"application/json"


class Connection:
    """A client. `answer` gives what was held."""

    __slots__ = (
        "_begun",
        "_hold",
        "_is_last",
        "_mask",
        "_out",
        "_received",
        "_server",
        "deadline",
        "peer",
        "sock",
        "tls",
    )

    def __init__(self, server: "EventServer", sock: socket.socket, peer: str) -> None:
        self._server = server
        self.sock, self.peer = sock, peer
        self.tls = sock if isinstance(sock, ssl.SSLSocket) else None
        self.deadline = server.now() + REQUEST_TIMEOUT_S
        self._received, self._out = bytearray(), memoryview(b"")
        self._mask, self._hold, self._begun = select.EPOLLIN, False, True
        self._is_last = False
        """Nothing is answered after what is in `_out`."""

    @property
    def certificate(self) -> Mapping[str, Any] | None:
        """The client's, as `getpeercert()` gives it; None without TLS."""
        return self.tls.getpeercert() if self.tls else None

    @property
    def is_open(self) -> bool:
        """Whether an answer can still be given."""
        return self.sock.fileno() >= 0

    def ready(self) -> None:
        """The socket can be read from, or written to."""
        try:
            if self._out:
                self._flush()
            if self._is_last:
                self._end_if_sent()
            elif not self._out:
                self._serve()  # what has arrived before the last answer went out
                self._read()
        except WAITING as error:
            self._watch(write=isinstance(error, ssl.SSLWantWriteError))
        except OSError:
            self.close()

    def answer(self, answered: Answered) -> None:
        """What was held back; nothing when the client has gone meanwhile."""
        if not self.is_open:
            return
        self._hold = False
        try:
            self._put(answered)
            self._serve()
        except WAITING:
            self._watch(write=True)
        except OSError:
            self.close()

    def close(self) -> None:
        """Ends it."""
        self._server.forget(self)
        self.sock.close()

    def _read(self) -> None:
        while self.is_open and not self._out:
            data = self.sock.recv(RECEIVE_BYTES)
            if not data:
                self.close()
                return
            if not self._begun and not self._hold:
                self._begun, self.deadline = True, self._server.now() + REQUEST_TIMEOUT_S
            self._received += data
            if self._hold and len(self._received) > HEAD_MAX_BYTES:
                self.close()
                return
            self._serve()
            if len(data) < RECEIVE_BYTES and not (self.tls and self.tls.pending()):
                return

    def _serve(self) -> None:
        """Answers the requests that have arrived, until one is held or an answer does not go out."""
        while self._received and not (self._hold or self._out or self._is_last) and self.is_open:
            end = self._received.find(HEAD_END, 0, HEAD_MAX_BYTES + len(HEAD_END))
            if end < 0:
                if len(self._received) > HEAD_MAX_BYTES:
                    self._end(431, "the head is too large")
                return
            try:
                head = read_head(bytes(self._received[:end]))
            except HeadInvalid as error:
                self._end(error.status, str(error))
                return
            if head.length > BODY_MAX_BYTES:
                self._end(413, "the body is too large")
                return
            start = end + len(HEAD_END)
            if len(self._received) < start + head.length:
                return
            body = bytes(self._received[start : start + head.length])
            del self._received[: start + head.length]
            self._begun = False
            answered = self._server.handle(self, head.method, head.target, body)
            if answered is None:
                self._hold, self.deadline = True, NEVER
                return
            # Who is refused may have a new certificate by now, which it can show only on a new connection.
            self._put(answered, is_last=head.is_last or (self.tls is not None and answered[0] != 200))

    def _put(self, answered: Answered, *, is_last: bool = False) -> None:
        status, body, kind = answered
        head = b"%s\r\ncontent-type: %s\r\ncontent-length: %d\r\n%s\r\n" % (
            STATUS_LINES[status],
            kind,
            len(body),
            b"connection: close\r\n" if is_last else b"",
        )
        self._begun = bool(self._received)
        self.deadline = self._server.now() + (REQUEST_TIMEOUT_S if self._begun else IDLE_TIMEOUT_S)
        self._out, self._is_last = memoryview(head + body), is_last
        self._flush()
        if is_last:
            self._end_if_sent()

    def _end_if_sent(self) -> None:
        if self._out:
            return
        if self.tls is None:
            self.sock.shutdown(socket.SHUT_WR)
        self.close()

    def _flush(self) -> None:
        try:
            sent = self.sock.send(self._out)
        except WAITING:
            sent = 0
        self._out = self._out[sent:]
        if self._out:
            self.deadline = self._server.now() + REQUEST_TIMEOUT_S
        self._watch(write=bool(self._out))

    def _watch(self, *, write: bool) -> None:
        mask = select.EPOLLOUT if write else select.EPOLLIN
        if mask != self._mask and self.is_open:
            self._mask = mask
            self._server.watch(self, mask)

    def _end(self, status: int, why: str) -> None:
        self._received.clear()
        self._put(Answered(status, b'{"error":"%s"}' % why.encode()), is_last=True)


Handle = Callable[[Connection, str, str, bytes], Answered | None]
"""Gets the connection, method, target and body; None holds the answer back, for `Connection.answer`."""


class EventServer:
    """See above. `busy_s` is the time spent in serving so far, by the clock."""

    def __init__(
        self,
        listener: socket.socket,
        handle: Handle,
        *,
        connections_max: int,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.handle, self.now = handle, clock
        self.busy_s = 0.0
        self._listener, self._most, self._tls = listener, connections_max, tls
        self._connections: dict[int, Connection] = {}
        self._poll = select.epoll()
        self._is_listening = False

    async def run(self) -> None:
        """Serves until cancelled, and closes everything."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._sweep)
                self._listen(True)
                while True:
                    await trio.lowlevel.wait_readable(self._poll.fileno())
                    began = self.now()
                    for descriptor, _ in self._poll.poll(0, BATCH):
                        self._dispatch(descriptor)
                    self.busy_s += self.now() - began
        finally:
            for connection in list(self._connections.values()):
                connection.close()
            self._poll.close()
            self._listener.close()

    def forget(self, connection: Connection) -> None:
        """Before a connection is closed."""
        descriptor = connection.sock.fileno()
        if self._connections.pop(descriptor, None) is not None:
            self._poll.unregister(descriptor)

    def watch(self, connection: Connection, mask: int) -> None:
        """Another event is of interest now."""
        self._poll.modify(connection.sock, mask)

    def _dispatch(self, descriptor: int) -> None:
        if descriptor == self._listener.fileno():
            self._accept()
            return
        connection = self._connections.get(descriptor)
        if connection is not None:
            try:
                connection.ready()
            except Exception:
                log.exception("fault while serving %s", connection.peer)
                connection.close()

    def _accept(self) -> None:
        for _ in range(ACCEPTS):
            if len(self._connections) >= self._most:
                self._listen(False)
                return
            try:
                plain, address = self._listener.accept()
            except WAITING:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    log.warning("no more connections for now: %s", error)
                    self._listen(False)
                return
            self._welcome(plain, str(address[0]))

    def _welcome(self, plain: socket.socket, peer: str) -> None:
        sock = plain
        try:
            plain.setblocking(False)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                # Reading shakes hands on the way.
                sock = self._tls.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        except OSError:
            plain.close()
            return
        self._connections[sock.fileno()] = Connection(self, sock, peer)
        self._poll.register(sock, select.EPOLLIN)

    def _listen(self, wanted: bool) -> None:
        if wanted != self._is_listening:
            self._is_listening = wanted
            if wanted:
                self._poll.register(self._listener, select.EPOLLIN)
            else:
                self._poll.unregister(self._listener)

    async def _sweep(self) -> None:
        """Closes what is too slow, and listens again once there is room."""
        while True:
            await trio.sleep(SWEEP_PAUSE_S)
            now = self.now()
            for connection in [each for each in self._connections.values() if each.deadline < now]:
                connection.close()
            self._listen(len(self._connections) < self._most)
