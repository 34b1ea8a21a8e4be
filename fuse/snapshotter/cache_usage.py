"""What the layers of mounted images take on the disk: their part of the cache, which grows while they are
read.
"""

import os
from pathlib import Path

from backend.cache import blob_files
from fuse.snapshotter.directories import Usage


class CacheUsage:
    """Looks it up. Blobs that several images share are counted for each."""

    def __init__(self, cache_dir: Path) -> None:
        self._cache_dir = cache_dir

    def of_blob(self, blob_id: str) -> Usage:
        """A data blob."""
        return _sum(blob_files(self._cache_dir, blob_id))

    def of_image(self, digest: str) -> Usage:
        """The metadata of an image, by the digest of its manifest."""
        directory = self._cache_dir / "images" / digest.removeprefix("sha256:")
        try:
            return _sum([Path(entry.path) for entry in os.scandir(directory)])
        except FileNotFoundError:
            return Usage(0, 0)


def _sum(paths: list[Path]) -> Usage:
    size_bytes = inodes = 0
    for path in paths:
        try:
            size_bytes += path.stat().st_blocks * 512
            inodes += 1
        except FileNotFoundError:
            continue
    return Usage(size_bytes, inodes)
