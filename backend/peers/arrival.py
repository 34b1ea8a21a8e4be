"""Waits for bytes that are still on their way to this host, for a client that may lose patience.

A client that closes its connection wants the bytes from elsewhere: what waits for it here, and the place
that its admission holds, are given up at once.
"""

import contextlib

import trio

from backend.peers.refusal import Dropped, Refusal
from backend.peers.served import NotAvailable, ServedFile
from backend.peers.transport import Transport


async def wait_for_bytes(
    file: ServedFile, offset: int, end: int, transport: Transport, timeout_s: float
) -> int:
    """The end of what is there of [offset, end), more than `offset`; `offset` when it does not come in time.

    Raises `Dropped` when the client has gone.
    """
    ready, gone = offset, False

    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            nonlocal gone
            await transport.gone()
            gone = True
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        with trio.move_on_after(timeout_s):
            with contextlib.suppress(NotAvailable):
                ready = await file.wait_ready(offset, end)
        nursery.cancel_scope.cancel()
    if gone:
        raise Dropped(Refusal.GONE)
    return ready
