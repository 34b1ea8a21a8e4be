"""Inflates one ZRan context: a stretch of a gzip stream that starts between two deflate blocks.

A deflate block starts at any bit. zlib can be primed with the bits of the byte before; ISA-L, which is
faster, cannot. So the stretch gets empty deflate blocks in front that end where its first bits stand in that
byte: inflating them gives nothing, and any inflater does it.
"""

import zlib
from collections.abc import Iterator

from isal import isal_zlib

from rafs.codec import CodecError
from rafs.record import Buffer
from rafs.zran import ZranContext

_PIECE_SIZE = 16 << 10
"""Bytes fed at a time. What is left over at the end of a member is copied, and members may be tiny."""
_LOOKAHEAD = bytes(16)
"""Fed behind the end: ISA-L decodes several symbols at once and wants to see bits behind the last one."""
_TRAILER_SIZE = 8
_RAW = -15
_GZIP = 31
_ERRORS: tuple[type[Exception], ...] = (isal_zlib.error, zlib.error, ValueError)  # type: ignore[assignment]

# Bits, the first one lowest, and how many. RFC 1951, 3.2.6: not the last block, fixed codes, end of block.
_FIXED = (0b0_010, 10)
_CODE_LENGTHS = (0, 0, 1, *[0] * 14, 1)
"""Of the code length alphabet in the order of RFC 1951, 3.2.7: one bit each for "18" and for "1"."""


def _join(*fields: tuple[int, int]) -> tuple[int, int]:
    value = size = 0
    for bits, count in fields:
        value |= bits << size
        size += count
    return value, size


def _odd_block() -> tuple[int, int]:
    """An empty block of an odd number of bits: dynamic codes, one bit for literal 0, one for the end."""
    one, zeros_138, zeros_117 = (0, 1), (1 | 127 << 1, 8), (1 | 106 << 1, 8)
    return _join(
        (0b100, 3),
        (0, 5),
        (0, 5),
        (len(_CODE_LENGTHS) - 4, 4),
        *((length, 3) for length in _CODE_LENGTHS),
        *(one, zeros_138, zeros_117, one, one),
        (1, 1),
    )


def _empty_blocks(bits: int) -> bytes:
    """Blocks whose last byte lacks its upper `bits` bits (1 to 7)."""
    odd = _odd_block()
    blocks = [odd] if bits % 2 else []
    while (size := sum(block[1] for block in blocks)) % 8 != 8 - bits:
        blocks.append(_FIXED)
    return _join(*blocks)[0].to_bytes(size // 8 + 1, "little")


_LEADS = (b"", *(_empty_blocks(bits) for bits in range(1, 8)))


def inflate_context(context: ZranContext, window: bytes, encoded: Buffer) -> bytes:
    """The `out_len` bytes that a context gives; `encoded` are its `in_len` bytes of the gzip stream.

    Members may end and begin on the way. Raises `CodecError` for anything that does not give those bytes.
    """
    try:
        decoded = b"".join(_inflate(context, window, encoded))
    except _ERRORS as error:
        raise _failure(context, encoded, str(error)) from error
    if len(decoded) != context.out_len:
        raise _failure(context, encoded, f"it gives {len(decoded)}")
    return decoded


def _inflate(context: ZranContext, window: bytes, encoded: Buffer) -> Iterator[bytes]:
    view = memoryview(encoded)
    decoder = isal_zlib.decompressobj(wbits=_RAW, zdict=window)
    if context.ctx_bits:
        lead = bytearray(_LEADS[context.ctx_bits])
        lead[-1] |= context.ctx_byte >> (8 - context.ctx_bits) << (8 - context.ctx_bits)
        decoder.decompress(bytes(lead))
    trailer, position, left = _TRAILER_SIZE, 0, context.out_len
    while left and position <= len(view):
        piece = view[position : position + _PIECE_SIZE] or _LOOKAHEAD
        data = decoder.decompress(piece, left)
        yield data
        left -= len(data)
        position += len(piece)
        if decoder.eof:
            position += trailer - len(decoder.unused_data)
            trailer = 0  # of a member that was begun at its header, the decoder reads it
            decoder = isal_zlib.decompressobj(wbits=_GZIP)


def _failure(context: ZranContext, encoded: Buffer, why: str) -> CodecError:
    return CodecError(codec="gzip", encoded=len(encoded), decoded=context.out_len, why=why)
