"""What a zstd stream is made of: the decoder takes a stream that stops inside a frame for a whole one."""

from builder.content_digest import Readable

_MAGIC = b"\x28\xb5\x2f\xfd"
_SKIPPABLE = b"\x2a\x4d\x18"
_DICTIONARY_ID_SIZES = (0, 1, 2, 4)
_CONTENT_SIZES = (0, 2, 4, 8)
_RLE_BLOCK = 1
WINDOW_MAX = 128 << 20
"""Bytes that a decoder has to keep: what the zstd command takes where nobody gives it more memory."""
EMPTY_MAX = 4096
"""Frames and blocks in a row that hold nothing. Honest streams have a skippable frame or two in a row."""


def is_zstd(magic: bytes) -> bool:
    """Whether a stream that begins with these four bytes is one of zstd frames, skippable ones among them."""
    return magic == _MAGIC or (magic[1:] == _SKIPPABLE and magic[0] & 0xF0 == 0x50)


class WholeFrames:
    """Hands on a zstd stream as it is, and raises `EOFError` when it ends inside a frame (RFC 8878, 3.1).

    Raises `ValueError` for one that takes more memory or more patience than any honest one.
    """

    def __init__(self, raw: Readable) -> None:
        self._raw = raw
        self._field = b""
        self._field_size = 4
        self._next = self._magic
        self._skip = 0
        self._has_checksum = False
        self._is_known = True
        self._empty = 0
        self._behind_window = 0

    def read(self, size: int = -1) -> bytes:
        """Bytes of the stream as they are."""
        data = self._raw.read(size)
        if data:
            self._follow(data)
        elif self._is_known and (self._skip or self._field or self._next != self._magic):
            raise EOFError("it ends inside a zstd frame")
        return data

    def _follow(self, data: bytes) -> None:
        at = 0
        while at < len(data) and self._is_known:
            if self._skip:
                step = min(self._skip, len(data) - at)
                self._skip -= step
            else:
                step = min(self._field_size - len(self._field), len(data) - at)
                self._field += data[at : at + step]
                if len(self._field) == self._field_size:
                    field, self._field = self._field, b""
                    self._next(field)
            at += step

    def _magic(self, field: bytes) -> None:
        if field == _MAGIC:
            self._next, self._field_size = self._descriptor, 1
        elif is_zstd(field):
            self._next = self._skippable_size
        else:  # the decoder says so
            self._is_known = False
        self._expect_content(0)

    def _skippable_size(self, field: bytes) -> None:
        self._skip = int.from_bytes(field, "little")
        self._next = self._magic

    def _descriptor(self, field: bytes) -> None:
        flags = field[0]
        is_single_segment = flags >> 5 & 1
        self._has_checksum = bool(flags & 4)
        self._skip = _DICTIONARY_ID_SIZES[flags & 3] + max(_CONTENT_SIZES[flags >> 6], is_single_segment)
        self._next, self._field_size = (self._block, 3) if is_single_segment else (self._window, 1)
        if not is_single_segment:  # it comes first
            self._behind_window, self._skip = self._skip, 0

    def _window(self, field: bytes) -> None:
        base = 1 << 10 + (field[0] >> 3)
        size = base + base // 8 * (field[0] & 7)
        if size > WINDOW_MAX:
            raise ValueError(f"a zstd frame with a window of {size} bytes, more than {WINDOW_MAX}")
        self._skip = self._behind_window
        self._next, self._field_size = self._block, 3

    def _block(self, field: bytes) -> None:
        header = int.from_bytes(field, "little")
        self._skip = 1 if header >> 1 & 3 == _RLE_BLOCK else header >> 3
        if header & 1:
            self._skip += 4 * self._has_checksum
            self._next, self._field_size = self._magic, 4
        self._expect_content(header >> 3)

    def _expect_content(self, size: int) -> None:
        self._empty = 0 if size else self._empty + 1
        if self._empty > EMPTY_MAX:
            raise ValueError(f"more than {EMPTY_MAX} frames or blocks in a row that hold nothing")
