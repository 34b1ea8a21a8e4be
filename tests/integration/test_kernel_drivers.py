"""The kernel's EROFS with fanotify, and our own /dev/fuse: what both must do, and what each does alone."""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from backend.contract import BackendError
from fuse.erofs.driver import (
    COMPLETE_READAHEAD_KIB,
    LAZY_READAHEAD_KIB,
    ErofsHost,
    ErofsMount,
    ErofsUnavailable,
)
from fuse.erofs.mount_api import BDIS
from fuse.mountpoint import MountBusy
from rafs.codec import Compressor
from tests.integration.kernel_drivers import driven, need_erofs_events
from tests.integration.test_mount_pyfuse3 import noise
from tests.mount_rig import make_store
from tests.mounted_tree import assert_tree
from tests.posix_tree import posix_tree
from tests.rafs_image import Options, directory, file, symlink

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]

T = TypeVar("T")
MIB = 1 << 20
ROOT = Path(__file__).parents[2]
BUSYBOX = Path("/bin/busybox")


async def outside(function: Callable[..., T], *arguments: object) -> T:
    """Runs what touches the mount in a thread: the loop has to answer it."""
    return await trio.to_thread.run_sync(function, *arguments)


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


@pytest.fixture(params=["erofs", "fuse"])
def driver(request: pytest.FixtureRequest) -> str:
    if request.param == "erofs":
        need_erofs_events()
    return str(request.param)


@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(blob_count=3, compressor=Compressor.LZ4_BLOCK, chunk_size=8192),
        Options(batch=True, chunk_size=1 << 20),
    ],
    ids=["plain", "three blobs", "batches"],
)
async def test_the_kernel_sees_the_same_tree(tmp_path: Path, driver: str, options: Options) -> None:
    tree = posix_tree()
    async with driven(tmp_path, make_store(tmp_path / "made", tree, options), driver) as live:
        await outside(assert_tree, live.path, tree)
        await outside(drop_caches)
        await outside(assert_tree, live.path, tree)


async def test_only_what_is_read_is_fetched(tmp_path: Path, driver: str) -> None:
    content = noise(32 * MIB)
    store = make_store(tmp_path / "made", directory({b"f": file(content)}), Options(chunk_size=MIB))
    async with driven(tmp_path, store, driver) as live:

        def read() -> bytes:
            with (live.path / "f").open("rb", buffering=0) as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                return os.pread(stream.fileno(), 4096, 20 * MIB)

        assert await outside(read) == content[20 * MIB : 20 * MIB + 4096]
        assert live.image.statistics().chunks_stored < 4


async def test_mapping_and_running(tmp_path: Path, driver: str) -> None:
    if not BUSYBOX.exists():
        pytest.skip("not installed: busybox-static")
    busybox = BUSYBOX.read_bytes()
    tree = directory({b"busybox": file(busybox, mode=0o755)})
    async with driven(tmp_path, make_store(tmp_path / "made", tree), driver) as live:
        # In another process: a page fault would hold the interpreter, and with it those who answer.
        code = "import mmap, sys, hashlib; f = open(sys.argv[1], 'rb'); "
        code += "print(hashlib.md5(mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)).hexdigest())"
        arguments = [sys.executable, "-c", code, str(live.path / "busybox")]
        mapped = await outside(lambda: subprocess.run(arguments, capture_output=True, text=True, check=True))
        assert mapped.stdout.strip() == hashlib.md5(busybox).hexdigest()
        await outside(drop_caches)
        # By way of a program from elsewhere: this process stops in vfork until the exec is over, with the
        # interpreter's lock, and could not answer the kernel, which looks for the file here.
        step = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
        command = [sys.executable, "-c", step, str(live.path / "busybox"), "echo", "runs"]
        done = await outside(lambda: subprocess.run(command, capture_output=True, text=True, check=True))
        assert done.stdout == "runs\n"


async def test_a_container_runs_on_an_overlay(tmp_path: Path, driver: str) -> None:
    if not BUSYBOX.exists():
        pytest.skip("not installed: busybox-static")
    names = (b"sh", b"cat", b"md5sum", b"cp")
    tree = directory(
        {
            b"bin": directory(
                {b"busybox": file(BUSYBOX.read_bytes(), mode=0o755)}
                | {name: symlink(b"busybox") for name in names}
            ),
            b"data": file(noise(300_000)),
        }
    )
    script = "cat /data > /copy && echo more >> /data && md5sum /copy"
    for name in ("upper", "work", "root"):
        (tmp_path / name).mkdir()
    async with driven(tmp_path, make_store(tmp_path / "made", tree), driver) as live:

        def run() -> str:
            layers = f"lowerdir={live.path},upperdir={tmp_path}/upper,workdir={tmp_path}/work"
            subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, tmp_path / "root"], check=True)
            try:
                command = ["chroot", str(tmp_path / "root"), "/bin/sh", "-c", script]
                return subprocess.run(command, capture_output=True, text=True, check=True).stdout
            finally:
                subprocess.run(["umount", tmp_path / "root"], check=True)

        assert (await outside(run)).split()[0] == hashlib.md5(noise(300_000)).hexdigest()
        assert (tmp_path / "upper" / "data").read_bytes() == noise(300_000) + b"more\n"
        assert await outside((live.path / "data").read_bytes) == noise(300_000)


