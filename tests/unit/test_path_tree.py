"""The table of names of a merge on a disk without room."""

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.path_tree import PathTree

pytestmark = [pytest.mark.needs_root]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], check=True)
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def fill(directory: Path, left_bytes: int = 0) -> None:
    """Leaves that much room."""
    size = (256 << 10) - left_bytes
    (directory / "filling").write_bytes(bytes(size))


def put_many(path: Path) -> None:
    """More names than the disk has room for."""
    with PathTree(path) as tree:
        for number in range(200_000):
            tree.put((b"%0100d" % number,), number + 1, 0o100644)


@pytest.mark.parametrize("left_bytes", [0, 4096, 8192])
def test_a_disk_that_is_full_before_it_begins(small_disk: Path, left_bytes: int) -> None:
    """It came out as an error of the database, which is taken for a fault of ours."""
    fill(small_disk, left_bytes)
    with pytest.raises(OSError) as caught:
        put_many(small_disk / "tree")
    assert caught.value.errno == errno.ENOSPC
    assert not (small_disk / "tree").exists()
