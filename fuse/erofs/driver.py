"""`--driver erofs`: the kernel reads the cache files itself, and asks for what they lack."""

import errno
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import trio

from backend.fetch import ChunkFetcher
from backend.shelf import BlobShelf
from fuse.driver import DriverOptions, HoldMount
from fuse.erofs.events import EventOptions, EventServer
from fuse.erofs.fanotify import create_group
from fuse.erofs.journal import Journal, Pending, create_memory
from fuse.erofs.mount_api import is_alive, mount_erofs, set_readahead, superblocks
from fuse.image import OpenedImage
from fuse.keeper import HeldEntry, Keeper
from fuse.mount_table import find_mount
from fuse.mount_watch import MountWatch
from fuse.mountpoint import NothingMounted, unmount
from fuse.supervisor.holdings import KIND_EVENTS
from rafs.errors import NydusError
from rafs.record import BLOCK_SIZE

log = logging.getLogger(__name__)

KIND_EROFS = "erofs"
KIND_BLOB = "blob"
"""A blob that is a device: the descriptors of its `CachedBlob`, opened before it was marked."""
KERNEL_MIN = (6, 15)
"""The first kernel whose pre-content events say which bytes are wanted."""
LAZY_READAHEAD_KIB, COMPLETE_READAHEAD_KIB = 1024, 128
"""Of a mount that asks us, and of one that does not any more. Measured: docs/decisions/004."""
MOUNT_TRIES = 5
LINGER_S = 0.01
LINGER_MAX_S = 1.0


class ErofsUnavailable(NydusError):
    """The kernel, the rights or the cache directory do not allow lazy EROFS mounts."""

    message = "the kernel's EROFS cannot be used: {why}"
    exit_code: ClassVar[int] = 86
    errno: ClassVar[int] = errno.ENODEV


@dataclass(slots=True)
class ErofsMount:
    """A mount by EROFS. See `DriverMount`."""

    host: "ErofsHost"
    image: OpenedImage
    mountpoint: Path
    superblock: str
    name: str = "erofs"
    state: str = "mounted"
    devices: list[ChunkFetcher] = field(default_factory=list)

    async def serve(self) -> None:
        """Waits until the superblock is gone: unmounted everywhere, and no file of it open any more."""
        pause_s = LINGER_S
        while is_alive(self.superblock):
            changed = self.host.watch.changed
            try:
                mount = find_mount(self.mountpoint)
            except OSError as error:
                # Short of descriptors for a moment, which is no reason to give a mount up.
                log.info("cannot look whether %s is mounted: %s", self.mountpoint, error.strerror)
                await trio.sleep(LINGER_MAX_S)
                continue
            if mount is not None and mount.filesystem == "erofs":
                self.state, pause_s = "mounted", LINGER_S
                await changed.wait()
            else:
                # In use under another name, or by who has a file open: nothing tells when that ends.
                self.state = "detached"
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, LINGER_MAX_S)

    def adjust_readahead(self) -> None:
        """Has the kernel read ahead as it does by itself, once nothing is lacking: see decision 004."""
        complete = all(fetcher.cached.is_complete() for fetcher in self.devices)
        size_kib = COMPLETE_READAHEAD_KIB if complete else LAZY_READAHEAD_KIB
        try:
            set_readahead(self.superblock, size_kib)
        except OSError as error:
            log.info("readahead of %s stays as it is: %s", self.superblock, error.strerror)

    def follow_readahead(self) -> None:
        """Adjusts readahead now, and whenever a device becomes complete, until `release`."""
        self.adjust_readahead()
        for fetcher in self.devices:
            fetcher.cached.on_complete.append(self.adjust_readahead)

    async def release(self) -> None:
        """Stops watching the devices that no other mount has."""
        for fetcher in self.devices:
            with suppress(ValueError):  # the mount has failed before it followed
                fetcher.cached.on_complete.remove(self.adjust_readahead)
            await self.host.release_device(self.image, fetcher)


