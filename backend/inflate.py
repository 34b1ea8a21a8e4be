"""Inflates a gzip stream that comes piece by piece, in bounded memory."""

from collections.abc import Iterator
from typing import cast

from isal import igzip_lib

_STEP_BYTES = 1 << 20
# The stub declares it as an instance; it is the class.
_GzipError = cast(type[Exception], igzip_lib.error)


class GzipBroken(Exception):
    """What is wrong with a gzip stream; who feeds it knows whose it is."""


class GzipInflater:
    """Inflates gzip members one after the other, never giving more than 1 MiB at once.

    With `limit_bytes`, a stream that becomes more than that is broken.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self._limit_bytes = limit_bytes
        self._decoder: igzip_lib.IgzipDecompressor | None = None
        self._given_bytes = 0

    @property
    def is_complete(self) -> bool:
        """Whether what was fed so far is a whole stream with something in it."""
        return self._given_bytes > 0 and self._decoder is None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What the next bytes of the stream inflate to. Raises `GzipBroken`."""
        while data:
            if self._decoder is None:
                self._decoder = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
            yield from self._drain(self._decoder, data)
            data = b""
            if self._decoder.eof:
                data, self._decoder = self._decoder.unused_data, None

    def _drain(self, decoder: igzip_lib.IgzipDecompressor, data: bytes) -> Iterator[bytes]:
        while True:
            try:
                plain, data = decoder.decompress(data, _STEP_BYTES), b""
            except _GzipError as error:
                raise GzipBroken(str(error)) from error
            self._given_bytes += len(plain)
            if self._limit_bytes is not None and self._given_bytes > self._limit_bytes:
                raise GzipBroken(f"unpacks to more than {self._limit_bytes} bytes")
            if plain:
                yield plain
            if decoder.eof or decoder.needs_input:
                return
