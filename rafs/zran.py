"""Points in a gzip stream from which inflating can start: records of a blob.meta behind its chunk infos."""

import struct
from dataclasses import dataclass
from typing import Self

from rafs.record import Buffer, FormatError

ZRAN_CONTEXT = struct.Struct("<QQQIIIBBH")
WINDOW_SIZE = 32 << 10
"""Bytes that deflate can refer back to."""
ENCODED_MAX = (1 << 24) - 1
"""Bytes of the gzip stream in one context: a chunk info has 24 bits for it."""
DECODED_MAX = 64 << 20
"""Bytes that one context may inflate to; the rule is 2 MiB, past which a single deflate block can reach."""

assert ZRAN_CONTEXT.size == 40


@dataclass(frozen=True, slots=True)
class ZranContext:
    """A point in a gzip stream from which inflating can start. Offsets and lengths in bytes.

    The range of `in_len` bytes from `in_offset` on gives `out_len` bytes, those from `out_offset` on of the
    whole stream inflated. The upper `ctx_bits` bits of `ctx_byte`, the byte before `in_offset`, belong to it.
    Ranges of neighbours overlap: a context goes on to the end of the last chunk that starts in it.
    """

    in_offset: int
    out_offset: int
    dict_offset: int
    in_len: int
    out_len: int
    dict_size: int
    ctx_byte: int
    ctx_bits: int

    def pack(self) -> bytes:
        """The 40 bytes."""
        return ZRAN_CONTEXT.pack(
            self.in_offset,
            self.out_offset,
            self.dict_offset,
            self.in_len,
            self.out_len,
            self.dict_size,
            self.ctx_byte,
            self.ctx_bits,
            0,
        )

    @classmethod
    def unpack(cls, raw: Buffer) -> Self:
        """Reads the 40 bytes."""
        return cls(*ZRAN_CONTEXT.unpack(raw)[:8])

    def check(self, offset_bytes: int) -> None:
        """Raises `FormatError` for a context that needs more memory than any honest one, or gives nothing.

        `offset_bytes` is where it stands in its blob.meta.
        """
        for what, found, limit in (
            ("encoded bytes", self.in_len, ENCODED_MAX),
            ("decoded bytes", self.out_len, DECODED_MAX),
        ):
            if not 0 < found <= limit:
                raise FormatError("zran context", offset_bytes, f"1 to {limit} {what}, found {found}")
        if self.dict_size > WINDOW_SIZE or self.ctx_bits > 7:
            raise FormatError(
                "zran context",
                offset_bytes,
                f"a window of at most {WINDOW_SIZE} bytes and at most 7 bits, "
                f"found {self.dict_size} and {self.ctx_bits}",
            )
