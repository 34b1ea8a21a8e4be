"""A packed stream as it was before: plain, gzip or zstd, by how it begins."""

import contextlib
import io
from typing import IO, TYPE_CHECKING, BinaryIO, cast

import zstandard
from isal import igzip

from builder.content_digest import Readable
from builder.zstd_frames import WINDOW_MAX, WholeFrames, is_zstd

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

READ_AHEAD = 1 << 20
FRUITLESS_MAX = 64 << 20
"""Bytes in a row that unpack to less than is read at a time: empty members and blocks only cost time."""
_GZIP_MAGIC = b"\x1f\x8b"


class FruitlessStream(ValueError):
    """A stream of which too much unpacks to nothing."""


def open_unpacked(raw: BinaryIO, stack: contextlib.ExitStack) -> IO[bytes]:
    """Content of the stream `raw`, to be read once; what it takes is closed with `stack`.

    Reading raises what the libraries raise, `EOFError` and `ValueError`.
    """
    magic = raw.read(4)
    allowance = _Allowance()
    whole = stack.enter_context(io.BufferedReader(_Rejoined(magic, raw, allowance), READ_AHEAD))
    if magic.startswith(_GZIP_MAGIC):
        inflating = igzip.IGzipFile(fileobj=whole, mode="rb")  # type: ignore[no-untyped-call]
        stack.callback(inflating.close)
        return cast("IO[bytes]", _Unpacked(inflating, allowance))
    if is_zstd(magic):
        decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_MAX)
        frames = cast("IO[bytes]", WholeFrames(whole))
        reader = stack.enter_context(
            decompressor.stream_reader(frames, read_size=READ_AHEAD, read_across_frames=True, closefd=False)
        )
        return cast("IO[bytes]", _Unpacked(reader, allowance))
    return cast("IO[bytes]", _Unpacked(whole, allowance))


class _Allowance:
    """Bytes that may still be taken before something has to come out."""

    def __init__(self) -> None:
        self._left = FRUITLESS_MAX

    def spend(self, size: int) -> None:
        """They have been taken. Raises `FruitlessStream`."""
        self._left -= size
        if self._left < 0:
            raise FruitlessStream(f"more than {FRUITLESS_MAX} bytes in a row unpack to almost nothing")

    def renew(self) -> None:
        """Something has come out."""
        self._left = FRUITLESS_MAX


class _Unpacked:
    """What comes out."""

    def __init__(self, stream: Readable, allowance: _Allowance) -> None:
        self._stream = stream
        self._allowance = allowance

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, none at the end."""
        data = self._stream.read(size)
        if data:
            self._allowance.renew()
        return data


class _Rejoined(io.RawIOBase):
    """A stream with its first bytes, which were read to learn its kind, in front again.

    `peek` would not do: a pipe may give fewer bytes than the kind takes.
    """

    def __init__(self, head: bytes, rest: BinaryIO, allowance: _Allowance) -> None:
        self._head = head
        self._rest = cast("io.BufferedReader", rest)
        self._allowance = allowance

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Fills a part of `buffer`, and returns its size in bytes; 0 at the end."""
        if not self._head:
            size = self._rest.readinto1(buffer)  # a pipe's writer goes on meanwhile
            self._allowance.spend(size)
            return size
        view = memoryview(buffer)
        size = min(len(view), len(self._head))
        view[:size], self._head = self._head[:size], self._head[size:]
        return size
