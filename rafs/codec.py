"""Codecs of chunks: one call in, one call out, sizes always known and checked."""

import enum
import threading
import zlib
from typing import ClassVar

import lz4.block
import zstandard

from rafs.errors import NydusError
from rafs.record import Buffer


class CodecError(NydusError):
    """Encoded bytes that do not decode to the size that the metadata promises."""

    message = "{codec} data of {encoded} bytes does not decode to {decoded} bytes: {why}"
    exit_code: ClassVar[int] = 11


class Compressor(enum.IntEnum):
    """Codecs, numbered as in a blob table entry."""

    NONE = 0
    LZ4_BLOCK = 1
    GZIP = 2
    ZSTD = 3


class _ThreadContexts(threading.local):
    """zstd contexts are costly to make and must not be shared between threads."""

    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor()
        self.compressors: dict[int, zstandard.ZstdCompressor] = {}


_contexts = _ThreadContexts()


def decompress(codec: Compressor, data: Buffer, uncompressed_size: int) -> bytes:
    """Decodes one unit into exactly `uncompressed_size` bytes; raises `CodecError` for anything else."""
    try:
        decoded = _decode(codec, data, uncompressed_size)
    except (zstandard.ZstdError, lz4.block.LZ4BlockError, zlib.error, ValueError) as error:
        raise _failure(codec, data, uncompressed_size, str(error)) from error
    if len(decoded) != uncompressed_size:
        raise _failure(codec, data, uncompressed_size, f"it gives {len(decoded)}")
    return decoded


def compress(codec: Compressor, data: Buffer, level: int = 3) -> bytes:
    """Encodes one unit: a zstd frame, a bare LZ4 block, a gzip member, or the bytes as they are."""
    if codec is Compressor.ZSTD:
        compressor = _contexts.compressors.get(level)
        if compressor is None:
            compressor = _contexts.compressors[level] = zstandard.ZstdCompressor(level=level)
        return compressor.compress(data)
    if codec is Compressor.LZ4_BLOCK:
        block: bytes = lz4.block.compress(data, store_size=False)
        return block
    if codec is Compressor.GZIP:
        return zlib.compress(data, level, wbits=31)
    return bytes(data)


def _decode(codec: Compressor, data: Buffer, uncompressed_size: int) -> bytes:
    if codec is Compressor.ZSTD:
        return _decode_zstd(data, uncompressed_size)
    if codec is Compressor.LZ4_BLOCK:
        decoded: bytes = lz4.block.decompress(data, uncompressed_size=uncompressed_size)
        return decoded
    if codec is Compressor.GZIP:
        return _inflate(data, uncompressed_size)
    return bytes(data)


def _decode_zstd(data: Buffer, uncompressed_size: int) -> bytes:
    # A frame that names its content size is allocated from that field before a byte is decoded,
    # so a hostile one must be turned away here.
    declared = zstandard.frame_content_size(data)
    if declared not in (-1, uncompressed_size):
        raise ValueError(f"its frame declares {declared}")
    return _contexts.decompressor.decompress(data, max_output_size=uncompressed_size, allow_extra_data=False)


def _inflate(data: Buffer, uncompressed_size: int) -> bytes:
    decoder = zlib.decompressobj(wbits=47)  # gzip or zlib wrapper, told apart by its header
    decoded = decoder.decompress(data, max(uncompressed_size, 1))
    if not decoder.eof and decoder.decompress(decoder.unconsumed_tail, 1):
        raise ValueError("it goes on past that")
    if not decoder.eof:
        raise ValueError("it ends early")
    return decoded


def _failure(codec: Compressor, data: Buffer, uncompressed_size: int, why: str) -> CodecError:
    return CodecError(codec=codec.name.lower(), encoded=len(data), decoded=uncompressed_size, why=why)