@pytest.mark.parametrize("count", [200, 254])
async def test_an_image_of_very_many_blobs(tmp_path: Path, driver: str, count: int) -> None:
    tree = directory({b"f%03d" % n: file(noise(5000 + n, n)) for n in range(2 * count)})
    store = make_store(tmp_path / "made", tree, Options(blob_count=count))
    async with driven(tmp_path, store, driver) as live:
        for number in (0, 1, count - 1, count, 2 * count - 1):
            content = await outside((live.path / f"f{number:03d}").read_bytes)
            assert content == noise(5000 + number, number)


async def test_a_hundred_thousand_names(tmp_path: Path, driver: str) -> None:
    names = [b"%06d" % number for number in range(100_000)]
    tree = directory(dict.fromkeys(names, file(b"same")))
    async with driven(tmp_path, make_store(tmp_path / "made", tree), driver) as live:
        found = await outside(os.listdir, live.path)
        assert sorted(map(os.fsencode, found)) == names
        assert await outside((live.path / "099999").read_bytes) == b"same"
        assert not await outside((live.path / "absent").exists)


@pytest.mark.logs_warning
async def test_a_source_that_fails_is_eio_and_heals(tmp_path: Path, driver: str) -> None:
    store = make_store(tmp_path / "made", directory({b"f": file(noise(10_000)), b"g": file(noise(9_000, 1))}))

    def fail(number: int, offset: int, data: bytes) -> bytes:
        raise BackendError(where="memory", why="gone")

    async with driven(tmp_path, store, driver) as live:
        store.readers[0].script = fail
        with pytest.raises(OSError) as caught:
            await outside((live.path / "f").read_bytes)
        assert caught.value.errno == errno.EIO
        store.readers[0].script = lambda number, offset, data: data
        assert await outside((live.path / "f").read_bytes) == noise(10_000)
        assert await outside((live.path / "g").read_bytes) == noise(9_000, 1)


@pytest.mark.logs_warning
async def test_a_source_that_hangs_is_eio_after_the_deadline_and_heals(tmp_path: Path, driver: str) -> None:
    store = make_store(tmp_path / "made", directory({b"f": file(noise(10_000))}))
    async with driven(tmp_path, store, driver, timeout_s=0.3) as live:
        store.readers[0].hold()
        with pytest.raises(OSError) as caught:
            await outside((live.path / "f").read_bytes)
        assert caught.value.errno == errno.EIO
        store.readers[0].release()
        assert await outside((live.path / "f").read_bytes) == noise(10_000)


async def test_a_killed_reader_leaves_the_mount_usable(tmp_path: Path, driver: str) -> None:
    store = make_store(tmp_path / "made", directory({b"f": file(noise(10_000))}))
    async with driven(tmp_path, store, driver) as live:
        store.readers[0].hold()
        process = await outside(lambda: subprocess.Popen(["cat", live.path / "f"], stdout=subprocess.DEVNULL))
        await store.readers[0].wait_requests(1)
        process.send_signal(signal.SIGKILL)
        await outside(process.wait)
        store.readers[0].release()
        assert await outside((live.path / "f").read_bytes) == noise(10_000)


async def test_a_busy_mount_stays_and_is_served(tmp_path: Path, driver: str) -> None:
    store = make_store(tmp_path / "made", directory({b"f": file(noise(100_000))}))
    async with driven(tmp_path, store, driver) as live:
        stream = await outside(lambda: (live.path / "f").open("rb"))
        with pytest.raises(MountBusy):
            await live.unmount()
        await live.unmount(lazy=True)
        # Detached, and nothing of it was read before: it must still be filled, never be zeros.
        assert await outside(stream.read) == noise(100_000)
        await outside(stream.close)


