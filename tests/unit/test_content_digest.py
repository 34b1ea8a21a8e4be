"""The diff ID of a layer, whatever the pieces are that its tar comes in."""

import hashlib
import io
import random

import pytest

from builder.content_digest import ContentDigest, DigestedStream

MIB = 1 << 20


@pytest.mark.parametrize("sizes", [[], [0], [1], [MIB], [10_240] * 500, [3 * MIB, 1, 0, MIB - 1, MIB + 1]])
def test_pieces_of_any_size(sizes: list[int]) -> None:
    pieces = [random.Random(number).randbytes(size) for number, size in enumerate(sizes)]
    with ContentDigest() as digest:
        for piece in pieces:
            digest.update(piece)
        assert digest.diff_id() == f"sha256:{hashlib.sha256(b''.join(pieces)).hexdigest()}"


def test_a_stream_is_read_as_it_is() -> None:
    content = random.Random(7).randbytes(5 * MIB + 1)
    with ContentDigest() as digest:
        stream = DigestedStream(io.BytesIO(content), digest)
        read = b"".join(iter(lambda: stream.read(100_000), b""))
        assert read == content
        assert digest.diff_id() == f"sha256:{hashlib.sha256(content).hexdigest()}"
