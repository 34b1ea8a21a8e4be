"""Codecs: exact sizes, and data that would cost more than it promises."""

import zlib

import pytest
import zstandard

from rafs.codec import CodecError, Compressor, compress, decompress
from rafs.digest import Digester, crc32c

CONTENT = b"a chunk of something " * 1000


@pytest.mark.parametrize("codec", Compressor)
@pytest.mark.parametrize("content", [CONTENT, b"x", b"", bytes(1 << 20)])
def test_what_goes_in_comes_out(codec: Compressor, content: bytes) -> None:
    for buffer in (content, bytearray(content), memoryview(content)):
        encoded = compress(codec, buffer)
        assert decompress(codec, encoded, len(content)) == content
        assert decompress(codec, memoryview(encoded), len(content)) == content


@pytest.mark.parametrize("codec", [Compressor.ZSTD, Compressor.LZ4_BLOCK, Compressor.GZIP])
@pytest.mark.parametrize("cut", [1, 5, 20])
def test_data_that_ends_early(codec: Compressor, cut: int) -> None:
    encoded = compress(codec, CONTENT)
    with pytest.raises(CodecError, match=f"{codec.name.lower()} data of {len(encoded) - cut} bytes"):
        decompress(codec, encoded[:-cut], len(CONTENT))


def test_bomb_that_declares_its_size_is_turned_away() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    with pytest.raises(CodecError, match="declares 67108864"):
        decompress(Compressor.ZSTD, bomb, 4096)


def test_bomb_that_hides_its_size_stops_at_the_promised_one() -> None:
    hidden = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(64 << 20))
    with pytest.raises(CodecError):
        decompress(Compressor.ZSTD, hidden, 4096)
    with pytest.raises(CodecError, match="goes on"):
        decompress(Compressor.GZIP, compress(Compressor.GZIP, bytes(64 << 20)), 4096)


def test_frame_without_a_declared_size() -> None:
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(CONTENT)
    assert decompress(Compressor.ZSTD, frame, len(CONTENT)) == CONTENT


def test_bytes_behind_a_frame() -> None:
    with pytest.raises(CodecError):
        decompress(Compressor.ZSTD, compress(Compressor.ZSTD, CONTENT) + b"x", len(CONTENT))


def test_wrong_checksum_of_gzip() -> None:
    encoded = bytearray(compress(Compressor.GZIP, CONTENT))
    encoded[-5] ^= 1
    with pytest.raises(CodecError):
        decompress(Compressor.GZIP, encoded, len(CONTENT))


def test_gzip_takes_zlib_streams_too() -> None:
    assert decompress(Compressor.GZIP, zlib.compress(CONTENT), len(CONTENT)) == CONTENT


def test_digests_and_checksum_of_known_strings() -> None:
    assert Digester.SHA256.digest(b"abc").hex().startswith("ba7816bf8f01cfea")
    assert Digester.BLAKE3.digest(b"abc").hex().startswith("6437b3ac38465133")
    assert crc32c(b"123456789") == crc32c(memoryview(b"123456789")) == 0xE3069283
