"""Waits for bytes that are still on their way to this host, for a client that may lose patience.

A client that closes its connection wants the bytes from elsewhere: what waits for it here, and the place
that its admission holds, are given up at once.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence

import trio

from backend.peers.ranges import Span
from backend.peers.refusal import Dropped, Refusal
from backend.peers.served import NotAvailable, ServedFile
from backend.peers.transport import Transport

log = logging.getLogger(__name__)


@contextlib.contextmanager
def all_asked_for(file: ServedFile, spans: Sequence[Span], nursery: trio.Nursery) -> Iterator[None]:
    """Has all that is missing of `spans` fetched at once, for the time of the block.

    The sender waits for one span after the other, and a file fetches what somebody waits for.
    """
    missing = [span for span in spans if file.ready_until(span.offset, span.end) < span.end]
    if len(missing) < 2:
        yield
        return
    scope = trio.CancelScope()
    nursery.start_soon(_ask_for_all, file, missing, scope)
    try:
        yield
    finally:
        scope.cancel()


async def _ask_for_all(file: ServedFile, spans: Sequence[Span], scope: trio.CancelScope) -> None:
    with scope:
        async with trio.open_nursery() as nursery:
            for span in spans:
                nursery.start_soon(_ask_for, file, span)


async def _ask_for(file: ServedFile, span: Span) -> None:
    try:
        await file.wait_ready(span.offset, span.end)
    except NotAvailable:
        pass  # the sender learns it when it comes to this span
    except Exception:
        log.exception("fault while asking for bytes %d to %d", span.offset, span.end)


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
