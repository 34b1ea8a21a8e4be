"""Where the frames of a zstd stream end: the decoder takes a stream that stops inside one for a whole one."""

from builder.content_digest import Readable

_MAGIC = b"\x28\xb5\x2f\xfd"
_SKIPPABLE = b"\x2a\x4d\x18"
_DICTIONARY_ID_SIZES = (0, 1, 2, 4)
_CONTENT_SIZES = (0, 2, 4, 8)
_RLE_BLOCK = 1


def is_zstd(magic: bytes) -> bool:
    """Whether a stream that begins with these four bytes is one of zstd frames, skippable ones among them."""
    return magic == _MAGIC or (magic[1:] == _SKIPPABLE and magic[0] & 0xF0 == 0x50)


class WholeFrames:
    """Hands on a zstd stream as it is, and raises `EOFError` when it ends inside a frame (RFC 8878, 3.1)."""

    def __init__(self, raw: Readable) -> None:
        self._raw = raw
        self._field = b""
        self._field_size = 4
        self._next = self._magic
        self._skip = 0
        self._has_checksum = False
        self._is_known = True

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

    def _skippable_size(self, field: bytes) -> None:
        self._skip = int.from_bytes(field, "little")
        self._next = self._magic

    def _descriptor(self, field: bytes) -> None:
        flags = field[0]
        is_single_segment = flags >> 5 & 1
        self._has_checksum = bool(flags & 4)
        self._skip = _DICTIONARY_ID_SIZES[flags & 3] + max(_CONTENT_SIZES[flags >> 6], is_single_segment)
        self._skip += not is_single_segment  # the window descriptor
        self._next, self._field_size = self._block, 3

    def _block(self, field: bytes) -> None:
        header = int.from_bytes(field, "little")
        self._skip = 1 if header >> 1 & 3 == _RLE_BLOCK else header >> 3
        if header & 1:
            self._skip += 4 * self._has_checksum
            self._next, self._field_size = self._magic, 4
