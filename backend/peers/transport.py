"""A connection to a client: bytes in, bytes and parts of files out, on a non-blocking socket.

Concurrency: one task uses a transport, but `gone` may wait in another one while that task neither reads nor
writes.
"""

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Mapping
from typing import Any, Protocol

import trio

from backend.peers.page_cache import PageCache, is_cached
from backend.peers.refusal import Dropped, Refusal

RECEIVE_BYTES = 16 << 10
# A slice that waits in the socket can be neither paced nor overtaken: keep few unsent bytes there.
NOTSENT_LOWAT_BYTES = 128 << 10
# The loop serves others after so many bytes, although the client takes more at once.
TURN_BYTES = 1 << 20
NO_LINGERING = struct.pack("ii", 1, 0)  # close sends RST
LAST_WORD_S = 1.0
LAST_WORD_BYTES = 256 << 10


class Transport(Protocol):
    """What the server needs of a connection; of plain sockets and of TLS. `peer` names the client.

    `certificate` is the client's, as `getpeercert()` gives it; None without TLS.
    """

    peer: str
    certificate: Mapping[str, Any] | None

    async def receive(self) -> bytes:
        """Some bytes, b"" at the end. No checkpoint when there are some already. Raises `OSError`."""

    async def send(self, data: bytes | bytearray | memoryview, *, more: bool = False) -> None:
        """Sends all; `more` says that more follows at once. Raises `Dropped`."""

    async def send_file(self, descriptor: int, offset: int, end: int, *, more: bool = False) -> None:
        """Sends [offset, end) of a file. Raises `Dropped`."""

    async def gone(self) -> None:
        """Returns when the client has closed its end; may wait for ever when it has sent something."""

    async def close(self, *, listen: bool = False) -> None:
        """Ends the connection; with `listen`, gives the client a moment to read what was sent last."""

    def abort(self) -> None:
        """Ends the connection so that the client cannot take what it has for complete."""


class PlainTransport:
    """A socket without TLS: files go out with sendfile."""

    def __init__(self, sock: socket.socket, peer: str, slice_timeout_s: float, pages: PageCache) -> None:
        self.peer = peer
        self.certificate: Mapping[str, Any] | None = None
        self._socket = sock
        self._slice_timeout_s = slice_timeout_s
        self._pages = pages
        self._unbroken_bytes = 0
        prepare_socket(sock)

    async def receive(self) -> bytes:
        """As in `Transport`."""
        return await receive_some(self._socket)

    async def send(self, data: bytes | bytearray | memoryview, *, more: bool = False) -> None:
        """As in `Transport`."""
        await send_all(self._socket, data, self._slice_timeout_s, socket.MSG_MORE if more else 0)

    async def send_file(self, descriptor: int, offset: int, end: int, *, more: bool = False) -> None:
        """As in `Transport`. sendfile pushes its last bytes: `more` saves nothing here."""
        if not is_cached(descriptor, offset, end):
            await self._pages.read_in(descriptor, offset, end)
        deadline = None
        target = self._socket.fileno()
        while offset < end:
            try:
                count = os.sendfile(target, descriptor, offset, end - offset)
            except BlockingIOError:
                self._unbroken_bytes = 0
                deadline = deadline or trio.current_time() + self._slice_timeout_s
                await wait_writable(self._socket, deadline)
            except OSError as error:
                if error.errno == errno.EIO:
                    raise  # of the disk, not of the client
                raise Dropped(Refusal.GONE) from error
            else:
                if count == 0:
                    raise Dropped(Refusal.TORN)  # the file is shorter than it was
                offset += count
                self._unbroken_bytes += count
        if self._unbroken_bytes >= TURN_BYTES:
            self._unbroken_bytes = 0
            await trio.lowlevel.checkpoint()

    async def gone(self) -> None:
        """As in `Transport`."""
        await wait_gone(self._socket)

    async def close(self, *, listen: bool = False) -> None:
        """As in `Transport`."""
        await close_socket(self._socket, listen=listen)

    def abort(self) -> None:
        """As in `Transport`."""
        abort_socket(self._socket)


def prepare_socket(sock: socket.socket) -> None:
    """What both kinds of connections want of the kernel."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_LOWAT_BYTES)


async def receive_some(sock: socket.socket) -> bytes:
    """Some bytes, b"" at the end."""
    while True:
        try:
            return sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)


async def send_all(
    sock: socket.socket, data: bytes | bytearray | memoryview, timeout_s: float, flags: int = 0
) -> None:
    """Sends all of `data` within `timeout_s`. Raises `Dropped`."""
    deadline = None
    left = memoryview(data)
    while left:
        try:
            left = left[sock.send(left, flags) :]
        except BlockingIOError:
            deadline = deadline or trio.current_time() + timeout_s
            await wait_writable(sock, deadline)
        except OSError as error:
            raise Dropped(Refusal.GONE) from error


async def wait_writable(sock: socket.socket, deadline: float) -> None:
    """Waits until the socket takes more. Raises `Dropped` when it does not until `deadline`."""
    with trio.CancelScope(deadline=deadline) as waiting:
        await trio.lowlevel.wait_writable(sock)
    if waiting.cancelled_caught:
        raise Dropped(Refusal.STALLED)


async def wait_gone(sock: socket.socket) -> None:
    """Returns when the other end is closed; waits for ever when it has sent something first."""
    while True:
        await trio.lowlevel.wait_readable(sock)
        try:
            if sock.recv(1, socket.MSG_PEEK):
                await trio.sleep_forever()
        except BlockingIOError:
            continue
        except OSError:
            pass
        return


async def close_socket(sock: socket.socket, *, listen: bool) -> None:
    """Closes it; with `listen`, not before the client has read what was sent, or a moment has passed.

    Closing a socket with unread bytes resets the connection, and the client might not see the answer.
    """
    with sock:
        if not listen:
            return
        with contextlib.suppress(OSError), trio.move_on_after(LAST_WORD_S):
            sock.shutdown(socket.SHUT_WR)
            discarded = 0
            while discarded < LAST_WORD_BYTES and (data := await receive_some(sock)):
                discarded += len(data)


def abort_socket(sock: socket.socket) -> None:
    """Closes it with a reset; what was not sent yet is thrown away."""
    with sock, contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGERING)
