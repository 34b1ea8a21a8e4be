"""What all connections of one upload server share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import trio

from backend.peers.page_cache import PageCache
from backend.peers.served import Admission, Pace, Shelf
from backend.peers.server_counters import ServerCounters
from backend.peers.server_options import ServerOptions

Authorize = Callable[[Mapping[str, Any] | None], None]
"""Given the certificate of a client, as `getpeercert()` gives it."""


@dataclass(frozen=True, slots=True)
class Site:
    """The parts of the host that the server works with, its limits, its counters and its tasks.

    `slice_bytes`: the most that `pace` lets through in one go without lumps. `authorize`
    raises `CertificateRefused` for clients that are not to be served.
    """

    shelf: Shelf
    admission: Admission
    pace: Pace
    options: ServerOptions
    counters: ServerCounters
    pages: PageCache
    nursery: trio.Nursery
    slice_bytes: Callable[[], int]
    authorize: Authorize
