"""HTTP to the outside: the only module that knows httpx, and where its exceptions become ours.

Concurrency: one `HttpClient` serves many tasks; an exchange belongs to one task. A cancelled exchange
closes its connection and leaves the client usable.
"""

import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import httpx
import trio

from backend.address import display_url
from backend.contract import BackendError, Pace

_SEND_PIECE_BYTES = 256 * 1024  # one deadline of `HttpTimeouts.write_s` each: a slow link is not a stall
_DRAIN_LIMIT_BYTES = 64 * 1024
_LOOPBACK_PROXIES_OFF = ("all://localhost", "all://127.0.0.1", "all://[::1]")


class ConnectionFailed(BackendError):
    """No connection, or one that broke."""

    message = "{where}: {why}"
    exit_code: ClassVar[int] = 33
    retryable = True


class Stalled(BackendError):
    """Nothing moved for too long."""

    message = "{where}: {why}"
    exit_code: ClassVar[int] = 34
    retryable = True


class TlsFailed(BackendError):
    """The server's identity could not be verified, or it does not speak TLS."""

    message = "{where}: {why}"
    exit_code: ClassVar[int] = 35

    @property
    def untrusted(self) -> bool:
        """The server does speak TLS, with a certificate that must not be trusted."""
        return bool(self.fields.get("untrusted"))


class RegistryProtocolError(BackendError):
    """The server answered something that makes no sense."""

    message = "{where}: {why}"
    exit_code: ClassVar[int] = 41


