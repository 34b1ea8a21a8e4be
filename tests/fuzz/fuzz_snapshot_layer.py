"""Layers of ordinary images that are unpacked for overlayfs: broken ones, and ones that want out."""

import gzip
import hashlib
import io
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import zstandard

from fuse.snapshotter.layer_tar import LayerNotUnpacked, unpack_layer
from tests.oci_images import Layer


def _layer() -> Layer:
    layer = Layer().directory("d").add("d/f", b"content").symlink("l", "../../outside").hardlink("h", "d/f")
    return layer.add("l/f", b"x").whiteout("d/f").opaque("d").add("../up", b"y")


SEEDS = (
    _layer().tar(),
    gzip.compress(_layer().tar(), mtime=0),
    zstandard.ZstdCompressor().compress(_layer().tar()),
)


def exercise(data: bytes) -> None:
    """What a layer says stays inside, and what is broken is said to be so."""
    with tempfile.TemporaryDirectory() as name:
        outside, root = Path(name) / "outside", Path(name) / "root"
        outside.mkdir()
        root.mkdir()
        (outside / "kept").write_text("kept")
        with suppress(LayerNotUnpacked, OSError):
            unpack_layer(io.BytesIO(data), "fuzzed", root, [], f"sha256:{hashlib.sha256(data).hexdigest()}")
        assert os.listdir(outside) == ["kept"]
        assert sorted(os.listdir(name)) == ["outside", "root"]


if __name__ == "__main__":
    from tests.fuzz.driver import run

    run("fuzz_snapshot_layer")
