"""Asks other hosts for ranges of decoded files: HTTP/1.1, h11 for the heads, the body straight into memory.

Concurrency: one `PeerClient` for all tasks; a connection belongs to one request at a time, and is kept for
the next one to the same host and class when the answer was read to its end. So what somebody waits for is
never behind a prefetch. A cancelled request closes its connection.
"""

import enum
import math
import re
import socket
import ssl
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import urlsplit

import h11
import trio

from backend.contract import BackendError
from backend.peers.intake import Intake
from backend.peers.reach import is_reachable, reach
from backend.pieces import first_failure
from backend.priority import FetchClass

STALL_S = 0.3
"""Silence after which it is asked on a new connection whether the host is alive."""
HEARD_S = 1.0
SILENCE_MAX_S = 30.0
"""A live host that sends nothing for so long will not send anything: it waits for an origin, perhaps."""
RETRY_AFTER_S = 0.2
IDLE_PER_HOST = 4
HEAD_MAX_BYTES = 16 << 10
RECEIVE_BYTES = 1 << 20
WAKE_BYTES = 64 << 10

_CONTENT_RANGE = re.compile(rb"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")


class Verdict(enum.Enum):
    """Why a host did not give what was asked."""

    DEAD = "does not answer"
    BUSY = "is busy"
    ABSENT = "has not what was asked"
    MOVED = "names another host"
    FAULTY = "makes no sense"


