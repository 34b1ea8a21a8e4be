"""Streams of zstd frames that end where a frame ends, and those that do not."""

import io

import blake3
import pytest
import zstandard

from builder.zstd_frames import WholeFrames, is_zstd

_RANDOM = blake3.blake3(b"seed").digest(200_000)
_SKIPPABLE = b"\x5f\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"skip!"


def _frame(data: bytes, write_checksum: bool = False, write_content_size: bool = True) -> bytes:
    compressor = zstandard.ZstdCompressor(
        write_checksum=write_checksum, write_content_size=write_content_size
    )
    return compressor.compress(data)


def _drain(stream: bytes, size: int) -> bytes:
    frames = WholeFrames(io.BytesIO(stream))
    return b"".join(iter(lambda: frames.read(size), b""))


@pytest.mark.parametrize("size", [1, 3, 1 << 20])
@pytest.mark.parametrize("has_checksum", [False, True])
@pytest.mark.parametrize("has_size", [False, True])
@pytest.mark.parametrize("data", [b"", b"x", bytes(300_000), _RANDOM, _RANDOM * 3 + bytes(70_000)])
def test_whole_frames_pass_as_they_are(size: int, has_checksum: bool, has_size: bool, data: bytes) -> None:
    frame = _frame(data, write_checksum=has_checksum, write_content_size=has_size)
    for stream in (frame, _SKIPPABLE + frame + frame, frame + _SKIPPABLE):
        assert _drain(stream, size) == stream


def test_every_cut_inside_a_frame_is_noticed() -> None:
    first, second = _frame(b"first " * 9, write_checksum=True), _frame(b"second " * 9)
    stream = first + _SKIPPABLE + second
    borders = {0, len(first), len(first) + len(_SKIPPABLE), len(stream)}
    for end in range(len(stream) + 1):
        if end in borders:
            assert _drain(stream[:end], 7) == stream[:end]
        else:
            with pytest.raises(EOFError, match="inside a zstd frame"):
                _drain(stream[:end], 7)


def test_what_is_no_frame_is_left_to_the_decoder() -> None:
    stream = _frame(b"data") + b"garbage behind it"
    assert _drain(stream, 5) == stream


@pytest.mark.parametrize(
    ("magic", "expected"),
    [
        (b"\x28\xb5\x2f\xfd", True),
        (b"\x50\x2a\x4d\x18", True),
        (b"\x5f\x2a\x4d\x18", True),
        (b"\x60\x2a\x4d\x18", False),
        (b"\x28\xb5\x2f", False),
        (b"", False),
    ],
)
def test_magics(magic: bytes, expected: bool) -> None:
    assert is_zstd(magic) is expected
