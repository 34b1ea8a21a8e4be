"""Inflates a gzip stream while it comes and notes where inflating could start again.

zlib is called through ctypes: it is the one inflater that can stop between two deflate blocks and say at
which bit that is (docs/decisions/009). It runs without the interpreter's lock.
"""

import ctypes
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Self

from rafs.errors import NydusError
from rafs.zran import WINDOW_SIZE

SPACING_BYTES = 32 << 10
"""Decoded bytes between two points at least: no stream, of empty blocks say, can cost more memory."""
EMPTY_MAX = 4096
"""Members in a row without content: each takes time, and honest streams end with one at most."""
_INPUT_SIZE = 256 << 10
_OUTPUT_SIZE = 1 << 20
_GZIP = 31
_NO_FLUSH, _BLOCK = 0, 5
_OK, _STREAM_END, _BUFFER_ERROR = 0, 1, -5
_LAST_BLOCK, _BLOCK_ENDS = 64, 128


class BrokenGzip(NydusError):
    """A layer that should stay as it is, and is no gzip stream that inflates."""

    message = (
        "{layer}: not a sound gzip stream at byte {offset}: {why}; only gzip layers can stay as they are"
    )
    exit_code: ClassVar[int] = 66


class NoZlib(NydusError):
    """The system has no zlib to be called."""

    message = "an index of a gzip layer needs the system's zlib: {why}"
    exit_code: ClassVar[int] = 67


class _Stream(ctypes.Structure):
    """`z_stream` of zlib.h."""

    _fields_: ClassVar = [
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    ]


@dataclass(frozen=True, slots=True)
class RestartPoint:
    """A place between two deflate blocks. Offsets in bytes, `window` what was inflated before it.

    The upper `bits` bits of `byte`, the one before `in_offset`, belong to the next block.
    """

    in_offset: int
    out_offset: int
    bits: int
    byte: int
    window: bytes


