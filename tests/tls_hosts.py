"""Hosts with certificates, and TLS connections between them on loopback."""

import contextlib
import ssl
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import trio

from backend.peers.certificate import AUTHORITY_DAYS, HostWish, utc_now
from backend.peers.identity import CertificateRefused, PeerIdentity, peer_identity
from backend.peers.pki import create_authority, issue_certificate
from backend.peers.tls import PeerTls, TlsFiles
from backend.peers.tls_failure import tls_failure

LOOPBACK = "127.0.0.1"

Outcome = PeerIdentity | CertificateRefused
"""Whom one end of a connection has met, or why it has not."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """An authority in a directory of its own."""

    directory: Path

    @classmethod
    def create(cls, directory: Path, now: datetime | None = None) -> "Cluster":
        create_authority(directory, "test", AUTHORITY_DAYS, now or utc_now())
        return cls(directory)

    def issue(
        self,
        name: str,
        *,
        scopes: tuple[str, ...] = (),
        addresses: tuple[str, ...] = (LOOPBACK,),
        days: int = 7,
        now: datetime | None = None,
    ) -> TlsFiles:
        """The files of a host; `now` is the clock of the authority."""
        out = self.directory.parent / f"{self.directory.name}-{name}"
        issue_certificate(self.directory, HostWish(name, scopes, addresses, days), out, now or utc_now())
        return TlsFiles.in_directory(out)

    def host(self, name: str, *, clock: datetime | None = None, **wishes: tuple[str, ...]) -> PeerTls:
        """A host with a certificate issued at `clock`, which it takes for the time."""
        moment = clock or utc_now()
        return PeerTls(self.issue(name, now=moment, **wishes), now=lambda: moment)  # type: ignore[arg-type]


class Secured:
    """A socket with TLS whose last words, the alert, are sent also when the handshake fails."""

    def __init__(self, sock: trio.SocketStream, context: ssl.SSLContext, server_hostname: str | None) -> None:
        self._socket = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        is_server = server_hostname is None
        self.tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=is_server, server_hostname=server_hostname
        )

    async def handshake(self) -> None:
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._feed()
            else:
                await self._flush()
                return

    async def send(self, data: bytes) -> None:
        self.tls.write(data)
        await self._flush()

    async def receive(self) -> bytes:
        while True:
            try:
                return self.tls.read(1 << 16)
            except ssl.SSLWantReadError:
                await self._feed()

    async def close(self) -> None:
        """Sends what is left, an alert perhaps, and reads to the end, so that no reset overtakes it."""
        with contextlib.suppress(trio.BrokenResourceError):
            await self._flush()
            await self._socket.send_eof()
            while await self._socket.receive_some():
                pass
        await self._socket.aclose()

    async def _feed(self) -> None:
        await self._flush()
        data = await self._socket.receive_some()
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    async def _flush(self) -> None:
        if data := self._outgoing.read():
            await self._socket.send_all(data)


async def meet(
    server: ssl.SSLContext, client: ssl.SSLContext, called: str = LOOPBACK
) -> tuple[Outcome, Outcome]:
    """Connects `client` to `server`; what each end has seen. `called` is how the client calls the server."""
    outcomes: dict[str, Outcome] = {}
    with trio.fail_after(10):
        (listener,) = await trio.open_tcp_listeners(0, host=LOOPBACK)
        port = listener.socket.getsockname()[1]
        async with listener, trio.open_nursery() as nursery:
            nursery.start_soon(_serve, listener, server, outcomes)
            sock = await trio.open_tcp_stream(LOOPBACK, port)
            outcomes["client"] = await _talk(Secured(sock, client, called), "server")
    return outcomes["server"], outcomes["client"]


async def _serve(
    listener: trio.SocketListener, context: ssl.SSLContext, outcomes: dict[str, Outcome]
) -> None:
    outcomes["server"] = await _talk(Secured(await listener.accept(), context, None), "client")


async def _talk(secured: Secured, peer: str) -> Outcome:
    try:
        await secured.handshake()
        await secured.send(b"hello")
        assert await secured.receive() == b"hello"
        return peer_identity(secured.tls.getpeercert(), peer)
    except (ssl.SSLError, trio.BrokenResourceError) as error:
        return tls_failure(error, peer)
    finally:
        await secured.close()
