"""Real mounts through pyfuse3 of images in memory."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from backend.contract import BackendError
from backend.prefetch_mode import PrefetchMode
from fuse.mount_table import find_mount
from fuse.mountpoint import (
    AlreadyMounted,
    MountBusy,
    MountpointNotEmpty,
    NothingMounted,
    is_dead,
    prepare_mountpoint,
    unmount,
)
from fuse.session import MountSession
from rafs.codec import Compressor
from tests.mount_rig import make_store, mounted
from tests.mounted_tree import assert_tree
from tests.posix_tree import posix_tree
from tests.rafs_image import Node, Options, directory, file, symlink

pytestmark = pytest.mark.needs_fuse

T = TypeVar("T")


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


async def outside(function: Callable[..., T], *arguments: object) -> T:
    """Runs what touches the mount in a thread: the loop has to answer it."""
    return await trio.to_thread.run_sync(function, *arguments)


@pytest.mark.needs_root
@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(blob_count=3, compressor=Compressor.LZ4_BLOCK, chunk_size=8192),
        Options(batch=True, chunk_size=1 << 20),
        Options(compressor=Compressor.GZIP),
    ],
    ids=["plain", "three blobs", "batches", "gzip"],
)
async def test_the_kernel_sees_the_same_tree(tmp_path: Path, options: Options) -> None:
    tree = posix_tree()
    async with mounted(tmp_path, make_store(tmp_path / "made", tree, options)) as session:
        await outside(assert_tree, session.mountpoint, tree)
        await outside(assert_tree, session.mountpoint, tree)
    assert find_mount(tmp_path / "mnt") is None


async def test_cache_is_used_again_by_the_next_mount(tmp_path: Path) -> None:
    tree = directory({b"f": file(noise(3_000_000))})
    for requests_expected in (True, False):
        store = make_store(tmp_path / "made", tree, Options(chunk_size=1 << 20))
        async with mounted(tmp_path, store) as session:
            assert await outside((session.mountpoint / "f").read_bytes) == noise(3_000_000)
        assert bool(store.readers[0].requests) is requests_expected


async def test_two_mounts_share_a_cache(tmp_path: Path) -> None:
    """pyfuse3 allows one mount in a process: the other one is the file system without a mount."""
    from tests.mount_rig import served

    tree = directory({b"f": file(noise(100_000))})
    store = make_store(tmp_path / "made", tree)
    async with served(tmp_path, store) as other, mounted(tmp_path, store) as session:
        assert await outside((session.mountpoint / "f").read_bytes) == noise(100_000)
        for fetcher in session.fetchers.values():
            await fetcher.cached.flush()
        handle = other.filesystem.open_file(other.ino(b"/f"))
        assert other.filesystem.read_ready(handle, 0, 100_000) == noise(100_000)


async def test_a_small_read_moves_little(tmp_path: Path) -> None:
    tree = directory({b"big": file(noise(64 << 20))})
    store = make_store(tmp_path / "made", tree, Options(chunk_size=1 << 20, compressor=Compressor.NONE))

    def read(path: Path) -> bytes:
        with path.open("rb", buffering=0) as stream:
            stream.seek(40 << 20)
            return stream.read(4096)

    async with mounted(tmp_path, store) as session:
        await outside(read, session.mountpoint / "big")
        assert session.statistics().bytes_fetched <= 2 << 20


async def test_names_that_are_not_there_are_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with mounted(tmp_path, make_store(tmp_path / "made", directory({b"f": file(b"x")}))) as session:
        from fuse.filesystem import ImageFilesystem

        asked = []
        original = ImageFilesystem.lookup

        def lookup(self: ImageFilesystem, parent: int, name: bytes) -> object:
            asked.append(name)
            return original(self, parent, name)

        monkeypatch.setattr(ImageFilesystem, "lookup", lookup)
        for _ in range(3):
            assert not await outside((session.mountpoint / "absent").exists)
            assert await outside((session.mountpoint / "f").exists)
        assert sorted(asked) == [b"absent", b"f"]


def _modifications(root: Path) -> Iterator[Callable[[], object]]:
    yield lambda: (root / "new").touch()
    yield lambda: (root / "new").mkdir()
    yield lambda: (root / "f").unlink()
    yield lambda: (root / "d").rmdir()
    yield lambda: (root / "f").rename(root / "g")
    yield lambda: (root / "new").symlink_to("f")
    yield lambda: os.link(root / "f", root / "new")
    yield lambda: os.mkfifo(root / "new")
    yield lambda: (root / "f").chmod(0o600)
    yield lambda: os.utime(root / "f")
    yield lambda: os.truncate(root / "f", 0)
    yield lambda: (root / "f").open("r+b")
    yield lambda: (root / "f").open("ab")
    yield lambda: os.setxattr(root / "f", "user.a", b"1")
    yield lambda: os.removexattr(root / "f", "user.a")


async def test_every_modification_is_refused(tmp_path: Path) -> None:
    tree = directory({b"f": file(b"x", {b"user.a": b"0"}), b"d": directory({})})
    async with mounted(tmp_path, make_store(tmp_path / "made", tree)) as session:
        for modify in _modifications(session.mountpoint):
            with pytest.raises(OSError) as caught:
                await outside(modify)
            assert caught.value.errno == errno.EROFS


async def test_xattrs_and_their_buffer_sizes(tmp_path: Path) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    xattrs = {b"user.binary": bytes(range(256)), b"user.empty": b""}
    tree = directory({b"f": file(b"x", xattrs), b"none": file(b"y")})
    async with mounted(tmp_path, make_store(tmp_path / "made", tree)) as session:
        path = session.mountpoint / "f"
        assert sorted(await outside(os.listxattr, path)) == ["user.binary", "user.empty"]
        assert await outside(os.getxattr, path, "user.binary") == bytes(range(256))
        assert await outside(os.getxattr, path, "user.empty") == b""
        with pytest.raises(OSError) as caught:
            await outside(os.getxattr, path, "user.other")
        assert caught.value.errno == errno.ENODATA
        assert await outside(os.listxattr, session.mountpoint / "none") == []

        def short() -> int:
            buffer = ctypes.create_string_buffer(10)
            assert libc.getxattr(os.fsencode(path), b"user.binary", buffer, 10) == -1
            return ctypes.get_errno()

        assert await outside(short) == errno.ERANGE


async def test_statfs(tmp_path: Path) -> None:
    tree = directory({b"f": file(noise(10_000))})
    async with mounted(tmp_path, make_store(tmp_path / "made", tree)) as session:
        size = await outside(os.statvfs, session.mountpoint)
        assert (size.f_bfree, size.f_bavail, size.f_files, size.f_namemax) == (0, 0, 2, 255)
        assert size.f_blocks * size.f_frsize > 10_000


@pytest.mark.logs_warning
async def test_failing_source_is_eio_and_heals(tmp_path: Path) -> None:
    store = make_store(tmp_path / "made", directory({b"f": file(noise(10_000))}))

    def fail(number: int, offset: int, data: bytes) -> bytes:
        raise BackendError(where="memory", why="gone")

    async with mounted(tmp_path, store) as session:
        store.readers[0].script = fail
        with pytest.raises(OSError) as caught:
            await outside((session.mountpoint / "f").read_bytes)
        assert caught.value.errno == errno.EIO
        store.readers[0].script = lambda number, offset, data: data
        assert await outside((session.mountpoint / "f").read_bytes) == noise(10_000)


@pytest.mark.logs_warning
async def test_a_fault_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fuse.filesystem import ImageFilesystem

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    async with mounted(tmp_path, make_store(tmp_path / "made", directory({b"f": file(b"x")}))) as session:
        with monkeypatch.context() as patch:
            patch.setattr(ImageFilesystem, "read_ready", fail)
            patch.setattr(ImageFilesystem, "lookup", fail)
            patch.setattr(ImageFilesystem, "open_directory", fail)
            for attempt in ((session.mountpoint / "f").read_bytes, (session.mountpoint / "g").exists):
                with pytest.raises(OSError) as caught:
                    await outside(attempt)
                assert caught.value.errno == errno.EIO
        assert await outside((session.mountpoint / "f").read_bytes) == b"x"


async def test_killed_reader_leaves_the_mount_usable(tmp_path: Path) -> None:
    store = make_store(tmp_path / "made", directory({b"f": file(noise(10_000)), b"g": file(b"y")}))
    async with mounted(tmp_path, store) as session:
        store.readers[0].hold()
        process = await outside(
            lambda: subprocess.Popen(["cat", session.mountpoint / "f"], stdout=subprocess.DEVNULL)
        )
        await store.readers[0].wait_requests(1)
        process.kill()
        store.readers[0].release()
        await outside(process.wait)
        assert await outside((session.mountpoint / "g").read_bytes) == b"y"
        assert await outside((session.mountpoint / "f").read_bytes) == noise(10_000)


@pytest.mark.needs_root
@pytest.mark.logs_warning
async def test_full_cache_disk_still_reads(tmp_path: Path) -> None:
    content = noise(2_000_000)
    (tmp_path / "cache").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(tmp_path / "cache")]
    await outside(lambda: subprocess.run(command, check=True))
    try:
        store = make_store(tmp_path / "made", directory({b"f": file(content), b"g": file(b"y")}))
        async with mounted(tmp_path, store) as session:
            assert await outside((session.mountpoint / "f").read_bytes) == content
            assert await outside((session.mountpoint / "g").read_bytes) == b"y"
            assert session.status().cached_bytes <= 512 << 10
    finally:
        unmount(tmp_path / "cache", lazy=True)


async def test_prefetch_all_then_no_more_requests(tmp_path: Path) -> None:
    tree = directory({b"%03d" % i: file(noise(3000, i)) for i in range(200)})
    store = make_store(tmp_path / "made", tree)
    async with mounted(tmp_path, store, PrefetchMode.ALL) as session:
        cached = session.fetchers[0].cached
        while cached.ready_count() < cached.shape.chunk_count:
            await trio.lowlevel.checkpoint()
        requests = len(store.readers[0].requests)
        assert await outside((session.mountpoint / "123").read_bytes) == noise(3000, 123)
        assert len(store.readers[0].requests) == requests <= 3


async def test_prefetch_hints_in_their_order(tmp_path: Path) -> None:
    tree = directory({b"a": file(noise(300_000, 1)), b"b": file(noise(5000, 2)), b"l": symlink(b"b")})
    store = make_store(tmp_path / "made", tree, Options(prefetch=(b"/b",), chunk_size=1 << 20))
    async with mounted(tmp_path, store, PrefetchMode.HINTS) as session:
        cached = session.fetchers[0].cached
        while cached.ready_count() < 1:
            await trio.lowlevel.checkpoint()
        assert [length for _, length in store.readers[0].requests] == [5000]


async def test_unmounted_by_somebody_else(tmp_path: Path) -> None:
    async with mounted(
        tmp_path, make_store(tmp_path / "made", directory({}), Options(blob_count=0))
    ) as session:
        await outside(unmount, session.mountpoint)
        await session.wait_unmounted()
    with pytest.raises(NothingMounted):
        unmount(tmp_path / "mnt")


async def test_busy_mount_names_who_uses_it(tmp_path: Path) -> None:
    tree = directory({b"f": file(b"x")})
    async with mounted(tmp_path, make_store(tmp_path / "made", tree)) as session:
        stream = await outside((session.mountpoint / "f").open)
        with pytest.raises(MountBusy, match=f"{os.getpid()}"):
            await outside(unmount, session.mountpoint)
        await outside(stream.close)
        await outside(unmount, session.mountpoint)
        await session.wait_unmounted()


async def test_mounting_twice_says_so(tmp_path: Path) -> None:
    async with mounted(
        tmp_path, make_store(tmp_path / "made", directory({}), Options(blob_count=0))
    ) as session:
        with pytest.raises(AlreadyMounted, match="mounted here already"):
            await outside(prepare_mountpoint, session.mountpoint)


async def test_broken_mountpoint_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "mnt" / "file").touch()
    store = make_store(tmp_path / "made", directory({b"f": file(b"x")}))
    with pytest.raises(MountpointNotEmpty):
        async with mounted(tmp_path, store):
            pass
    assert not (tmp_path / "cache").exists()


MOUNT_SCRIPT = """
import sys
from pathlib import Path
import trio
from fuse.session import MountSession
from tests.mount_rig import make_store, mounted
from tests.rafs_image import directory, file

