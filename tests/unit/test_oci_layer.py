"""The file of a layer: what waits is bounded, and what comes out does not depend on how it came in."""

import hashlib
from pathlib import Path

import pytest

from builder.oci_layer import PIECE_BYTES, WAITING_BYTES_MAX, LayerCompression, LayerFile


async def test_what_nobody_settles_is_packed_all_the_same(tmp_path: Path) -> None:
    layer = LayerFile(tmp_path / "layer", LayerCompression.NONE)
    for _ in range(WAITING_BYTES_MAX // PIECE_BYTES + 1):
        layer.write(bytes(PIECE_BYTES))
    assert await layer.growing.wait_for(WAITING_BYTES_MAX)
    layer.close()


@pytest.mark.parametrize("compression", LayerCompression)
async def test_the_same_bytes_however_they_come(tmp_path: Path, compression: LayerCompression) -> None:
    content = b"".join(hashlib.sha256(b"%d" % number).digest() * 20 for number in range(7000))
    made = []
    for name, step, settles in (("a", 512, False), ("b", 300_000, True), ("c", len(content), True)):
        layer = LayerFile(tmp_path / name, compression)
        for at in range(0, len(content), step):
            layer.write(content[at : at + step])
            if settles:
                await layer.settle()
        identity = layer.finish()
        packed = (tmp_path / name).read_bytes()
        assert identity.digest == f"sha256:{hashlib.sha256(packed).hexdigest()}"
        assert identity.size_bytes == len(packed)
        assert layer.diff_id == f"sha256:{hashlib.sha256(content).hexdigest()}"
        assert await layer.growing.identity() == identity
        made.append(packed)
    assert made[1:] == made[:-1]
