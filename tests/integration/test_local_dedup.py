"""Images that share chunks, mounted by every driver: what the cache has of one is not fetched again."""

import filecmp
import os
import random
import shutil
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from backend.chunk_index import INDEX_NAME
from fuse.supervisor.main import LOG_NAME
from tests.integration.cli_machine import Machine, unmount_anyway
from tests.integration.kernel_drivers import driven, need_erofs_events
from tests.mount_rig import MemoryStore, make_store, mounted
from tests.rafs_image import Node, Options, directory, file

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]

MIB = 1 << 20
DRIVERS = ["erofs", "fuse", "pyfuse3"]


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    if request.param == "erofs":
        need_erofs_events()
    return str(request.param)


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def tree(changed: int) -> Node:
    """Large and small files; `changed` decides the bytes of one of each."""
    small = {b"%02d" % number: file(bytes([number]) * (number * 331 + 1)) for number in range(40)}
    return directory(
        {
            b"large": file(noise(9 * MIB + 1234, 1)),
            b"changed": file(noise(2 * MIB, changed)),
            b"small": directory(small),
            b"new": file(b"%d\n" % changed),
        }
    )


@asynccontextmanager
async def live(tmp_path: Path, store: MemoryStore, driver: str) -> AsyncIterator[Path]:
    if driver == "pyfuse3":
        async with mounted(tmp_path, store) as session:
            yield session.mountpoint
    else:
        async with driven(tmp_path, store, driver) as mount:
            yield mount.path


def assert_contents(mount: Path, changed: int) -> None:
    assert (mount / "large").read_bytes() == noise(9 * MIB + 1234, 1)
    assert (mount / "changed").read_bytes() == noise(2 * MIB, changed)
    assert (mount / "new").read_bytes() == b"%d\n" % changed
    for number in range(40):
        assert (mount / "small" / f"{number:02d}").read_bytes() == bytes([number]) * (number * 331 + 1)


@pytest.mark.parametrize("batch", [False, True], ids=["alone", "batches"])
async def test_the_second_image_fetches_what_is_new(tmp_path: Path, driver: str, batch: bool) -> None:
    options = Options(chunk_size=MIB, batch=batch)
    fetched = []
    for changed in (2, 3):
        store = make_store(tmp_path / f"made{changed}", tree(changed), options)
        async with live(tmp_path, store, driver) as mount:
            await trio.to_thread.run_sync(assert_contents, mount, changed)
        fetched.append(sum(length for _, length in store.readers[0].requests))
    assert fetched[0] > 11 * MIB
    assert fetched[1] < 2 * MIB + 300_000


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A host of which nothing runs afterwards."""
    host = Machine(tmp_path)
    for name in ("mnt1", "mnt2"):
        (tmp_path / name).mkdir()
    yield host
    for name in ("mnt1", "mnt2"):
        if os.path.ismount(tmp_path / name):
            host.run("umount", tmp_path / name)
        unmount_anyway(tmp_path / name)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two versions of a directory."""
    first = tmp_path_factory.mktemp("sources") / "v1"
    (first / "few").mkdir(parents=True)
    for number in range(6):
        (first / f"large{number}").write_bytes(noise(8 * MIB, number))
    for number in range(2000):
        (first / "few" / f"{number}").write_bytes(noise(3000, 1000 + number))
    second = first.with_name("v2")
    shutil.copytree(first, second)
    with (second / "large3").open("r+b") as changed:
        changed.seek(3 * MIB)
        changed.write(b"changed")
    return first, second


@pytest.fixture(scope="module")
def images(sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    builder = Machine(tmp_path_factory.mktemp("builder"))
    made = []
    for source in sources:
        made.append(f"dir:{tmp_path_factory.mktemp('image')}")
        builder.nydus("build", source, made[-1])
    return made[0], made[1]


def is_same(source: Path, mount: Path) -> bool:
    done = subprocess.run(["diff", "-r", source, mount], check=False, timeout=120)
    return done.returncode == 0


def test_status_tells_what_was_copied(
    machine: Machine, images: tuple[str, str], sources: tuple[Path, Path], driver: str
) -> None:
    first, second = machine.directory / "mnt1", machine.directory / "mnt2"
    machine.nydus("mount", "--driver", driver, images[0], first)
    assert is_same(sources[0], first)
    machine.nydus("umount", first)
    machine.nydus("mount", "--driver", driver, "--prefetch", "all", images[1], second)
    assert is_same(sources[1], second)
    (status,) = machine.statuses(second)
    copied, fetched = status["copied_bytes"], status["fetched_bytes"]
    assert isinstance(copied, int)
    assert isinstance(fetched, int)
    assert copied > 52 * MIB
    assert fetched < 2 * MIB
    assert "copied   5" in machine.nydus("status", second)


def test_both_are_mounted_and_read_at_once(
    machine: Machine, images: tuple[str, str], sources: tuple[Path, Path], driver: str
) -> None:
    """Under EROFS the donor is a device that is watched while chunks are taken out of it."""
    mounts = machine.directory / "mnt1", machine.directory / "mnt2"
    for image, mount in zip(images, mounts, strict=True):
        machine.nydus("mount", "--driver", driver, image, mount)
    readers = [
        threading.Thread(target=is_same, args=pair) for pair in (*zip(sources, mounts, strict=True),) * 2
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert all(is_same(source, mount) for source, mount in zip(sources, mounts, strict=True))


@pytest.mark.parametrize("kernel", ["erofs", "fuse"])
@pytest.mark.slow
def test_killed_while_it_copies_and_with_a_broken_index(
    machine: Machine, images: tuple[str, str], sources: tuple[Path, Path], kernel: str
) -> None:
    if kernel == "erofs":
        need_erofs_events()
    first, second = machine.directory / "mnt1", machine.directory / "mnt2"
    machine.nydus("mount", "--driver", kernel, images[0], first)
    assert is_same(sources[0], first)
    machine.nydus("umount", first)
    index, blobs = machine.directory / "cache" / INDEX_NAME, machine.directory / "cache" / "blobs"
    held = set(os.listdir(blobs))
    for round_number in range(3):
        machine.nydus("mount", "--driver", kernel, images[1], second)
        (status,) = machine.statuses(second)
        reader = threading.Thread(target=is_same, args=(sources[1], second))
        reader.start()
        while not filecmp.cmp(sources[1] / f"large{round_number}", second / f"large{round_number}", False):
            pass
        assert isinstance(status["pid"], int)
        os.kill(status["pid"], signal.SIGKILL)
        reader.join()
        assert is_same(sources[1], second)
        machine.nydus("umount", second)
        for path in blobs.iterdir():
            if path.name not in held:
                path.unlink()
        index.write_bytes(noise(1000, round_number) if round_number else b"")
    assert "made anew" in (machine.directory / "run" / LOG_NAME).read_text()