@dataclass(frozen=True, slots=True)
class HttpTimeouts:
    """Longest silences in seconds; how long a whole transfer may take is the caller's deadline."""

    connect_s: float = 10.0
    read_s: float = 30.0
    write_s: float = 30.0


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """How to reach servers. `ca_file` (PEM) is trusted beside the system's certificates.

    `ssl_context` stands in place of all that, for servers that want a certificate of this host.
    """

    ca_file: Path | None = None
    insecure_skip_verify: bool = False
    timeouts: HttpTimeouts = field(default_factory=HttpTimeouts)
    connections: int = 16
    ssl_context: ssl.SSLContext | None = None


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One request; its headers may hold credentials and stay out of the repr, as the body does.

    `connect_s` is for this request in place of `HttpTimeouts.connect_s`.
    """

    method: str
    url: str
    headers: Sequence[tuple[str, str]] = field(default=(), repr=False)
    body: bytes | memoryview = field(default=b"", repr=False)
    connect_s: float | None = None


@dataclass(frozen=True, slots=True)
class HttpStatistics:
    """What went over the wire so far; bytes are those of bodies."""

    requests: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0


class _Counters:
    __slots__ = ("received_bytes", "requests", "sent_bytes")

    def __init__(self) -> None:
        self.requests = self.sent_bytes = self.received_bytes = 0


class HttpResponse:
    """The head of an answer, and its body once asked for."""

    __slots__ = ("_counters", "_response", "status", "where")

    def __init__(self, response: httpx.Response, counters: _Counters) -> None:
        self._response = response
        self._counters = counters
        self.status = response.status_code
        self.where = display_url(str(response.url))

    def __repr__(self) -> str:
        return f"<HttpResponse {self.status} {self.where}>"

    @property
    def url(self) -> str:
        """The address that answered; it may carry a signature, so show `where` instead."""
        return str(self._response.url)

    def header(self, name: str) -> str | None:
        """The value of a header (the first one), or None."""
        return next(iter(self.headers(name)), None)

    def headers(self, name: str) -> list[str]:
        """All values of a header."""
        return self._response.headers.get_list(name)

    @property
    def content_length(self) -> int | None:
        """The declared length of the body in bytes; None when absent or no number."""
        text = self.header("Content-Length") or ""
        return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None

    async def consume(self, sink: Callable[[bytes], bool], pace: Pace | None = None) -> None:
        """Gives the body to `sink` piece by piece, as it arrives, until it ends or `sink` returns False.

        `pace` is awaited after each piece: meanwhile nothing more is received.

        Raises `ConnectionFailed` when the body ends early, `Stalled`, and what `sink` raises. A body
        that is not taken to its end costs its connection.
        """
        if self.header("Content-Encoding") not in (None, "identity"):
            raise RegistryProtocolError(where=self.where, why="sent an encoding that was not asked for")
        pieces = self._response.aiter_raw()
        try:
            with _translated(self.where):
                async for piece in pieces:
                    self._counters.received_bytes += len(piece)
                    goes_on = sink(piece)
                    if pace is not None:
                        await pace(len(piece))
                    if not goes_on:
                        break
        finally:
            await self._finish(pieces)

    async def _finish(self, pieces: AsyncIterator[bytes]) -> None:
        """Ends the generators below `pieces`; the garbage collector would end them after the exchange."""
        with trio.CancelScope(shield=True), suppress(httpx.HTTPError, httpx.StreamError, RuntimeError):
            await self._response.aclose()
            async for _ in pieces:  # at most what was received already: the connection is closed
                pass

    async def read(self, limit_bytes: int) -> bytes:
        """The whole body; `RegistryProtocolError` when it is longer than `limit_bytes`."""
        if (self.content_length or 0) > limit_bytes:
            raise RegistryProtocolError(
                where=self.where, why=f"sent more than the {limit_bytes} bytes allowed"
            )
        body = bytearray()

        def keep(piece: bytes) -> bool:
            body.extend(piece)
            return len(body) <= limit_bytes

        await self.consume(keep)
        if len(body) > limit_bytes:
            raise RegistryProtocolError(
                where=self.where, why=f"sent more than the {limit_bytes} bytes allowed"
            )
        return bytes(body)

    async def drain(self) -> None:
        """Takes a small body off the connection, so that it can be used again; never fails."""
        if (self.content_length or 0) > _DRAIN_LIMIT_BYTES or self.status == 416:
            return  # 416 of docker-registry 2.8 declares the blob's length with another body
        try:
            await self.read(_DRAIN_LIMIT_BYTES)
        except BackendError:
            return  # the connection will be closed: nothing is lost


class HttpClient:
    """Sends requests over kept-alive connections. Use as an async context manager.

    Redirects, credentials and retries are the caller's. Proxies come from the environment.
    """

    def __init__(self, options: HttpOptions) -> None:
        self._options = options
        self._client: httpx.AsyncClient | None = None
        self._counters = _Counters()

    def statistics(self) -> HttpStatistics:
        """What this client has sent and received."""
        counters = self._counters
        return HttpStatistics(counters.requests, counters.sent_bytes, counters.received_bytes)

    async def __aenter__(self) -> Self:
        context = await trio.to_thread.run_sync(_tls_context, self._options)  # reads a CA bundle: 30 ms
        self._client = self._make_client(context)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        client, self._client = self._client, None
        if client is not None:
            with trio.CancelScope(shield=True):
                await client.aclose()

    def _make_client(self, context: ssl.SSLContext) -> httpx.AsyncClient:
        options = self._options
        # No cookies: a jar shares them between the ports of one host.
        cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
        return httpx.AsyncClient(
            verify=context,
            limits=httpx.Limits(max_connections=options.connections, keepalive_expiry=30.0),
            headers={"User-Agent": "nydus-py", "Accept": "*/*", "Accept-Encoding": "identity"},
            cookies=cookies,
            mounts=dict.fromkeys(_LOOPBACK_PROXIES_OFF, None),
        )

    @asynccontextmanager
    async def exchange(self, request: HttpRequest) -> AsyncIterator[HttpResponse]:
        """Sends `request`; the answer's body can be read inside the block, and need not be.

        Raises `ConnectionFailed`, `Stalled`, `TlsFailed` and `RegistryProtocolError`; a status is no error.
        """
        if self._client is None:
            raise BackendError(where=display_url(request.url), why="the connection has been closed")
        where = display_url(request.url)
        with closing(_Body(request.body, self._counters)) as body:
            with _translated(where):
                outgoing = self._outgoing(self._client, request, body, where)
                self._counters.requests += 1
                response = await self._client.send(outgoing, stream=True, follow_redirects=False)
            try:
                yield HttpResponse(response, self._counters)
            finally:
                with _translated(where):
                    await response.aclose()

    def _outgoing(
        self, client: httpx.AsyncClient, request: HttpRequest, body: "_Body", where: str
    ) -> httpx.Request:
        try:
            outgoing = client.build_request(
                request.method,
                request.url,
                headers=list(request.headers),
                timeout=_timeout(self._options.timeouts, request.connect_s),
            )
        except httpx.InvalidURL as error:
            raise RegistryProtocolError(where=where, why=f"bad address: {error}") from None
        if request.body or request.method in ("POST", "PUT", "PATCH"):
            outgoing.headers["Content-Length"] = str(len(request.body))
            outgoing.stream = body
        return outgoing


def _timeout(timeouts: HttpTimeouts, connect_s: float | None) -> httpx.Timeout:
    """Waiting for a free connection has no limit: it is not the server's fault."""
    return httpx.Timeout(
        connect=connect_s or timeouts.connect_s, read=timeouts.read_s, write=timeouts.write_s, pool=None
    )


