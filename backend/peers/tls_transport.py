"""A connection with TLS: the ssl module between two memory buffers, the socket beside it.

Concurrency: as `transport`.
"""

import contextlib
import itertools
import socket
import ssl
from collections.abc import Mapping
from typing import Any

import trio

from backend.peers.page_cache import PageCache
from backend.peers.refusal import Dropped, Refusal
from backend.peers.transport import (
    RECEIVE_BYTES,
    abort_socket,
    close_socket,
    prepare_socket,
    receive_some,
    send_all,
    wait_gone,
)

STEP_BYTES = 64 << 10  # read, encrypted and sent at a time


class TlsTransport:
    """A socket with TLS. `peer` is the name in the client's certificate once `handshake` has returned."""

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        slice_timeout_s: float,
        pages: PageCache,
        context: ssl.SSLContext,
    ) -> None:
        self.peer = peer
        self.certificate: Mapping[str, Any] | None = None
        self._socket = sock
        self._slice_timeout_s = slice_timeout_s
        self._pages = pages
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        prepare_socket(sock)

    async def handshake(self) -> None:
        """Greets the client. Raises `ssl.SSLError`, `OSError` and `Dropped`."""
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._flush()
                await self._feed()
            except ssl.SSLError:
                with contextlib.suppress(Dropped):
                    await self._flush()  # the alert says why
                raise
        await self._flush()
        self.certificate = self._tls.getpeercert()
        self.peer = _certified_name(self.certificate) or self.peer

    async def receive(self) -> bytes:
        """As in `Transport`."""
        while True:
            try:
                return self._tls.read(RECEIVE_BYTES)
            except ssl.SSLWantReadError:
                await self._feed()
            except ssl.SSLZeroReturnError:
                return b""

    async def send(self, data: bytes | bytearray | memoryview, *, more: bool = False) -> None:
        """As in `Transport`. With `more` the bytes wait for what follows."""
        self._write(data)
        if not more:
            await self._flush()

    async def send_file(self, descriptor: int, offset: int, end: int, *, more: bool = False) -> None:
        """As in `Transport`."""
        buffer = memoryview(bytearray(min(STEP_BYTES, end - offset)))
        deadline = trio.current_time() + self._slice_timeout_s
        while offset < end:
            step = buffer[: end - offset]
            try:
                await self._pages.fill(descriptor, step, offset)
            except EOFError:
                raise Dropped(Refusal.TORN) from None
            self._write(step)
            await self._flush(deadline - trio.current_time())
            offset += len(step)
        await trio.lowlevel.checkpoint()

    async def gone(self) -> None:
        """As in `Transport`."""
        await wait_gone(self._socket)

    async def close(self, *, listen: bool = False) -> None:
        """As in `Transport`; says goodbye, so that the client knows that nothing was cut off."""
        with contextlib.suppress(ssl.SSLError, Dropped):
            with contextlib.suppress(ssl.SSLWantReadError):
                self._tls.unwrap()
            await self._flush()
        await close_socket(self._socket, listen=listen)

    def abort(self) -> None:
        """As in `Transport`."""
        abort_socket(self._socket)

    def _write(self, data: bytes | bytearray | memoryview) -> None:
        try:
            self._tls.write(data)
        except ssl.SSLError as error:
            raise Dropped(Refusal.GONE) from error

    async def _flush(self, timeout_s: float | None = None) -> None:
        if data := self._outgoing.read():
            await send_all(self._socket, data, self._slice_timeout_s if timeout_s is None else timeout_s)

    async def _feed(self) -> None:
        data = await receive_some(self._socket)
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()


def _certified_name(certificate: Mapping[str, Any] | None) -> str | None:
    """The first DNS name of the client's certificate, else its common name; None without a certificate."""
    if not certificate:
        return None
    names = [name for kind, name in certificate.get("subjectAltName", ()) if kind == "DNS"]
    subject = itertools.chain.from_iterable(certificate.get("subject", ()))
    names += [value for key, value in subject if key == "commonName"]
    return str(names[0]) if names else None
