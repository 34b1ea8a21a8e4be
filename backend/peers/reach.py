"""Connects to another host, or finds that there is none, within a second and through a full link.

On a full link the first packet of a connection may be lost, and the kernel sends it again after a second
only: so further attempts start meanwhile, and the first that succeeds counts. It is the other kernel that
answers: a host counts as dead when that does not, however busy its processes are.

However busy this host is, too: a loop that comes late has not looked whether there was an answer, so that
time does not count.
"""

import errno
import os
import socket
from collections.abc import Callable
from contextlib import suppress

import trio

PATIENCE_S = 0.9
ATTEMPT_PAUSE_S = 0.15
LATE_S = 0.1
"""A loop that wakes up so much after it wanted to was late: something else had the processor."""
LATE_TRIES = 5


def nothing() -> None:
    """For those who need not hear of it."""


async def reach(host: str, port: int, on_late: Callable[[], None] = nothing) -> socket.socket:
    """A connected socket that does not block.

    Raises `OSError`; `TimeoutError` after `PATIENCE_S` in which this loop was not late. `on_late` is called
    for each time that does not count.
    """
    for _ in range(LATE_TRIES):
        due = trio.current_time() + PATIENCE_S
        try:
            return await _reach(host, port)
        except TimeoutError:
            if trio.current_time() < due + LATE_S:
                raise
            on_late()
    return await _reach(host, port)


async def _reach(host: str, port: int) -> socket.socket:
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, kind, protocol, _, address = found[0]
    connected: list[socket.socket] = []
    failures: list[OSError] = []

    async def attempt(scope: trio.CancelScope) -> None:
        plain = socket.socket(family, kind, protocol)
        try:
            plain.setblocking(False)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with suppress(BlockingIOError):
                plain.connect(address)
            await trio.lowlevel.wait_writable(plain)
            code = plain.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
            connected.append(plain)
        except OSError as error:
            failures.append(error)  # refused, say: more attempts tell nothing new
        finally:
            if plain not in connected[:1]:
                plain.close()
        scope.cancel()

    with trio.move_on_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            while True:
                nursery.start_soon(attempt, nursery.cancel_scope)
                await trio.sleep(ATTEMPT_PAUSE_S)
    if connected:
        return connected[0]
    if failures:
        raise failures[0]
    raise TimeoutError(errno.ETIMEDOUT, f"no answer within {PATIENCE_S:g} s")


async def is_reachable(host: str, port: int, on_late: Callable[[], None] = nothing) -> bool:
    """Whether something listens there."""
    try:
        (await reach(host, port, on_late)).close()
    except OSError:
        return False
    return True