class PeerFailed(BackendError):
    """A host did not give what was asked; never seen by a reader, who gets it from somewhere else."""

    message = "peer {where}: {why}"
    exit_code: ClassVar[int] = 154

    def __init__(self, where: str, verdict: Verdict, detail: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(where=where, why=f"{verdict.value}{f': {detail}' if detail else ''}")
        self.verdict = verdict
        self.location = detail if verdict is Verdict.MOVED else ""
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class PeerRequest:
    """A range of a decoded file. `image`: from where the blob can be read; `may_fetch`: whoever is asked is
    an owner, and to bring from there what it lacks."""

    blob_id: str
    offset: int
    image: str
    fetch_class: FetchClass
    may_fetch: bool = False


class PeerClient:
    """See above. `own_url` tells the others where this host's upload server is."""

    def __init__(self, own_url: str = "", ssl_context: ssl.SSLContext | None = None) -> None:
        self.own_url = own_url
        self._ssl = ssl_context
        self._heard_at: dict[str, float] = {}
        self._idle: dict[tuple[str, FetchClass], list[_Connection]] = defaultdict(list)

    async def fetch(
        self, url: str, request: PeerRequest, buffer: memoryview, intake: Intake | None = None
    ) -> None:
        """Fills `buffer` with the range that starts at `request.offset`. Raises `PeerFailed`.

        The bytes are not verified. `intake` says how fast they may be received.
        """
        idle = self._idle[url, request.fetch_class]
        while idle:
            connection = idle.pop()
            try:
                await self._exchange(connection, request, buffer, intake)
            except _Stale:
                continue  # closed by the other side while nobody used it
            return
        connection = await self._connect(url)
        try:
            await self._exchange(connection, request, buffer, intake)
        except _Stale:
            raise PeerFailed(url, Verdict.DEAD, "hung up") from None

    def heard(self, url: str) -> None:
        """Something has arrived from a host, on whatever connection."""
        self._heard_at[url] = trio.current_time()

    def was_heard(self, url: str) -> bool:
        """Whether a host has sent something within `HEARD_S`: it is alive, however full its link is."""
        return trio.current_time() - self._heard_at.get(url, -math.inf) < HEARD_S

    async def is_alive(self, url: str) -> bool:
        """Whether the host has sent something a moment ago, or can be connected to."""
        return self.was_heard(url) or await is_reachable(*_place(url))

    def close(self) -> None:
        """Closes idle connections."""
        for idle in self._idle.values():
            for connection in idle:
                connection.close()
        self._idle.clear()

    async def _connect(self, url: str) -> "_Connection":
        try:
            return await _Connection.open(url, self._ssl, self.heard)
        except (OSError, ValueError) as error:
            if self.was_heard(url) and not isinstance(error, ConnectionRefusedError):
                why = "its link is full"
                raise PeerFailed(url, Verdict.BUSY, why, retry_after_s=RETRY_AFTER_S) from error
            raise PeerFailed(url, Verdict.DEAD, getattr(error, "strerror", None) or str(error)) from error

    async def _exchange(
        self,
        connection: "_Connection",
        request: PeerRequest,
        buffer: memoryview,
        intake: Intake | None,
    ) -> None:
        """One request on a connection, which is closed or kept afterwards."""
        url, is_whole = connection.url, False
        try:
            async with trio.open_nursery() as nursery:
                watch = _StallWatch(self, connection)
                nursery.start_soon(watch.run)
                try:
                    is_whole = await self._ask(connection, request, buffer, intake)
                except (OSError, h11.ProtocolError) as error:
                    if connection.heard == 0 and connection.uses > 1:
                        raise _Stale from error
                    raise PeerFailed(url, Verdict.DEAD, str(error) or type(error).__name__) from error
                finally:
                    nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise first_failure(group) from None
        finally:
            idle = self._idle[url, request.fetch_class]
            if is_whole and len(idle) < IDLE_PER_HOST:
                idle.append(connection)
            else:
                connection.close()

    async def _ask(
        self,
        connection: "_Connection",
        request: PeerRequest,
        buffer: memoryview,
        intake: Intake | None,
    ) -> bool:
        """Whether the connection can be used again."""
        first, last = request.offset, request.offset + len(buffer) - 1
        headers = [
            (b"Range", b"bytes=%d-%d" % (first, last)),
            (b"Nydus-Class", b"%d" % request.fetch_class),
            (b"Nydus-Peer", self.own_url.encode()),
        ]
        if request.image:
            headers.append((b"Nydus-Image", request.image.encode()))
        if request.may_fetch:
            headers.append((b"Nydus-Fetch", b"1"))
        head = await connection.ask(f"/v1/blobs/{request.blob_id}/decoded".encode(), headers)
        self._check(connection.url, head, first, last)
        await connection.receive_body(buffer, intake)
        return not connection.is_last(head)

    def _check(self, url: str, head: h11.Response, first: int, last: int) -> None:
        values = dict(head.headers)
        if head.status_code == 206:
            found = _CONTENT_RANGE.fullmatch(values.get(b"content-range", b""))
            length = values.get(b"content-length", b"")
            if (
                found
                and (int(found[1]), int(found[2])) == (first, last)
                and length == b"%d" % (last - first + 1)
            ):
                return
            raise PeerFailed(url, Verdict.FAULTY, "another range than asked for")
        if head.status_code == 307:
            raise PeerFailed(url, Verdict.MOVED, values.get(b"location", b"").decode("latin-1"))
        if head.status_code == 429:
            raise PeerFailed(url, Verdict.BUSY, retry_after_s=_retry_after_s(values))
        verdict = Verdict.ABSENT if head.status_code in (404, 409, 416, 503) else Verdict.FAULTY
        raise PeerFailed(url, verdict, f"status {head.status_code}")


def _place(url: str) -> tuple[str, int]:
    """Host and port. Raises `ValueError`."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or 80


def _retry_after_s(headers: dict[bytes, bytes]) -> float:
    try:
        return int(headers.get(b"nydus-retry-after-ms", b"")) / 1000
    except ValueError:
        return RETRY_AFTER_S


class _Stale(Exception):
    """A kept connection was closed by the other side before it answered anything."""


class _StallWatch:
    """Ends a request to a host that is silent and does not answer elsewhere either."""

    def __init__(self, client: PeerClient, connection: "_Connection") -> None:
        self._client = client
        self._connection = connection

    async def run(self) -> None:
        heard, since = -1, trio.current_time()
        while True:
            await trio.sleep(STALL_S)
            if self._connection.heard != heard or self._connection.is_held:
                heard, since = self._connection.heard, trio.current_time()
                continue
            silent_s = trio.current_time() - since
            if silent_s > SILENCE_MAX_S:
                raise PeerFailed(self._connection.url, Verdict.DEAD, f"silent for {silent_s:.0f} s")
            if not await self._client.is_alive(self._connection.url):
                raise PeerFailed(self._connection.url, Verdict.DEAD, "silent")


class _Connection:
    """A connection that is used for one request after the other."""

    def __init__(
        self,
        url: str,
        host: str,
        plain: socket.socket,
        tls: trio.SSLStream[trio.SocketStream] | None,
        told: Callable[[str], None],
    ) -> None:
        self.url = url
        self.heard = 0
        """Grows with everything that arrives for the request at hand."""
        self.uses = 0
        self.is_held = False
        """It is this host that receives nothing at the moment, because of its limits."""
        self._told = told
        self._wakes_for = 1
        self._host = host.encode()
        self._socket = plain
        self._tls = tls
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_MAX_BYTES)

    @classmethod
    async def open(
        cls, url: str, context: ssl.SSLContext | None, told: Callable[[str], None]
    ) -> "_Connection":
        """`told` hears of `url` whenever something arrives. Raises `OSError`, `ValueError`."""
        host, port = _place(url)
        plain = await reach(host, port)
        tls = None
        try:
            if context is not None:
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(plain))
                tls = trio.SSLStream(stream, context, server_hostname=host)
                await tls.do_handshake()
        except trio.BrokenResourceError as error:
            plain.close()
            raise ConnectionError(str(error.__cause__ or error)) from error
        except BaseException:
            plain.close()
            raise
        return cls(url, f"{host}:{port}", plain, tls, told)

    async def ask(self, target: bytes, headers: list[tuple[bytes, bytes]]) -> h11.Response:
        """Sends a GET and gives the head of the answer. Raises `OSError`, `h11.ProtocolError`."""
        self._wake_for(1)
        # A new one each time: the last body went past it.
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_MAX_BYTES)
        self.uses += 1
        self.heard = 0
        request = h11.Request(method=b"GET", target=target, headers=[(b"Host", self._host), *headers])
        await self._send((self._http.send(request) or b"") + (self._http.send(h11.EndOfMessage()) or b""))
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                data = await self._receive(HEAD_MAX_BYTES)
                self._http.receive_data(data)
                if not data:
                    raise ConnectionResetError("hung up")
            elif isinstance(event, h11.Response):
                return event
            elif isinstance(event, h11.ConnectionClosed):
                raise ConnectionResetError("hung up")

    async def receive_body(
        self,
        buffer: memoryview,
        intake: Intake | None,
    ) -> None:
        """Fills `buffer` with the body, whose length is that of the buffer; past h11, which would copy it."""
        early = self._http.trailing_data[0]
        if len(early) > len(buffer):
            raise h11.RemoteProtocolError("more than the body")
        buffer[: len(early)] = early
        filled = len(early)
        await self._pay(filled, intake)
        while filled < len(buffer):
            part_bytes = RECEIVE_BYTES if intake is None else min(RECEIVE_BYTES, intake.part_bytes)
            part = buffer[filled : filled + part_bytes]
            self._wake_for(len(part))
            got = await self._receive_into(part)
            if not got:
                raise ConnectionResetError(f"hung up after {filled} of {len(buffer)} bytes")
            filled += got
            await self._pay(got, intake)

    async def _pay(self, n_bytes: int, intake: Intake | None) -> None:
        """Waits as the limits of this host want it."""
        if intake is None or not n_bytes:
            return
        self.is_held = True
        try:
            await intake.take(n_bytes)
        finally:
            self.is_held = False

    def is_last(self, head: h11.Response) -> bool:
        """Whether the other side closes the connection after this answer."""
        return any(name == b"connection" and b"close" in value.lower() for name, value in head.headers)

    def close(self) -> None:
        """At once; nothing is lost that somebody waits for."""
        self._socket.close()

    def _wake_for(self, remaining: int) -> None:
        """Has the kernel collect some packets first: to be woken by each costs ten times the copy."""
        size = min(remaining, WAKE_BYTES)
        if self._tls is None and size != self._wakes_for:
            self._wakes_for = size
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)

    async def _send(self, data: bytes) -> None:
        if self._tls is not None:
            await self._tls.send_all(data)
            return
        while data:
            try:
                data = data[self._socket.send(data) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._socket)

    async def _receive(self, size: int) -> bytes:
        if self._tls is not None:
            data = bytes(await self._tls.receive_some(size))
        else:
            while True:
                await trio.lowlevel.wait_readable(self._socket)
                try:
                    data = self._socket.recv(size)
                    break
                except BlockingIOError:
                    continue
        self.heard += len(data)
        self._told(self.url)
        return data

    async def _receive_into(self, buffer: memoryview) -> int:
        if self._tls is not None:
            data = await self._tls.receive_some(len(buffer))
            buffer[: len(data)] = data
            got = len(data)
        else:
            while True:
                try:
                    got = self._socket.recv_into(buffer)
                    break
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(self._socket)
        self.heard += got
        self._told(self.url)
        return got
