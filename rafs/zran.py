"""Points in a gzip stream from which inflating can start: records of a blob.meta behind its chunk infos."""

import struct
from dataclasses import dataclass
from typing import Self

from rafs.record import Buffer

ZRAN_CONTEXT = struct.Struct("<QQQIIIBBH")

assert ZRAN_CONTEXT.size == 40


@dataclass(frozen=True, slots=True)
class ZranContext:
    """A point in a gzip stream from which inflating can start. Offsets and lengths in bytes."""

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
