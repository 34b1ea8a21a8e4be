"""Counters of what a mount has fetched."""

import msgspec


class FetchStatistics(msgspec.Struct, frozen=True):
    """Counters since the mount started. Bytes fetched are encoded ones; hits, misses and waits are reads.

    `bytes_copied` are decoded ones that were not fetched, because another blob's cache file had them; those
    from peers are decoded too.
    """

    bytes_fetched: int = 0
    requests: int = 0
    chunks_stored: int = 0
    hits: int = 0
    misses: int = 0
    waits: int = 0
    errors: int = 0
    bytes_copied: int = 0
    bytes_from_peers: int = 0

    def __add__(self, other: "FetchStatistics") -> "FetchStatistics":
        pairs = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True)
        return FetchStatistics(*(a + b for a, b in pairs))
