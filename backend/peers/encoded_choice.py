"""Whether to ask a host for encoded bytes in place of decoded ones. No I/O: the time is given.

Worth it where the link is what takes the time, and where this host wants to keep them itself:
docs/decisions/012-encoded-bytes-between-hosts.md.
"""

from backend.keep_mode import AUTO_SHARE
from backend.peers.wire import HostInfo
from rafs.blobmeta import BlobMeta

SLOW_BPS = 400e6
"""A host that sends faster than this sends decoded bytes sooner than they would be decoded here."""
ABSENT_S = 5.0
"""A host that had not what was asked for encoded is not asked so for this long; decoded it may have it."""


class EncodedChoice:
    """The choices for one blob."""

    def __init__(self, meta: BlobMeta) -> None:
        self._absent_until: dict[str, float] = {}
        self._compresses_well = _encoded_share(meta) <= AUTO_SHARE

    def is_better(self, host: HostInfo, rate_bps: float, now: float, *, keeps: bool) -> bool:
        """`rate_bps` is what the host was measured to send, 0 when unknown; `keeps`: this host keeps them."""
        if not host.keeps_encoded or now < self._absent_until.get(host.id, 0.0):
            return False
        return keeps or (self._compresses_well and rate_bps < SLOW_BPS)

    def note_absent(self, host: HostInfo, now: float) -> None:
        """The host had not the encoded bytes that it was asked for."""
        self._absent_until[host.id] = now + ABSENT_S


def _encoded_share(meta: BlobMeta) -> float:
    """Encoded bytes for each decoded one, by where the last chunk lies."""
    if not meta.count:
        return 1.0
    last = meta.chunk(meta.count - 1)
    extent = meta.extent_of(last)
    decoded = last.uncompressed_offset + last.uncompressed_size
    return (extent.compressed_offset + extent.compressed_size) / max(1, decoded)
