"""Whether what a host tells a scheduler can be true at all. No I/O.

What is told of a host goes to all others of its scope: without bounds one host could make the answers to all
of them larger than they take.
"""

from collections.abc import Iterator

import msgspec

from backend.peers.limit_settings import LIMIT_MAX
from backend.peers.wire import Announce, HostInfo

BLOBS_MAX = 4096
"""Of one host, at a time."""
PIECES_MAX = 1 << 16
"""Of a blob: 4 TiB in the largest pieces."""
LABELS_MAX = 64
TEXT_MAX = 256
"""Characters of an id, an URL, a zone, a label's name or its value."""
BLOB_ID_MAX = 128
COUNT_MAX = 1 << 60
"""Bytes that a host can have moved: 11 years at 25 Gbit/s."""


def fault_of(announce: Announce) -> str:
    """Why an announcement is to be refused; "" when it may be true."""
    return next(_faults(announce), "")


def _faults(announce: Announce) -> Iterator[str]:
    if why := _host_fault(announce.host):
        yield why
    if max(len(announce.holdings), len(announce.wanted), len(announce.dropped)) > BLOBS_MAX:
        yield f"more than {BLOBS_MAX} blobs"
    wants = announce.origin_wants
    if any(each is not None and not 0 <= each <= LIMIT_MAX for each in msgspec.structs.astuple(wants)):
        yield "it wants of the origin what nobody can give"
    counts = (*msgspec.structs.astuple(announce.traffic), announce.uploads)
    if not all(0 <= each <= COUNT_MAX for each in counts):
        yield "it has moved what nobody can move"
    for holding in announce.holdings:
        if not 0 <= holding.pieces <= PIECES_MAX or len(holding.blob_id) > BLOB_ID_MAX:
            yield f"a blob of {holding.pieces} pieces"
        if any(not 0 <= piece < holding.pieces for piece in holding.added):
            yield "a piece outside of its blob"


def _host_fault(host: HostInfo) -> str:
    if not 0 < len(host.id) <= TEXT_MAX or len(host.labels) > LABELS_MAX:
        return f"a name of 1 to {TEXT_MAX} characters and at most {LABELS_MAX} labels are needed"
    texts = (host.id, host.url, host.zone, *host.labels, *host.labels.values())
    if not all(len(text) <= TEXT_MAX and text.isprintable() for text in texts):
        return f"what it says of itself is not printable, or longer than {TEXT_MAX} characters"
    return ""