class GzipIndexer:
    """Inflates what `read` gives, and keeps the points and the positions that chunks to come may need.

    A context manager. One or more members; zeros behind the last are padding. Used by one thread.
    """

    def __init__(self, read: Callable[[int], bytes], layer: str) -> None:
        """`read(n)` gives up to `n` bytes of the gzip stream, none at its end; `layer` is for messages."""
        self._layer = layer
        self.in_offset = 0
        self.out_offset = 0
        self._read = read
        self._points: deque[RestartPoint] = deque()
        self._marks: deque[tuple[int, int]] = deque()
        self._input = b""
        self._consumed = 0
        self._output = ctypes.create_string_buffer(WINDOW_SIZE + _OUTPUT_SIZE)
        self._view = memoryview(self._output).cast("B")
        self._history = 0
        self._next_point = 0
        self._last_byte = self._member_start = 0
        self._is_between = True
        self._empty_members = 0
        self._is_padded = self._is_finished = False
        self._zlib = _load_zlib()
        self._stream = _Stream()
        self._pointer = ctypes.byref(self._stream)
        version = ctypes.c_char_p(self._zlib.zlibVersion())
        if self._zlib.inflateInit2_(self._pointer, _GZIP, version, ctypes.sizeof(_Stream)) != _OK:
            raise NoZlib(why="it cannot be set up")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zlib.inflateEnd(self._pointer)

    def inflate(self) -> memoryview:
        """The next decoded bytes, none at the end; they are good until the next call. Raises `BrokenGzip`."""
        kept = min(self._history, WINDOW_SIZE)
        ctypes.memmove(self._output, ctypes.addressof(self._output) + self._history - kept, kept)
        self._history = kept
        while not self._is_finished and self._history < len(self._view) - SPACING_BYTES:
            self._step()
        return self._view[kept : self._history]

    def point_before(self, out_offset: int) -> RestartPoint | None:
        """The last known point at or before a decoded offset."""
        return next((point for point in reversed(self._points) if point.out_offset <= out_offset), None)

    def encoded_end(self, out_offset: int) -> int:
        """Up to where the stream is to be read for the bytes before `out_offset`, which were inflated."""
        return next(encoded for decoded, encoded in self._marks if decoded >= out_offset)

    def forget(self, out_offset: int) -> None:
        """No chunk to come starts before this decoded offset."""
        while len(self._points) > 1 and self._points[1].out_offset <= out_offset:
            self._points.popleft()
        while self._marks and self._marks[0][0] < out_offset:
            self._marks.popleft()

    def _step(self) -> None:
        """Inflates up to a point, to the end of the input at hand, or some way."""
        if self._consumed == len(self._input) and not self._refill():
            return
        if self._is_between and not self._begin_member():
            return
        stream = self._stream
        due = self.out_offset >= self._next_point
        room = SPACING_BYTES if due else self._next_point - self.out_offset
        stream.next_in = self._input_address + self._consumed
        stream.avail_in = len(self._input) - self._consumed
        stream.next_out = ctypes.addressof(self._output) + self._history
        stream.avail_out = room
        result = self._zlib.inflate(self._pointer, _BLOCK if due else _NO_FLUSH)
        self._advance(len(self._input) - self._consumed - stream.avail_in, room - stream.avail_out)
        if result == _STREAM_END:
            self._is_between = True
            self._expect_content()
            self._zlib.inflateReset(self._pointer)
        elif result not in (_OK, _BUFFER_ERROR):
            why = (stream.msg or b"it needs a dictionary").decode("ascii", "replace")
            raise BrokenGzip(layer=self._layer, offset=self.in_offset, why=why)
        elif due and stream.data_type & (_BLOCK_ENDS | _LAST_BLOCK) == _BLOCK_ENDS:
            self._note_point(stream.data_type & 7)

    def _advance(self, taken: int, given: int) -> None:
        self._consumed += taken
        self.in_offset += taken
        self._history += given
        self.out_offset += given
        if given:
            self._marks.append((self.out_offset, self.in_offset))

    def _expect_content(self) -> None:
        self._empty_members = 0 if self.out_offset > self._member_start else self._empty_members + 1
        if self._empty_members > EMPTY_MAX:
            why = f"more than {EMPTY_MAX} members in a row without content"
            raise BrokenGzip(layer=self._layer, offset=self.in_offset, why=why)

    def _note_point(self, bits: int) -> None:
        """zlib stops behind a member's header as it does behind a block; nothing lies before that."""
        size = min(WINDOW_SIZE, self.out_offset - self._member_start)
        window = bytes(self._view[self._history - size : self._history])
        byte = self._input[self._consumed - 1] if self._consumed else self._last_byte
        self._points.append(RestartPoint(self.in_offset, self.out_offset, bits, byte, window))
        self._next_point = self.out_offset + SPACING_BYTES

    def _refill(self) -> bool:
        """Gets more input; at its end, sees that the stream was whole."""
        if self._input:
            self._last_byte = self._input[-1]
        self._input = self._read(_INPUT_SIZE)
        self._consumed = 0
        self._input_address = ctypes.cast(ctypes.c_char_p(self._input), ctypes.c_void_p).value or 0
        if not self._input:
            if not self._is_between or not self.in_offset:
                raise BrokenGzip(layer=self._layer, offset=self.in_offset, why="it ends early")
            self._is_finished = True
        return not self._is_finished

    def _begin_member(self) -> bool:
        """Steps over padding; whether there is another member behind the last one."""
        rest = self._input[self._consumed :]
        member = rest.lstrip(b"\0")
        padding = len(rest) - len(member)
        self._is_padded |= padding > 0
        self._consumed += padding
        self.in_offset += padding
        if not member:
            return False
        if self._is_padded:
            raise BrokenGzip(
                layer=self._layer,
                offset=self.in_offset,
                why="there is something behind the padding at its end",
            )
        self._is_between = False
        self._member_start = self.out_offset
        return True


def _load_zlib() -> ctypes.CDLL:
    try:
        zlib = ctypes.CDLL("libz.so.1")
    except OSError as error:
        raise NoZlib(why=error) from error
    zlib.zlibVersion.restype = ctypes.c_char_p
    return zlib
