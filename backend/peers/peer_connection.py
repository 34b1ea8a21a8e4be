"""A connection to another host's upload server, used for one request after the other.

Concurrency: one task has a request on it at a time; who watches it looks at its counters.
"""

import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import h11
import trio

from backend.peers.intake import Intake
from backend.peers.reach import nothing, reach
from backend.peers.tls_failure import tls_failure

HANDSHAKE_S = 5.0
HEAD_MAX_BYTES = 16 << 10
RECEIVE_BYTES = 1 << 20
WAKE_BYTES = 64 << 10
HELD_LONG_S = 5.0
"""A quarter of what a host waits for a client that takes nothing (`ServerOptions.slice_timeout_s`)."""


class PeerConnection:
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
        self.was_held_long = False
        """So long that the other side may have given up."""
        self._told = told
        self._wakes_for = 1
        self._host = host.encode()
        self._socket = plain
        self._tls = tls
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_MAX_BYTES)

    @classmethod
    async def open(
        cls,
        url: str,
        context: ssl.SSLContext | None,
        told: Callable[[str], None],
        on_late: Callable[[], None] = nothing,
    ) -> "PeerConnection":
        """`told` hears of `url` whenever something arrives; `on_late`: see `reach`.

        Raises `OSError`, `ValueError`, and `CertificateRefused`.
        """
        host, port = place_of(url)
        if url.startswith("https:") != (context is not None):
            raise ValueError("one of the two hosts has TLS and the other has not: give --pki to both")
        plain = await reach(host, port, on_late)
        tls = None
        try:
            if context is not None:
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(plain))
                tls = trio.SSLStream(stream, context, server_hostname=host, https_compatible=True)
                with _translated(url), trio.fail_after(HANDSHAKE_S):
                    await tls.do_handshake()
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
        self.was_held_long = False
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
        self.is_held, since = True, trio.current_time()
        try:
            await intake.take(n_bytes)
        finally:
            self.is_held = False
            self.was_held_long |= trio.current_time() - since > HELD_LONG_S

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
            with _translated(self.url):
                await self._tls.send_all(data)
            return
        while data:
            try:
                data = data[self._socket.send(data) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._socket)

    async def _receive(self, size: int) -> bytes:
        if self._tls is not None:
            with _translated(self.url):
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
            with _translated(self.url):
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


def place_of(url: str) -> tuple[str, int]:
    """Host and port. Raises `ValueError`."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or 80


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """What goes wrong with TLS as `CertificateRefused`, a connection that just breaks as `OSError`."""
    try:
        yield
    except trio.TooSlowError as error:
        raise TimeoutError(f"no TLS within {HANDSHAKE_S:g} s") from error
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        if isinstance(error.__cause__, ssl.SSLError) and not isinstance(error.__cause__, ssl.SSLEOFError):
            raise tls_failure(error, url) from error
        raise ConnectionError(str(error.__cause__ or error) or "the connection broke") from error
