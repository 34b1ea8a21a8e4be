"""Answers scrapers at an address of their own, because they cannot ask at the agent's socket.

Concurrency: one task, which does not end for anything that is wrong with the address.
"""

import logging
import socket

import trio

from backend.json_api import Handler, serve_api
from backend.metrics import METRICS_TARGET
from backend.peers.listen import listen_at

log = logging.getLogger(__name__)

AGAIN_S = 5.0


async def serve_metrics(address: str, handler: Handler) -> None:
    """Answers at `[ADDRESS]:PORT` until cancelled; tries on while somebody else has it."""
    complaint = ""
    while True:
        listener: socket.socket | None = None
        try:
            # The agent before this one may have it for a moment more.
            listener = listen_at(address, reuse_port=True)
        except (OSError, ValueError, OverflowError) as error:
            if str(error) != complaint:
                complaint = str(error)
                log.warning("metrics are not served at %s: %s", address, error)
        if listener is None:
            await trio.sleep(AGAIN_S)
        else:
            await serve_api(listener, {("GET", METRICS_TARGET): handler})
