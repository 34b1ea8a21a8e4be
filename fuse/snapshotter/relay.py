"""Hands on the connections of a listening socket that outlives this process.

A service manager that holds the socket (systemd, sd_listen_fds(3)) keeps whoever connects waiting while this
process is being replaced, where it would be refused otherwise; containerd then fails all calls for some
seconds. gRPC cannot be given a socket, so it listens on one of its own, and bytes are carried between the
two.

Concurrency: one task for each connection, with one for each direction.
"""

import socket
from contextlib import suppress
from pathlib import Path

import trio

from fuse.supervisor.listener import short_address

STEP_BYTES = 64 << 10
_GONE = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)


async def relay(listener: socket.socket, target: Path) -> None:
    """Takes connections from `listener`, each to a connection of its own to `target`, until cancelled."""

    async def carry(client: trio.SocketStream) -> None:
        async with client:
            with suppress(*_GONE):
                with short_address(target) as address:
                    server = await trio.open_unix_socket(address)
                async with server, trio.open_nursery() as nursery:
                    nursery.start_soon(_pump, client, server, nursery.cancel_scope)
                    nursery.start_soon(_pump, server, client, nursery.cancel_scope)

    listener.setblocking(False)
    async with trio.SocketListener(trio.socket.from_stdlib_socket(listener)) as accepting:
        await trio.serve_listeners(carry, [accepting])


async def _pump(source: trio.SocketStream, target: trio.SocketStream, both: trio.CancelScope) -> None:
    """HTTP/2 has no half of a connection: when one side ends, the other has nothing to say either."""
    with suppress(*_GONE):
        while data := await source.receive_some(STEP_BYTES):
            await target.send_all(data)
    both.cancel()
