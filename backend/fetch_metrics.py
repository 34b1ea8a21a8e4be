"""What the fetchers of a host have done, all images together, for whoever scrapes it.

Concurrency: for the trio thread; nothing here has a checkpoint.
"""

import enum
from collections import Counter

from backend.metrics import Exposition, Histogram
from backend.priority import FetchClass


class Source(enum.StrEnum):
    """Where chunks come from."""

    CACHE = "cache"
    """Cache files of other blobs on this host."""
    PEER = "peer"
    ORIGIN = "origin"


class FetchMetrics:
    """See above."""

    def __init__(self) -> None:
        self._bytes: Counter[tuple[Source, FetchClass]] = Counter()
        self._requests = {source: Histogram() for source in (Source.PEER, Source.ORIGIN)}
        self._waits = {fetch_class: Histogram() for fetch_class in FetchClass}

    def note_bytes(self, source: Source, fetch_class: FetchClass, decoded_bytes: int) -> None:
        """Chunks have been stored."""
        self._bytes[source, fetch_class] += decoded_bytes

    def note_request(self, source: Source, duration_s: float) -> None:
        """A request was answered in full."""
        self._requests[source].observe(duration_s)

    def note_wait(self, fetch_class: FetchClass, duration_s: float) -> None:
        """Somebody has waited for chunks."""
        self._waits[fetch_class].observe(duration_s)

    def fetched(self, source: Source) -> int:
        """Decoded bytes from a source."""
        return sum(count for (each, _), count in self._bytes.items() if each is source)

    def expose(self, out: Exposition) -> None:
        """Writes all of it."""
        out.counters(
            "fetched_bytes",
            "Decoded bytes stored, by where they came from and why they were fetched.",
            [
                ({"source": source, "class": _name(fetch_class)}, self._bytes[source, fetch_class])
                for source in Source
                for fetch_class in FetchClass
            ],
        )
        out.histograms(
            "fetch_duration_seconds",
            "Time of one request, until its last byte.",
            [({"source": source}, histogram) for source, histogram in self._requests.items()],
        )
        out.histograms(
            "wait_duration_seconds",
            "Time that a read, or whatever else wanted chunks, has waited for them.",
            [({"class": _name(fetch_class)}, histogram) for fetch_class, histogram in self._waits.items()],
        )


def _name(fetch_class: FetchClass) -> str:
    return fetch_class.name.lower()
