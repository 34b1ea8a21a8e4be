"""What removed images take out of the cache, and what they leave."""

import json
from pathlib import Path

import pytest
import trio

from backend.cache import BlobCache, BlobShape
from backend.contract import BackendError
from backend.metadata import MANIFEST_NAME
from fuse.snapshotter.cache_files import CacheUsage, forget_image

BLOBS = ["a" * 64, "b" * 64, "c" * 64]


def keep_image(cache_dir: Path, number: int, blobs: list[str]) -> str:
    """Metadata of an image of these blobs, as a mount leaves it; the digest."""
    digest = f"sha256:{number:064x}"
    directory = cache_dir / "images" / digest.removeprefix("sha256:")
    directory.mkdir(parents=True)
    layers = [
        {"mediaType": "x", "digest": f"sha256:{blob}", "size": 1} for blob in [*blobs, f"{number:064x}"]
    ]
    manifest = {"schemaVersion": 2, "config": layers[0], "layers": layers}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return digest


@pytest.fixture
async def cache_dir(tmp_path: Path) -> Path:
    cache = BlobCache(tmp_path)
    for blob in BLOBS:
        cached = cache.open(BlobShape(blob, 8192, 2))
        cached.store(0, [memoryview(b"x" * 4096)])
        cached.add(0, 4096)
        await cached.flush()
        cached.close()
    return tmp_path


async def test_what_no_other_image_has_goes(cache_dir: Path) -> None:
    gone = keep_image(cache_dir, 1, BLOBS[:2])
    kept = keep_image(cache_dir, 2, BLOBS[1:])
    usage = CacheUsage(cache_dir)
    assert usage.of_blob(BLOBS[0]).size_bytes >= 4096
    assert usage.of_image(gone).inodes == 1
    await trio.to_thread.run_sync(forget_image, cache_dir, gone, [kept, "sha256:" + "9" * 64])
    left = {path.name.partition(".")[0] for path in (cache_dir / "blobs").iterdir()}
    assert left == set(BLOBS[1:])
    assert usage.of_blob(BLOBS[0]) == usage.of_image(gone) == (0, 0)
    assert usage.of_image(kept).inodes == 1


async def test_who_has_a_blob_open_keeps_it_and_who_comes_later_starts_anew(cache_dir: Path) -> None:
    digest = keep_image(cache_dir, 1, BLOBS[:1])
    shape = BlobShape(BLOBS[0], 8192, 2)
    held = BlobCache(cache_dir).open(shape)
    await trio.to_thread.run_sync(forget_image, cache_dir, digest, [])
    assert held.is_ready(0)
    fresh = BlobCache(cache_dir).open(shape)
    assert not fresh.is_ready(0)
    held.close()
    fresh.close()


async def test_nothing_goes_while_it_cannot_be_told_what_another_image_needs(cache_dir: Path) -> None:
    gone, damaged = keep_image(cache_dir, 1, BLOBS[:2]), keep_image(cache_dir, 2, BLOBS[1:])
    (cache_dir / "images" / damaged.removeprefix("sha256:") / MANIFEST_NAME).write_bytes(b"{")
    before = sorted((cache_dir / "blobs").iterdir())
    with pytest.raises(BackendError):
        await trio.to_thread.run_sync(forget_image, cache_dir, gone, [damaged])
    assert sorted((cache_dir / "blobs").iterdir()) == before
    assert CacheUsage(cache_dir).of_image(gone).inodes == 1


@pytest.mark.logs_warning
async def test_an_image_with_a_damaged_manifest_keeps_its_blobs_and_no_others(cache_dir: Path) -> None:
    damaged = keep_image(cache_dir, 1, BLOBS[:1])
    (cache_dir / "images" / damaged.removeprefix("sha256:") / MANIFEST_NAME).write_bytes(b"{")
    await trio.to_thread.run_sync(forget_image, cache_dir, damaged, [])
    assert CacheUsage(cache_dir).of_image(damaged).inodes == 0
