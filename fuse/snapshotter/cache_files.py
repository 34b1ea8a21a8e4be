"""What layers of mounted images have in the cache: how much it is, and that it goes when they do."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from backend.cache_directory import blob_files, remove_blob
from backend.contract import BackendError
from backend.metadata import MANIFEST_NAME, read_manifest, remove_metadata
from fuse.snapshotter.directories import Usage

log = logging.getLogger(__name__)


class CacheUsage:
    """Tells how much it is: it grows while files are read. What several images share counts for each."""

    def __init__(self, cache_dir: Path) -> None:
        self._cache_dir = cache_dir

    def of_blob(self, blob_id: str) -> Usage:
        """A data blob."""
        return _sum(blob_files(self._cache_dir, blob_id))

    def of_image(self, digest: str) -> Usage:
        """The metadata of an image, by the digest of its manifest."""
        try:
            return _sum([Path(entry.path) for entry in os.scandir(_directory(self._cache_dir, digest))])
        except FileNotFoundError:
            return Usage(0, 0)


def forget_image(cache_dir: Path, digest: str, needed: Iterable[str]) -> None:
    """Removes metadata and blobs of an image, but for blobs of the images `needed` (digests of manifests).

    Raises `OSError`, `CannotWrite`; `BackendError` when it cannot be told what those need.
    """
    try:
        gone = _blobs(cache_dir, digest)
    except BackendError as error:
        log.warning("blobs of a removed image stay in the cache: %s", error)
        gone = set()
    for other in needed:
        gone -= _blobs(cache_dir, other)
    remove_metadata(cache_dir / "images", digest)
    for blob_id in gone:
        remove_blob(cache_dir, blob_id)


def _blobs(cache_dir: Path, digest: str) -> set[str]:
    try:
        manifest = read_manifest(_directory(cache_dir, digest) / MANIFEST_NAME)
    except FileNotFoundError:
        return set()  # it has never been mounted
    return {layer.hex for layer in manifest.layers}


def _directory(cache_dir: Path, digest: str) -> Path:
    return cache_dir / "images" / digest.removeprefix("sha256:")


def _sum(paths: list[Path]) -> Usage:
    size_bytes = inodes = 0
    for path in paths:
        try:
            size_bytes += path.stat().st_blocks * 512
            inodes += 1
        except FileNotFoundError:
            continue
    return Usage(size_bytes, inodes)
