"""The kernel mounts what the writer writes: bootstrap and decoded blobs, nothing else, no loop device."""

import ctypes
import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rafs.bootstrap import Bootstrap
from rafs.codec import Compressor, decompress
from tests.conftest import fixtures_dir
from tests.mounted_tree import assert_tree, on_disk
from tests.posix_tree import posix_tree
from tests.rafs_image import ImageMaker, MadeImage, Node, Options, directory, file, symlink

MS_RDONLY = 1
MNT_DETACH = 2

pytestmark = pytest.mark.needs_root


@pytest.fixture(autouse=True)
def _kernel_with_erofs() -> None:
    if "erofs" not in Path("/proc/filesystems").read_text():
        pytest.skip("the kernel has no EROFS")


@contextmanager
def mounted(bootstrap: Path, devices: list[Path], folder: Path) -> Iterator[Path]:
    """The bootstrap, mounted by mount(2) itself: the mount program would make a loop device."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder.mkdir()
    options = ",".join(f"device={device}" for device in devices)
    source, target = os.fsencode(bootstrap), os.fsencode(folder)
    if libc.mount(source, target, b"erofs", MS_RDONLY, options.encode()) != 0:
        code = ctypes.get_errno()
        if code == errno.ENOTBLK:
            pytest.skip("the kernel mounts EROFS from block devices only")
        raise OSError(code, os.strerror(code), str(bootstrap))
    try:
        yield folder
    finally:
        libc.umount2(target, MNT_DETACH)


def make(folder: Path, tree: Node, options: Options) -> tuple[MadeImage, Path]:
    path = folder / "image.boot"
    return ImageMaker(tree, options).make(path), path


@pytest.mark.parametrize("chunk_size", [1 << 12, 1 << 13, 1 << 20])
@pytest.mark.parametrize("blob_count", [1, 3])
def test_kernel_sees_the_same_tree(tmp_path: Path, blob_count: int, chunk_size: int) -> None:
    tree = posix_tree()
    image, path = make(tmp_path, tree, Options(blob_count=blob_count, chunk_size=chunk_size))
    with mounted(path, image.write_devices(tmp_path), tmp_path / "mnt") as root:
        assert_tree(root, tree)


def test_kernel_sees_files_in_batches(tmp_path: Path) -> None:
    tree = posix_tree()
    image, path = make(tmp_path, tree, Options(batch=True, chunk_size=1 << 13))
    with mounted(path, image.write_devices(tmp_path), tmp_path / "mnt") as root:
        assert_tree(root, tree)


def test_kernel_sees_a_tree_without_blobs(tmp_path: Path) -> None:
    tree = directory({b"a": file(b""), b"l": symlink(b"x" * 4000), b"d": directory({})})
    _, path = make(tmp_path, tree, Options(blob_count=0, prefetch=(b"/a",)))
    with mounted(path, [], tmp_path / "mnt") as root:
        assert_tree(root, tree)


def test_kernel_finds_each_of_very_many_names(tmp_path: Path) -> None:
    names = [b"%06d" % number for number in range(100_000)]
    _, path = make(tmp_path, directory(dict.fromkeys(names, file(b""))), Options(blob_count=0))
    with mounted(path, [], tmp_path / "mnt") as root:
        assert sorted(os.listdir(os.fsencode(root))) == names
        for name in names[::1009]:
            assert os.lstat(on_disk(root, name)).st_size == 0
        assert not os.path.lexists(on_disk(root, b"0999990"))


def test_kernel_reads_large_files_chunk_by_chunk(tmp_path: Path) -> None:
    parts = [hashlib.sha256(b"%d" % n).digest() * 128 for n in range(64)]
    shuffled = parts[::-1] + parts[::3]
    tree = directory({b"a-straight": file(b"".join(parts)), b"shuffled": file(b"".join(shuffled) + b"end")})
    image, path = make(tmp_path, tree, Options())
    bootstrap = Bootstrap(image.bootstrap)
    assert bootstrap.resolve(b"/a-straight").u != bootstrap.resolve(b"/shuffled").u
    with mounted(path, image.write_devices(tmp_path), tmp_path / "mnt") as root:
        assert_tree(root, tree)


@pytest.mark.needs_fixtures
def test_kernel_reads_the_image_of_another_tool(tmp_path: Path) -> None:
    blob_id = "be7d77eeb719f70884758d1aa800ed0fb09d701aaec469964e9d54325f0d5fef"
    blob = (fixtures_dir() / blob_id).read_bytes()
    device = tmp_path / "device"
    first = decompress(Compressor.ZSTD, blob[:4828], 16931)
    second = decompress(Compressor.ZSTD, blob[4828 : 4828 + 2974], 13400)
    device.write_bytes((first.ljust(20480, b"\0") + second).ljust(36864, b"\0"))
    with mounted(fixtures_dir() / "rafs-v6-2.2.boot", [device], tmp_path / "mnt") as root:
        assert (root / "lib.rs").read_bytes() == first
        assert (root / "sync_io.rs").read_bytes() == second
        assert root.stat().st_nlink == 2
