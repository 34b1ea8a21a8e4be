"""The diff ID of a layer: the SHA-256 of its tar, which is taken while somebody else reads that.

Concurrency: the reader hands pieces on; a thread digests one while the reader goes on to the next. hashlib
lets go of the interpreter's lock meanwhile.
"""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, Self

_PIECE_BYTES = 1 << 20
"""Handing something to a thread takes as long as digesting 50 KB of it."""


class Readable(Protocol):
    """What bytes come from."""

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes; b"" at the end."""
        ...


class ContentDigest:
    """Digests what it is given, in order. A context manager. Holds some MiB at most."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._parts: list[bytes] = []
        self._size = 0
        self._running: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()

    def update(self, data: bytes) -> None:
        """The next bytes."""
        self._parts.append(data)
        self._size += len(data)
        if self._size >= _PIECE_BYTES:
            self._hand_on()

    def diff_id(self) -> str:
        """Of all that was given, as configs have it: `sha256:` and 64 hexadecimal digits."""
        self._hand_on()
        self._wait()
        return f"sha256:{self._hash.hexdigest()}"

    def _hand_on(self) -> None:
        piece = b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        self._wait()
        self._running = self._thread.submit(self._hash.update, piece)

    def _wait(self) -> None:
        if self._running is not None:
            self._running.result()


class DigestedStream:
    """A stream whose bytes go into a digest as they are read."""

    def __init__(self, stream: Readable, digest: ContentDigest) -> None:
        self._stream = stream
        self._digest = digest

    def read(self, size: int = -1) -> bytes:
        """As the stream's own."""
        data = self._stream.read(size)
        self._digest.update(data)
        return data
