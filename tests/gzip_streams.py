"""Gzip streams of every kind that a layer may be."""

import random
import zlib

from hypothesis import strategies as st

_FLUSHES = (zlib.Z_NO_FLUSH, zlib.Z_NO_FLUSH, zlib.Z_PARTIAL_FLUSH, zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH, 5)
_STRATEGIES = (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY, zlib.Z_FIXED)


def make_content(seed: int, parts: int) -> bytes:
    """Noise, text and runs, one behind the other."""
    source = random.Random(seed)
    content = b""
    for _ in range(parts):
        size = source.randint(1, 60_000)
        numbers = " ".join(str(source.randint(0, 500)) for _ in range(size // 4)).encode()
        content += source.choice([source.randbytes(size), b"ab" * (size // 2), numbers])
    return content


def compress_members(content: bytes, seed: int, member_size: int) -> bytes:
    """`content` in members of that many bytes each, with levels, strategies and flushes drawn from `seed`."""
    source = random.Random(seed)
    stream = b""
    for start in range(0, len(content) or 1, member_size):
        encoder = zlib.compressobj(
            source.randint(0, 9), zlib.DEFLATED, 31, source.randint(1, 9), source.choice(_STRATEGIES)
        )
        member = content[start : start + member_size]
        step = source.randint(500, 100_000)
        for position in range(0, len(member), step):
            stream += encoder.compress(member[position : position + step])
            flush = source.choice(_FLUSHES)
            if flush != zlib.Z_NO_FLUSH:
                stream += encoder.flush(flush)
        stream += encoder.flush()
    return stream


@st.composite
def gzip_streams(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A content and a gzip stream of it."""
    seed = draw(st.integers(0, 2**32))
    content = make_content(seed, draw(st.integers(0, 8)))
    return content, compress_members(content, seed, draw(st.sampled_from([5_000, 70_000, 1 << 30])))
