"""The upload server: gives other hosts the ranges of blobs that this host has, over HTTP/1.1.

`GET|HEAD /v1/blobs/<id>/decoded` are the bytes of the decoded cache file; `/v2/<name>/blobs/sha256:<id>` are
those of the registry, for peers and every client of registries. docs/notes/peer_server.md has the protocol.

Concurrency: one task accepts, one serves each connection. They share the counters and the door, which have no
checkpoints. A connection that is cancelled, stalls or fails ends alone.
"""

import contextlib
import errno
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable

import trio

from backend.peers.body import SLICE_BYTES
from backend.peers.connection import serve_connection
from backend.peers.page_cache import PageCache
from backend.peers.refusal import Dropped, Refusal
from backend.peers.served import Admission, Pace, Shelf
from backend.peers.server_counters import ServerCounters
from backend.peers.server_options import ServerOptions
from backend.peers.site import Authorize, Site
from backend.peers.tls_transport import TlsTransport
from backend.peers.transport import PlainTransport

log = logging.getLogger(__name__)

ACCEPTED_AT_ONCE = 32
SHORTAGE_PAUSE_S = 0.1
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
NO_ROOM = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
)


async def serve_peers(
    listener: socket.socket,
    shelf: Shelf,
    admission: Admission,
    pace: Pace,
    options: ServerOptions,
    counters: ServerCounters,
    *,
    slice_bytes: Callable[[], int] = lambda: SLICE_BYTES,
    ssl_context: ssl.SSLContext | None = None,
    authorize: Authorize = lambda certificate: None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves on a listening socket until cancelled. The socket stays open: who has made it closes it."""
    pages = PageCache(options.disk_threads, counters)
    listener.setblocking(False)
    async with trio.open_nursery() as nursery:
        site = Site(shelf, admission, pace, options, counters, pages, nursery, slice_bytes, authorize)
        server = _Server(site, ssl_context)
        task_status.started()
        while True:
            await trio.lowlevel.wait_readable(listener)
            if not server.accept(listener):
                await trio.sleep(SHORTAGE_PAUSE_S)


class _Server:
    def __init__(self, site: Site, ssl_context: ssl.SSLContext | None) -> None:
        self._site = site
        self._ssl_context = ssl_context
        self._by_peer: Counter[str] = Counter()
        self._short = False

    def accept(self, listener: socket.socket) -> bool:
        """Takes the clients that wait; False when the host lacks something that a connection needs."""
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in SHORTAGES:
                    self._note_shortage(error)
                    return False
                continue  # the client has gone: accept(2) gives its error to us
            self._short = False
            self._admit(sock, address[0].removeprefix("::ffff:"))
        return True

    def _note_shortage(self, error: OSError) -> None:
        if not self._short:
            log.warning("peers cannot connect: %s; raise the limit of open files", error.strerror)
        self._short = True

    def _admit(self, sock: socket.socket, peer: str) -> None:
        counters, options = self._site.counters, self._site.options
        if counters.connections >= options.connections_max:
            self._turn_away(sock, Refusal.CONNECTIONS)
        elif self._by_peer[peer] >= options.connections_of_peer_max:
            self._turn_away(sock, Refusal.CONNECTIONS_OF_PEER)
        else:
            counters.connections += 1
            counters.connections_made += 1
            self._by_peer[peer] += 1
            self._site.nursery.start_soon(self._serve, sock, peer)

    def _turn_away(self, sock: socket.socket, refusal: Refusal) -> None:
        self._site.counters.refuse(refusal)
        with sock, contextlib.suppress(OSError):
            sock.setblocking(False)
            if self._ssl_context is None:
                sock.send(NO_ROOM)

    async def _serve(self, sock: socket.socket, peer: str) -> None:
        try:
            if self._ssl_context is None:
                timeout_s = self._site.options.slice_timeout_s
                await serve_connection(PlainTransport(sock, peer, timeout_s, self._site.pages), self._site)
            else:
                await self._serve_tls(sock, peer, self._ssl_context)
        except OSError:
            pass  # gone before it was served
        finally:
            sock.close()
            self._site.counters.connections -= 1
            self._by_peer[peer] -= 1
            if not self._by_peer[peer]:
                del self._by_peer[peer]

    async def _serve_tls(self, sock: socket.socket, peer: str, context: ssl.SSLContext) -> None:
        options = self._site.options
        transport = TlsTransport(sock, peer, options.slice_timeout_s, self._site.pages, context)
        try:
            with trio.fail_after(options.head_timeout_s):
                await transport.handshake()
        except (OSError, Dropped, trio.TooSlowError):
            self._site.counters.refuse(Refusal.TLS)
            return
        await serve_connection(transport, self._site)
