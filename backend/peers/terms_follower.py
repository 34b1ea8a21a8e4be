"""Hears of limits and of the switch the moment a scheduler is told them: a request that is answered then.

Concurrency: `follow_terms` is one task. It does not end when the scheduler does: it asks again after a pause
that differs from host to host, so that a scheduler which comes back is not asked by all at once.
"""

import logging
import random
import ssl
from collections.abc import Callable

import msgspec
import trio

from backend.contract import BackendError
from backend.http import HttpClient, HttpOptions, HttpRequest, HttpTimeouts
from backend.peers.wire import TERMS_TARGET, Terms

log = logging.getLogger(__name__)

HELD_S = 30.0
"""Longer than a scheduler holds an answer back."""
CONNECT_S = 2.0
RETRY_S = (0.5, 2.0)
TERMS_MAX_BYTES = 64 << 10


async def follow_terms(
    url: str,
    context: ssl.SSLContext | None,
    take: Callable[[Terms], None],
    chance: random.Random | None = None,
) -> None:
    """Calls `take` with what counts now, and after each change, until cancelled."""
    chance = chance or random.Random()
    seen = -1
    options = HttpOptions(ssl_context=context, timeouts=HttpTimeouts(read_s=HELD_S))
    async with HttpClient(options) as http:
        while True:
            try:
                terms = await _watch(http, url.rstrip("/"), seen)
                seen = terms.version
                take(terms)
            except (BackendError, msgspec.DecodeError, trio.TooSlowError) as error:
                log.info("terms of %s: %s", url, error)
                seen = -1
                await trio.sleep(chance.uniform(*RETRY_S))


async def _watch(http: HttpClient, url: str, seen: int) -> Terms:
    request = HttpRequest("GET", f"{url}{TERMS_TARGET}?seen={seen}", [], connect_s=CONNECT_S)
    with trio.fail_after(HELD_S):
        async with http.exchange(request) as response:
            data = await response.read(TERMS_MAX_BYTES)
            if response.status != 200:
                raise msgspec.DecodeError(f"status {response.status}")
    return msgspec.json.decode(data, type=Terms)
