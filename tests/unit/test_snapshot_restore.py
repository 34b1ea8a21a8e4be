"""Layers that are fetched after all, from a registry that answers from memory."""

import gzip
import hashlib
from pathlib import Path

import pytest

from backend.contract import BlobReader
from backend.memory_blob import MemoryBlobReader
from backend.ocidigest import DigestMismatch
from backend.registry import RegistryClient, RegistryOptions
from fuse.snapshotter.layer_restore import LayerRestorer
from fuse.snapshotter.layer_tar import LayerNotUnpacked
from fuse.snapshotter.records import SourceLayer
from tests.oci_images import Layer

pytestmark = pytest.mark.needs_root

TAR = Layer().directory("d").add("d/f", b"content").tar()
PACKED = gzip.compress(TAR)


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def source(packed: bytes = PACKED, digest: str = "", diff_id: str = "") -> SourceLayer:
    reference = f"127.0.0.1:1/app@{digest_of(b'manifest')}"
    return SourceLayer(reference, digest or digest_of(packed), len(packed), diff_id or digest_of(TAR))


@pytest.fixture
def blobs(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What the registry answers with: its only element."""
    blobs = [PACKED]

    def open_blob(self: RegistryClient, digest: str, size_bytes: int | None = None) -> BlobReader:
        return MemoryBlobReader(blobs[0])

    monkeypatch.setattr(RegistryClient, "open_blob", open_blob)
    return blobs


async def test_a_layer_is_unpacked_beside(tmp_path: Path, blobs: list[bytes]) -> None:
    (tmp_path / "unpacking-left").mkdir()
    found = await LayerRestorer(RegistryOptions()).restore(source(), [], tmp_path)
    assert (found / "d/f").read_bytes() == b"content"
    assert list(tmp_path.iterdir()) == [found]


@pytest.mark.parametrize(
    ("layer", "error"),
    [
        (source(digest=digest_of(b"other")), DigestMismatch),
        (source(diff_id=digest_of(b"other")), LayerNotUnpacked),
    ],
)
async def test_other_bytes_leave_nothing(
    tmp_path: Path, blobs: list[bytes], layer: SourceLayer, error: type[Exception]
) -> None:
    with pytest.raises(error):
        await LayerRestorer(RegistryOptions()).restore(layer, [], tmp_path)
    assert list(tmp_path.iterdir()) == []
