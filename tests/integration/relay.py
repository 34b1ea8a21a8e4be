"""A relay on loopback that breaks one connection in the middle of an upload."""

import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio


class Relay:
    """Forwards to `target`; the second PATCH is cut, once, after so many bytes of it were forwarded."""

    def __init__(self, target: str, cut_second_patch_after: int) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._cut_after = cut_second_patch_after
        self._patches = 0
        self.begun = 0
        self.was_cut = False

    async def serve(self, *, task_status: "trio.TaskStatus[str]" = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until cancelled; starts with its own HOST:PORT."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        address = listeners[0].socket.getsockname()
        task_status.started(f"{address[0]}:{address[1]}")
        await trio.serve_listeners(self._connection, listeners)

    async def _connection(self, client: trio.SocketStream) -> None:
        async with await trio.open_tcp_stream(*self._target) as server, trio.open_nursery() as nursery:

            async def both_ways(copy: Callable[..., Awaitable[None]], *streams: trio.SocketStream) -> None:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await copy(*streams)
                nursery.cancel_scope.cancel()

            nursery.start_soon(both_ways, self._requests, client, server)
            nursery.start_soon(both_ways, self._answers, server, client)

    async def _answers(self, server: trio.SocketStream, client: trio.SocketStream) -> None:
        async for data in server:
            await client.send_all(data)

    async def _requests(self, client: trio.SocketStream, server: trio.SocketStream) -> None:
        left: int | None = None
        async for data in client:
            if data.startswith(b"POST "):
                self.begun += 1
            if data.startswith(b"PATCH "):
                self._patches += 1
                if self._patches == 2:
                    left = self._cut_after
            if left is not None:
                await server.send_all(data[:left])
                left -= len(data)
                if left <= 0:
                    self.was_cut = True
                    reset = struct.pack("ii", 1, 0)  # no lingering: close sends RST
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                    return
            else:
                await server.send_all(data)