async def main(folder: Path) -> None:
    store = make_store(folder / "made", directory({b"f": file(b"x" * 5000)}))
    async with mounted(folder, store) as session:
        await trio.to_thread.run_sync((session.mountpoint / "f").read_bytes)
        with trio.open_signal_receiver(15) as signals:
            print("ready", flush=True)
            async for _ in signals:
                return

trio.run(main, Path(sys.argv[1]))
"""


@pytest.fixture
def mount_process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process with a mount at `tmp_path`/mnt, whatever becomes of it."""
    process = subprocess.Popen(
        [sys.executable, "-c", MOUNT_SCRIPT, tmp_path],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()
        while find_mount(tmp_path / "mnt"):
            unmount(tmp_path / "mnt", lazy=True)


def test_sigterm_unmounts_although_a_file_is_open(
    tmp_path: Path, mount_process: "subprocess.Popen[str]"
) -> None:
    with (tmp_path / "mnt" / "f").open():
        mount_process.send_signal(signal.SIGTERM)
        assert mount_process.wait() == 0
        assert find_mount(tmp_path / "mnt") is None


async def test_mount_of_a_dead_process_is_replaced(
    tmp_path: Path, mount_process: "subprocess.Popen[str]"
) -> None:
    mount_process.kill()
    mount_process.wait()
    assert is_dead(tmp_path / "mnt")
    async with mounted(tmp_path, make_store(tmp_path / "made", directory({b"f": file(b"z")}))) as session:
        assert await outside((session.mountpoint / "f").read_bytes) == b"z"
    assert find_mount(tmp_path / "mnt") is None


async def test_status_socket(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("not installed: curl")

    def ask(session: MountSession, *arguments: str) -> str:
        command = ["curl", "-s", "--unix-socket", str(tmp_path / "status.sock"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    tree: Node = directory({b"f": file(noise(5000))})
    async with mounted(tmp_path, make_store(tmp_path / "made", tree)) as session:
        assert (tmp_path / "status.sock").stat().st_mode & 0o777 == 0o600
        await outside((session.mountpoint / "f").read_bytes)
        answer = await outside(ask, session, "http://mount/api/v1/status")
        assert f'"pid":{os.getpid()}' in answer
        assert '"chunks_stored":2' in answer
        assert "no such resource" in await outside(ask, session, "http://mount/other")
        assert "only GET" in await outside(ask, session, "-XPOST", "http://mount/api/v1/status")
    assert not (tmp_path / "status.sock").exists()