class ErofsHost:
    """What all EROFS mounts of an agent share: the group of events, and who answers them."""

    def __init__(self, keeper: Keeper, watch: MountWatch, options: EventOptions) -> None:
        self.watch = watch
        self._keeper = keeper
        self._options = options
        self._events: EventServer | None = None
        self._mounting = trio.Lock()
        self._started = trio.Event()

    def adopt_events(self, entry: HeldEntry, pending: Sequence[Pending]) -> None:
        """Goes on with the group of a dead agent. Nothing is answered before `serve`."""
        self._events = EventServer(
            entry.descriptors[0], Journal(entry.descriptors[1]), self._options, pending
        )

    async def serve(self) -> None:
        """Answers events, as soon as there is a group, until cancelled."""
        if self._events is None:
            await self._started.wait()
        assert self._events is not None
        await self._events.serve()

    def require(self) -> None:
        """Raises `ErofsUnavailable` when it is clear already that mounting would fail. Blocking."""
        release = os.uname().release
        if _version(release) < KERNEL_MIN:
            needed = ".".join(map(str, KERNEL_MIN))
            raise ErofsUnavailable(why=f"Linux {release} is older than {needed}")
        if Path("/proc/sys/kernel/panic_on_warn").read_text().strip() == "1":
            # A warning of the kernel, harmless otherwise, at the first read of a bootstrap on ext4.
            raise ErofsUnavailable(why="kernel.panic_on_warn is set, and mounting a file may raise a warning")

    async def attach(
        self, image: OpenedImage, mountpoint: Path, options: DriverOptions, hold: HoldMount
    ) -> ErofsMount:
        """Mounts. Raises `ErofsUnavailable` whatever the reason: another driver may do."""
        self.require()
        async with self._mounting:
            await self._open_group()
            mount = ErofsMount(self, image, mountpoint, "")
            try:
                async with self._devices(mount) as devices:
                    await hold(KIND_EROFS, {"superblock": ""})
                    async with _unmounted_on_failure(mountpoint):
                        mount.superblock = await self._mount(image, mountpoint, devices)
                        await hold(KIND_EROFS, {"superblock": mount.superblock})
            except OSError as error:
                raise ErofsUnavailable(why=_reason(error, image.cache_dir)) from error
        mount.follow_readahead()
        assert self._events is not None
        for fetcher in mount.devices:
            self._events.release_if_complete(fetcher.cached)
        return mount

    def adopt(self, image: OpenedImage, mountpoint: Path, values: dict[str, Any]) -> ErofsMount:
        """Goes on with the mount of an agent that has died; its devices are marked, or complete."""
        assert self._events is not None
        mount = ErofsMount(self, image, mountpoint, values["superblock"])
        for fetcher in image.fetchers.values():
            self._events.add_device(fetcher.cached, fetcher)
            mount.devices.append(fetcher)
            self._events.release_if_complete(fetcher.cached)
        mount.follow_readahead()
        return mount

    async def release_device(self, image: OpenedImage, fetcher: ChunkFetcher) -> None:
        """Takes a device back from a mount that is gone."""
        if self._events is not None and self._events.remove_device(fetcher.cached, fetcher):
            await self._keeper.release(_blob_name(image, fetcher))

    async def _open_group(self) -> None:
        if self._events is not None:
            return
        try:
            group = create_group()
        except PermissionError as error:
            raise ErofsUnavailable(why="it needs the capability CAP_SYS_ADMIN (root)") from error
        except OSError as error:
            why = f"the kernel has no pre-content events ({error.strerror})"
            raise ErofsUnavailable(why=why) from error
        journal = create_memory()
        await self._keeper.hold("events", KIND_EVENTS, {}, [group, journal])
        self._events = EventServer(group, Journal(journal), self._options)
        self._started.set()

    @asynccontextmanager
    async def _devices(self, mount: ErofsMount) -> AsyncIterator[list[int]]:
        """Descriptors of all devices, held and marked: always before the mount, complete ones too.

        A device without a mark when it is mounted can never raise an event. Given back when the block fails.
        """
        assert self._events is not None
        image, bare = mount.image, []
        try:
            devices = []
            for blob, slot in zip(image.bootstrap.blobs, image.bootstrap.device_slots(), strict=True):
                fetcher = image.fetchers.get(blob.index)
                if fetcher is None:
                    # No file has a chunk there; the kernel wants a device all the same.
                    bare.append(os.memfd_create("nydus-py-device", os.MFD_CLOEXEC))
                    os.ftruncate(bare[-1], slot.blocks * BLOCK_SIZE)
                    devices.append(bare[-1])
                    continue
                cached = fetcher.cached
                values = {"key": BlobShelf.key(image.cache_dir, cached.shape)}
                await self._keeper.hold(_blob_name(image, fetcher), KIND_BLOB, values, cached.descriptors)
                self._events.add_device(cached, fetcher)
                mount.devices.append(fetcher)
                devices.append(cached.descriptor)
            yield devices
        except BaseException:
            with trio.CancelScope(shield=True):
                await mount.release()
            raise
        finally:
            for descriptor in bare:
                os.close(descriptor)

    async def _mount(self, image: OpenedImage, mountpoint: Path, devices: list[int]) -> str:
        """Mounts and gives the name of the superblock, which the kernel tells nobody.

        It is the one that is new. When others mount EROFS at the same moment, once more.
        """
        for _ in range(MOUNT_TRIES):
            before = superblocks()
            await trio.to_thread.run_sync(mount_erofs, image.metadata.bootstrap_path, devices, mountpoint)
            new = superblocks() - before
            if len(new) == 1:
                return new.pop()
            await trio.to_thread.run_sync(unmount, mountpoint)
        raise OSError(errno.EBUSY, "others mount EROFS all the time")


@asynccontextmanager
async def _unmounted_on_failure(mountpoint: Path) -> AsyncIterator[None]:
    """Leaves nothing mounted when the block fails: its devices are about to lose their marks."""
    try:
        yield
    except BaseException:
        with trio.CancelScope(shield=True), suppress(NothingMounted):
            await trio.to_thread.run_sync(lambda: unmount(mountpoint, lazy=True))
        raise


def _blob_name(image: OpenedImage, fetcher: ChunkFetcher) -> str:
    return f"blob:{BlobShelf.key(image.cache_dir, fetcher.cached.shape)}"


def _version(release: str) -> tuple[int, ...]:
    numbers = release.split("-")[0].split(".")
    return tuple(int(part) for part in numbers[:2] if part.isdecimal())


def _reason(error: OSError, cache_dir: Path) -> str:
    text = error.strerror or str(error)
    if error.errno == errno.EOPNOTSUPP:
        return (
            f"the file system of {cache_dir} has no pre-content events; put the cache on ext4, xfs or btrfs"
        )
    if error.errno == errno.ENODEV:
        return "the kernel has no EROFS"
    if error.errno == errno.ENOTBLK:
        return "this kernel mounts EROFS from block devices only"
    return text
