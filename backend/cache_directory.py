"""The directory of the cache: which files are a blob's, who may change them, and how a blob leaves."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MAP_SUFFIX = ".chunk_map"


@contextmanager
def lock_cache(directory: Path) -> Iterator[None]:
    """Nobody else opens, makes, replaces or removes files of the cache meanwhile."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def blob_files(cache_dir: Path, blob_id: str) -> list[Path]:
    """Where the cache keeps a blob, decoded and as it is in the registry, and which chunks are there."""
    names = (f"{blob_id}.blob.data", f"{blob_id}.blob")
    return [cache_dir / "blobs" / (name + suffix) for name in names for suffix in ("", _MAP_SUFFIX)]


def remove_blob(cache_dir: Path, blob_id: str) -> None:
    """Forgets a blob and frees its space, as soon as nobody has its files open any more. Blocking.

    Who opens it meanwhile begins with an empty file. Raises `OSError`.
    """
    directory = cache_dir / "blobs"
    if not directory.exists():
        return
    with lock_cache(directory):
        found = list(directory.glob(f"{blob_id}.blob*"))
        # The maps first: without one nothing of a data file is believed.
        for path in sorted(found, key=lambda path: path.suffix != _MAP_SUFFIX):
            path.unlink(missing_ok=True)
