"""Streams of zstd frames that end where a frame ends, and those that do not."""

import io

import blake3
import pytest
import zstandard

from builder.zstd_frames import EMPTY_MAX, WINDOW_MAX, WholeFrames, is_zstd

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


def _windowed(window_log: int) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(b"data") + compressor.flush()


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_windows_have_a_limit(size: int) -> None:
    assert _drain(_windowed(27), size) == _windowed(27)
    with pytest.raises(ValueError, match=f"a window of {2 * WINDOW_MAX} bytes, more than {WINDOW_MAX}"):
        _drain(_windowed(28), size)


@pytest.mark.parametrize("size", [7, 1 << 20])
def test_what_holds_nothing_has_a_limit(size: int) -> None:
    """As many empty frames, skippable ones and empty blocks of one frame as no honest stream has."""
    start, empty_block, last_block = b"\x28\xb5\x2f\xfd\x00\x58", bytes(3), b"\x01\0\0"
    nothing = b"\x50\x2a\x4d\x18" + bytes(4)
    for few, many in (
        (_frame(b"") * (EMPTY_MAX // 2 - 1), _frame(b"") * EMPTY_MAX),
        (nothing * (EMPTY_MAX - 2) + _frame(b"x"), nothing * (EMPTY_MAX + 1)),
        (start + empty_block * (EMPTY_MAX - 4) + last_block, start + empty_block * EMPTY_MAX + last_block),
    ):
        assert _drain(few, size) == few
        assert _drain((few + _frame(b"content")) * 3, size) == (few + _frame(b"content")) * 3
        with pytest.raises(ValueError, match="in a row that hold nothing"):
            _drain(many, size)
