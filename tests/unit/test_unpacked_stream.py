"""Streams that unpack to nothing for longer than anybody waits."""

import contextlib
import gzip
import io

import pytest
import zstandard

from builder import unpacked_stream
from builder.gzip_index import EMPTY_MAX, BrokenGzip, GzipIndexer
from builder.unpacked_stream import FruitlessStream, open_unpacked

NOTHING = gzip.compress(b"", mtime=0)
LIMIT = 3 << 20


def unpacked(stream: bytes) -> bytes:
    with contextlib.ExitStack() as stack:
        reader = open_unpacked(io.BytesIO(stream), stack)
        return b"".join(iter(lambda: reader.read(100_000), b""))


def indexed(stream: bytes) -> bytes:
    with GzipIndexer(io.BytesIO(stream).read, "layer") as indexer:
        return b"".join(iter(lambda: bytes(indexer.inflate()), b""))


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
@pytest.mark.parametrize("content", [b"", b"x", bytes(10 << 20), bytes(range(256)) * 40_000])
def test_what_was_packed(monkeypatch: pytest.MonkeyPatch, pack: type[bytes], content: bytes) -> None:
    """The limit counts from the last byte that came out, and not from the start."""
    monkeypatch.setattr(unpacked_stream, "FRUITLESS_MAX", LIMIT)
    assert unpacked(pack(content)) == content


def test_empty_gzip_members_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacked_stream, "FRUITLESS_MAX", LIMIT)
    content = bytes(200_000)
    few = NOTHING * (LIMIT // 2 // len(NOTHING)) + gzip.compress(content)
    assert unpacked(few * 3) == content * 3
    with pytest.raises(FruitlessStream, match="in a row unpack to almost nothing"):
        unpacked(NOTHING * (2 * LIMIT // len(NOTHING)))


def test_empty_deflate_blocks_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacked_stream, "FRUITLESS_MAX", LIMIT)
    with pytest.raises(FruitlessStream):
        unpacked(NOTHING[:10] + b"\0\0\0\xff\xff" * LIMIT)


def test_empty_members_of_a_layer_that_stays_end() -> None:
    few = NOTHING * EMPTY_MAX + gzip.compress(b"x")
    assert indexed(few * 3 + NOTHING) == b"xxx"
    with pytest.raises(BrokenGzip, match="members in a row without content"):
        indexed(NOTHING * (EMPTY_MAX + 1))
