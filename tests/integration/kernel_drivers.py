"""Mounts through the agent's drivers, in the process of the test: no supervisor, everything else is real."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from backend.fetch_pool import FetchOptions
from backend.shelf import BlobShelf
from fuse.devfuse.driver import attach_fuse
from fuse.driver import DriverMount, DriverOptions
from fuse.erofs.driver import KERNEL_MIN, ErofsHost
from fuse.erofs.events import EventOptions
from fuse.image import OpenedImage, open_image
from fuse.keeper import MemoryKeeper
from fuse.mount_watch import MountWatch
from fuse.mountpoint import NothingMounted, unmount
from tests.mount_rig import MemoryStore

GONE_S = 10.0


def need_erofs_events() -> None:
    """Skips where the kernel has no pre-content events with ranges, or no EROFS."""
    version = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    if version < KERNEL_MIN:
        pytest.skip(f"Linux {os.uname().release} is older than {'.'.join(map(str, KERNEL_MIN))}")
    if "erofs" not in Path("/proc/filesystems").read_text():
        pytest.skip("the kernel has no EROFS")


@dataclass
class LiveDriver:
    """A mount and what is under it."""

    path: Path
    mount: DriverMount
    image: OpenedImage
    keeper: MemoryKeeper = field(default_factory=MemoryKeeper)

    async def unmount(self, *, lazy: bool = False) -> None:
        """Unmounts, outside of the loop that serves it."""
        await trio.to_thread.run_sync(lambda: unmount(self.path, lazy=lazy))


@asynccontextmanager
async def driven(
    tmp_path: Path, store: MemoryStore, driver: str, *, timeout_s: float = 20.0, passthrough: bool = False
) -> AsyncIterator[LiveDriver]:
    """The image mounted at `tmp_path`/mnt, its cache in `tmp_path`/cache; gone when the block ends."""
    path = tmp_path / "mnt"
    path.mkdir(exist_ok=True)
    metadata = await store.fetch_metadata(tmp_path / "images")
    keeper, watch = MemoryKeeper(), MountWatch()
    host = ErofsHost(keeper, watch, EventOptions(timeout_s))
    options = DriverOptions(allow_other=True, passthrough=passthrough, read_timeout_s=timeout_s)

    async def hold(kind: str, values: object, descriptors: object = ()) -> None:
        await trio.lowlevel.checkpoint()

    async with open_image(store, metadata, tmp_path / "cache", BlobShelf(), FetchOptions()) as image:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch.run)
                nursery.start_soon(host.serve)
                if driver == "erofs":
                    mount: DriverMount = await host.attach(image, path, options, hold)
                else:
                    mount = await attach_fuse(image, path, options, hold)
                gone = trio.Event()
                nursery.start_soon(_serve, mount, gone)
                live = LiveDriver(path, mount, image, keeper)
                try:
                    yield live
                finally:
                    with trio.CancelScope(shield=True):
                        with suppress(NothingMounted):
                            await live.unmount(lazy=True)
                        with trio.fail_after(GONE_S):
                            await gone.wait()
                        await mount.release()
                nursery.cancel_scope.cancel()
        finally:
            with suppress(NothingMounted):
                unmount(path, lazy=True)


async def _serve(mount: DriverMount, gone: trio.Event) -> None:
    await mount.serve()
    gone.set()