class _Body(httpx.AsyncByteStream):
    """A request body in pieces. No generator: one that a broken connection abandons is never closed."""

    def __init__(self, body: bytes | memoryview, counters: _Counters) -> None:
        self._view = memoryview(body)
        self._counters = counters
        self._position = 0

    def __aiter__(self) -> Self:
        self._position = 0
        return self

    def close(self) -> None:
        """Lets go of the bytes at once: the request is part of a cycle and waits for the collector."""
        self._view = memoryview(b"")

    async def __anext__(self) -> bytes:
        piece = self._view[self._position : self._position + _SEND_PIECE_BYTES]
        if not piece:
            raise StopAsyncIteration
        self._position += len(piece)
        self._counters.sent_bytes += len(piece)
        return bytes(piece)


def _tls_context(options: HttpOptions) -> ssl.SSLContext:
    if options.ssl_context is not None:
        return options.ssl_context
    context = ssl.create_default_context()
    if options.insecure_skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif options.ca_file is not None:
        try:
            context.load_verify_locations(cafile=options.ca_file)
        except (OSError, ssl.SSLError) as error:
            why = error.strerror if isinstance(error, FileNotFoundError) else "no PEM certificates in it"
            raise TlsFailed(where=str(options.ca_file), why=f"cannot use this CA file: {why}") from error
    return context


@contextmanager
def _translated(where: str) -> Iterator[None]:
    """The one boundary at which httpx's exceptions become ours."""
    try:
        yield
    except httpx.TimeoutException as error:
        if isinstance(error, httpx.ConnectTimeout):
            raise Stalled(
                where=where, why="no connection within the time allowed; is the host reachable?"
            ) from error
        raise Stalled(where=where, why="the server went silent in the middle of an exchange") from error
    except httpx.UnsupportedProtocol as error:
        raise RegistryProtocolError(where=where, why="not an http or https address") from error
    except httpx.NetworkError as error:
        raise _network_error(where, error) from error
    except httpx.RemoteProtocolError as error:
        if isinstance(error.__context__, httpx.InvalidURL):  # httpx reads Location, whoever follows it
            raise RegistryProtocolError(where=where, why="names a location that is no address") from error
        # A body that ends early and a connection that closes before the head look the same: try again.
        raise ConnectionFailed(where=where, why=f"broken off by the server ({error})") from error
    except (httpx.HTTPError, httpx.StreamError) as error:
        raise RegistryProtocolError(
            where=where, why=f"HTTP failed: {error or type(error).__name__}"
        ) from error


def _network_error(where: str, error: httpx.NetworkError) -> BackendError:
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return TlsFailed(
                where=where,
                why=f"the server's certificate is not trusted ({cause.verify_message}); "
                "name the authority that signed it with --ca-file",
                untrusted=True,
            )
        if isinstance(cause, ssl.SSLError):
            return TlsFailed(where=where, why=_tls_reason(cause))
        if isinstance(cause, socket.gaierror):
            return ConnectionFailed(where=where, why=f"the host name does not resolve ({cause.strerror})")
        if isinstance(cause, OSError) and cause.errno is not None:
            doing = "connect" if isinstance(error, httpx.ConnectError) else "go on"
            return ConnectionFailed(where=where, why=f"cannot {doing}: {os.strerror(cause.errno).lower()}")
    return ConnectionFailed(where=where, why="the connection broke")


def _tls_reason(error: ssl.SSLError) -> str:
    if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
        return "the server does not speak TLS; if plain HTTP is meant, allow it with --plain-http"
    return f"TLS failed ({error.reason or 'no reason given'})"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Everything that led to `error`, members of groups included."""
    pending: list[BaseException] = [error]
    seen: set[int] = set()
    while pending:
        current = pending.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        if isinstance(current, BaseExceptionGroup):
            pending.extend(current.exceptions)
        pending.extend(link for link in (current.__cause__, current.__context__) if link is not None)