async def test_statfs_and_refused_changes(tmp_path: Path, driver: str) -> None:
    tree = directory({b"f": file(noise(10_000), {b"user.a": b"0"}), b"d": directory({})})
    async with driven(tmp_path, make_store(tmp_path / "made", tree), driver) as live:
        size = await outside(os.statvfs, live.path)
        assert (size.f_bfree, size.f_bavail) == (0, 0)
        for change in (
            lambda: (live.path / "new").touch(),
            lambda: (live.path / "f").unlink(),
            lambda: (live.path / "f").chmod(0o600),
            lambda: os.setxattr(live.path / "f", "user.a", b"1"),
            lambda: (live.path / "f").open("r+b"),
        ):
            with pytest.raises(OSError) as caught:
                await outside(change)
            assert caught.value.errno == errno.EROFS


async def test_a_complete_image_raises_no_events(tmp_path: Path) -> None:
    need_erofs_events()
    content = noise(3_000_000)
    async with driven(
        tmp_path, make_store(tmp_path / "made", directory({b"f": file(content)})), "erofs"
    ) as live:
        assert await outside((live.path / "f").read_bytes) == content
        assert live.image.is_complete()
        hits = live.image.statistics().hits
        await outside(drop_caches)
        assert await outside((live.path / "f").read_bytes) == content
        assert live.image.statistics().hits == hits


async def test_the_kernel_reads_ahead_as_usual_once_the_image_is_complete(tmp_path: Path) -> None:
    """A large readahead saves events; without events it costs cache misses and large pages."""
    need_erofs_events()
    store = make_store(tmp_path / "made", directory({b"f": file(noise(3 * MIB))}))
    async with driven(tmp_path, store, "erofs") as live:
        assert isinstance(live.mount, ErofsMount)
        readahead_kib = BDIS / live.mount.superblock / "read_ahead_kb"
        assert int(readahead_kib.read_text()) == LAZY_READAHEAD_KIB
        await outside((live.path / "f").read_bytes)
        assert int(readahead_kib.read_text()) == COMPLETE_READAHEAD_KIB
    async with driven(tmp_path, store, "erofs") as live:
        assert isinstance(live.mount, ErofsMount)
        readahead_kib = BDIS / live.mount.superblock / "read_ahead_kb"
        assert int(readahead_kib.read_text()) == COMPLETE_READAHEAD_KIB


async def test_the_second_mount_of_a_complete_image_needs_nobody(tmp_path: Path) -> None:
    need_erofs_events()
    content = noise(3_000_000)
    store = make_store(tmp_path / "made", directory({b"f": file(content)}))
    async with driven(tmp_path, store, "erofs") as live:
        await outside((live.path / "f").read_bytes)
    await outside(drop_caches)
    requests = len(store.readers[0].requests)
    async with driven(tmp_path, store, "erofs") as live:
        # In this thread, which is the one that would have to answer.
        assert (live.path / "f").read_bytes() == content
    assert len(store.readers[0].requests) == requests


async def test_one_blob_in_two_mounts_is_fetched_once(tmp_path: Path) -> None:
    need_erofs_events()
    store = make_store(tmp_path / "made", directory({b"f": file(noise(200_000))}))
    async with driven(tmp_path, store, "erofs") as live:
        assert await outside((live.path / "f").read_bytes) == noise(200_000)
        requests = len(store.readers[0].requests)
        other = tmp_path / "other"
        other.mkdir()
        async with driven(other, store, "erofs") as second:
            assert second.path != live.path
            assert await outside((second.path / "f").read_bytes) == noise(200_000)
        assert len(store.readers[0].requests) > requests  # another cache directory
        assert await outside((live.path / "f").read_bytes) == noise(200_000)


@pytest.mark.logs_warning
async def test_a_device_that_is_shortened_gives_errors_and_no_zeros(tmp_path: Path, driver: str) -> None:
    store = make_store(tmp_path / "made", directory({b"f": file(noise(8 * MIB)), b"g": file(noise(5000, 1))}))
    async with driven(tmp_path, store, driver) as live:
        assert await outside((live.path / "g").read_bytes) == noise(5000, 1)
        (device,) = (tmp_path / "cache" / "blobs").glob("*.blob.data")
        if driver == "erofs":
            # While it is watched, nobody can shorten it through truncate(2).
            with pytest.raises(PermissionError):
                await outside(os.truncate, device, 4096)
        await outside(lambda: os.close(os.open(device, os.O_WRONLY | os.O_TRUNC)))
        await outside(drop_caches)
        for name in ("f", "g"):
            with pytest.raises(OSError) as caught:
                await outside((live.path / name).read_bytes)
            assert caught.value.errno == errno.EIO


