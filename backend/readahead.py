"""Recognises sequential reading of a blob and says how far ahead to fetch. No I/O, no clock.

It looks at chunk numbers of the blob, not at files: a large file's chunks and the files of a directory both
lie in the blob in the order in which they are read, and every driver can ask, also one that sees no files.
As in Linux, the first chunk of each window carries a marker: whoever reads it asks for the next
window, so that the reader never has to wait at a window's end.
"""

from collections import deque
from dataclasses import dataclass

from backend.link_rate import LinkRate

WINDOW_MIN_BYTES = 1 << 20
WINDOW_LEAST_BYTES = 256 << 10
"""The first window where the largest one is small: the files of one directory, and not of those behind it."""
WINDOW_MAX_BYTES = 16 << 20
WINDOW_SURE_BYTES = 4 << 20
AHEAD_S = 0.5
"""More than what the link brings in that time does not keep it any busier, and may be wanted by nobody: on a
link of 100 Mbit/s a window of 16 MiB stands for over a second before what a starting program waits for."""
LOCAL_WINDOW_MAX_BYTES = 512 << 20
"""Where bytes come from a file of this machine, those that nobody wants cost no network."""
STREAMS_MAX = 16


@dataclass(slots=True)
class Stream:
    """One sequential reader: the chunk it should want next and its window in encoded bytes."""

    next_chunk: int
    window_bytes: int = 0


class Readahead:
    """The sequential readers of one blob, the least recently seen is forgotten.

    Whoever gets a stream from `on_miss` or `on_marker` fetches `stream.window_bytes` from chunk
    `stream.next_chunk` on and then calls `advance`.
    """

    def __init__(self, window_max_bytes: int = WINDOW_MAX_BYTES, link: LinkRate | None = None) -> None:
        """`link`: the one that windows go over, if it is one."""
        self._window_max_bytes = window_max_bytes
        self._link = link
        self._streams: deque[Stream] = deque(maxlen=STREAMS_MAX)
        self.markers: dict[int, Stream] = {}

    def on_miss(self, first: int, end: int) -> Stream | None:
        """Chunks `first` to `end` (exclusive) had to be fetched; the stream, when that is sequential."""
        for stream in self._streams:
            if stream.next_chunk == first:
                self._streams.remove(stream)
                self._streams.append(stream)
                stream.next_chunk = end
                return self._grown(stream)
        if len(self._streams) == STREAMS_MAX:
            self._drop_markers(self._streams[0])
        self._streams.append(Stream(end))
        return None

    def on_marker(self, chunk: int) -> Stream | None:
        """Chunk `chunk` was read; the stream whose next window is due, if the chunk carries a marker."""
        stream = self.markers.pop(chunk, None)
        return self._grown(stream) if stream is not None else None

    def advance(self, stream: Stream, end: int) -> None:
        """The window from `stream.next_chunk` to `end` (exclusive) is on its way: marks its first chunk."""
        if end > stream.next_chunk:
            self._drop_markers(stream)
            self.markers[stream.next_chunk] = stream
            stream.next_chunk = end

    def extend(self, stream: Stream, end: int) -> None:
        """More of the window that `advance` has told of is on its way; its marker stays where it is."""
        stream.next_chunk = max(stream.next_chunk, end)

    def _drop_markers(self, stream: Stream) -> None:
        for chunk in [chunk for chunk, owner in self.markers.items() if owner is stream]:
            del self.markers[chunk]

    def _grown(self, stream: Stream) -> Stream:
        most = self._max_bytes()
        first = max(WINDOW_LEAST_BYTES, WINDOW_MIN_BYTES * most // max(most, WINDOW_MAX_BYTES))
        stream.window_bytes = min(max(2 * stream.window_bytes, first), most)
        return stream

    def _max_bytes(self) -> int:
        if self._link is None or not self._link.bps:
            return self._window_max_bytes
        return min(self._window_max_bytes, max(WINDOW_SURE_BYTES, round(AHEAD_S * self._link.bps)))
