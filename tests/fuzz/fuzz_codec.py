"""Decodes chunks: the first byte names the codec, the next two the promised size."""

from rafs.codec import Compressor, compress, decompress
from tests.hostile import value_or_error

_CONTENT = b"some text, some text, and some more of it" * 20
SEEDS = tuple(
    bytes([codec]) + len(_CONTENT).to_bytes(2, "little") + compress(codec, _CONTENT) for codec in Compressor
)


def exercise(data: bytes) -> None:
    """Exactly the promised number of bytes, or an error of this project."""
    if len(data) < 3:
        return
    codec, size = Compressor(data[0] % len(Compressor)), int.from_bytes(data[1:3], "little")
    with value_or_error():
        assert len(decompress(codec, memoryview(data)[3:], size)) == size


if __name__ == "__main__":
    from tests.fuzz.driver import run

    run("fuzz_codec")