@pytest.mark.logs_warning
async def test_a_complete_device_that_is_shortened_gives_errors_and_no_zeros(tmp_path: Path) -> None:
    need_erofs_events()
    store = make_store(tmp_path / "made", directory({b"f": file(noise(3 * MIB))}))
    async with driven(tmp_path, store, "erofs") as live:
        assert await outside((live.path / "f").read_bytes) == noise(3 * MIB)
        assert live.image.is_complete()
        (device,) = (tmp_path / "cache" / "blobs").glob("*.blob.data")
        await outside(lambda: os.close(os.open(device, os.O_WRONLY | os.O_TRUNC)))
        await trio.testing.wait_all_tasks_blocked(0.1)
        await outside(drop_caches)
        with pytest.raises(OSError) as caught:
            await outside((live.path / "f").read_bytes)
        assert caught.value.errno == errno.EIO


async def test_without_the_capability_erofs_is_refused_with_the_reason() -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("not installed: setpriv")
    code = "from fuse.erofs.fanotify import create_group; create_group()"
    command = ["setpriv", "--bounding-set=-sys_admin", sys.executable, "-c", code]
    done = await outside(
        lambda: subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    )
    assert done.stderr.splitlines()[-1].startswith("PermissionError")


@contextmanager
def tmpfs(path: Path, size: str) -> Iterator[None]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


async def test_a_cache_on_tmpfs_is_refused_by_erofs_with_the_reason(tmp_path: Path) -> None:
    need_erofs_events()
    with tmpfs(tmp_path / "cache", "10m"):
        store = make_store(tmp_path / "made", directory({b"f": file(b"x")}))
        with pytest.raises(ExceptionGroup) as caught:
            async with driven(tmp_path, store, "erofs"):
                pytest.fail("mounted")
        (error,) = caught.value.exceptions
        assert isinstance(error, ErofsUnavailable)
        assert "put the cache on ext4" in str(error)


def test_an_old_kernel_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        release = "6.12.0-amd64"

    monkeypatch.setattr(os, "uname", Old)
    with pytest.raises(ErofsUnavailable, match=r"6\.12\.0-amd64 is older than 6\.15"):
        ErofsHost.require(None)  # type: ignore[arg-type]


@pytest.mark.logs_warning
async def test_a_full_disk_is_an_error_for_erofs_and_no_zeros(tmp_path: Path) -> None:
    need_erofs_events()
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("not installed: mkfs.ext4")
    image = tmp_path / "disk"
    with image.open("wb") as stream:
        stream.truncate(8 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    (tmp_path / "cache").mkdir()
    subprocess.run(["mount", "-o", "loop", image, tmp_path / "cache"], check=True)
    try:
        store = make_store(
            tmp_path / "made", directory({b"f": file(noise(20 * MIB)), b"g": file(noise(4096, 1))})
        )
        async with driven(tmp_path, store, "erofs") as live:
            assert await outside((live.path / "g").read_bytes) == noise(4096, 1)
            with pytest.raises(OSError) as caught:
                await outside((live.path / "f").read_bytes)
            assert caught.value.errno == errno.EIO
    finally:
        subprocess.run(["umount", "-l", tmp_path / "cache"], check=True)


async def test_passthrough_of_a_large_complete_file(tmp_path: Path) -> None:
    large = noise(20 * MIB)
    tree = directory({b"large": file(large), b"small": file(b"x")})
    store = make_store(tmp_path / "made", tree, Options(chunk_size=MIB))
    async with driven(tmp_path, store, "fuse", passthrough=True) as live:
        path = live.path / "large"
        assert await outside(path.read_bytes) == large  # ordinary: it was not complete
        assert await outside((live.path / "small").read_bytes) == b"x"
        assert await outside(path.read_bytes) == large  # still ordinary, and starts the copy
        clones = tmp_path / "cache" / "files"
        deadline = time.monotonic() + 30
        while not [clone for clone in clones.glob("*") if not clone.name.endswith(".new")]:
            assert time.monotonic() < deadline
            await trio.sleep(0.01)
        await outside(drop_caches)
        hits = live.image.statistics().hits
        assert await outside(path.read_bytes) == large
        assert live.image.statistics().hits == hits  # the kernel has read it itself


async def test_passthrough_waits_until_nobody_has_the_file_open_otherwise(tmp_path: Path) -> None:
    large = noise(17 * MIB)
    store = make_store(tmp_path / "made", directory({b"large": file(large)}), Options(chunk_size=MIB))
    async with driven(tmp_path, store, "fuse", passthrough=True) as live:
        path = live.path / "large"
        stream = await outside(lambda: path.open("rb"))
        assert await outside(stream.read) == large
        for _ in range(3):  # the kernel fails a mix of the two modes with EIO
            assert await outside(path.read_bytes) == large
        await outside(stream.close)
        assert await outside(path.read_bytes) == large
