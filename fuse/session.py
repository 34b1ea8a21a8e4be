"""One mount: image metadata, cache, fetchers, file system and driver put together, and taken apart again.

Concurrency: `open_mount` owns two nurseries. The outer one is the fetch pool's; in the inner one run the
driver, prefetch and, when asked for, the status server. Leaving the block first ends the inner one, which
unmounts, then the fetches, then flushes the cache, then closes the files.
"""

import datetime
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from backend.fetch import ChunkFetcher
from backend.fetch_pool import FetchOptions
from backend.fetch_statistics import FetchStatistics
from backend.prefetch import prefetch
from backend.prefetch_mode import PrefetchMode
from backend.shelf import BlobShelf
from backend.store import ImageMetadata, ImageStore
from fuse.filesystem import ImageFilesystem
from fuse.image import OpenedImage, open_image
from fuse.mount_status import SessionStatus, describe
from fuse.mountpoint import MountFailed, prepare_mountpoint, require_fuse
from fuse.pyfuse3_driver import DriverOptions, raise_readahead, serve
from fuse.status_socket import serve_status
from rafs.errors import NydusError

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How to mount. `allow_other` lets every user in; `status_socket` is where to answer for status."""

    mountpoint: Path
    cache_dir: Path
    prefetch: PrefetchMode = PrefetchMode.HINTS
    allow_other: bool = field(default_factory=lambda: os.geteuid() == 0)
    readahead_kib: int = 1024
    read_timeout_s: float = 60.0
    status_socket: Path | None = None
    driver_remark: str = ""
    fetch: FetchOptions = field(default_factory=FetchOptions)


class MountSession:
    """A live mount."""

    def __init__(self, image: OpenedImage, mountpoint: Path, remark: str = "") -> None:
        """Use `open_mount`."""
        self.mountpoint = mountpoint
        self.image = image
        self._remark = remark
        self._since = datetime.datetime.now(datetime.UTC)
        self._unmounted = trio.Event()

    @property
    def fetchers(self) -> dict[int, ChunkFetcher]:
        """By blob index."""
        return self.image.fetchers

    async def wait_unmounted(self) -> None:
        """Returns when somebody else has unmounted."""
        await self._unmounted.wait()

    def statistics(self) -> FetchStatistics:
        """What was fetched for all blobs."""
        return self.image.statistics()

    def status(self) -> SessionStatus:
        """The state at this moment."""
        return describe(self.image, self.mountpoint, "pyfuse3", self._since, self._remark)

    async def _serve(
        self, filesystem: ImageFilesystem, options: DriverOptions, *, task_status: trio.TaskStatus[None]
    ) -> None:
        try:
            await serve(filesystem, self.mountpoint, options, task_status=task_status)
        finally:
            self._unmounted.set()


@asynccontextmanager
async def open_mount(
    store: ImageStore,
    metadata: ImageMetadata,
    options: MountOptions,
    on_ready: Callable[[MountSession], None] = lambda session: None,
) -> AsyncIterator[MountSession]:
    """Mounts an image; the block begins when it is usable, and leaving it unmounts.

    `on_ready` is called once the mount point has answered. Raises what is wrong with the mount point, with
    the image or with the cache, before anything is mounted. Errors are never wrapped in groups.
    """
    await trio.to_thread.run_sync(require_fuse)
    mountpoint = await trio.to_thread.run_sync(prepare_mountpoint, options.mountpoint)
    async with open_image(store, metadata, options.cache_dir, BlobShelf(), options.fetch) as image:
        session = MountSession(image, mountpoint, options.driver_remark)
        filesystem = ImageFilesystem(image.bootstrap, image.fetchers, options.read_timeout_s)
        failure: Exception | None = None
        try:
            async with trio.open_nursery() as nursery:
                try:
                    await _start(nursery, session, filesystem, options)
                    nursery.start_soon(prefetch, image.bootstrap, image.fetchers, options.prefetch)
                    on_ready(session)
                    yield session
                except Exception as error:
                    failure = error  # raised below: the nursery would wrap it in a group
                nursery.cancel_scope.cancel()
        except* NydusError as group:
            failure = failure or group.exceptions[0]
        if failure is not None:
            raise failure


async def _start(
    nursery: trio.Nursery, session: MountSession, filesystem: ImageFilesystem, options: MountOptions
) -> None:
    """Starts driver and status server; returns when the mount point answers."""
    driver = DriverOptions(source=session.status().reference, allow_other=options.allow_other)
    await nursery.start(session._serve, filesystem, driver)
    with trio.move_on_after(READY_TIMEOUT_S):
        await trio.to_thread.run_sync(
            raise_readahead, session.mountpoint, options.readahead_kib, abandon_on_cancel=True
        )
        if options.status_socket is not None:
            await nursery.start(serve_status, options.status_socket, session.status)
        return
    raise MountFailed(directory=session.mountpoint, why=f"no answer within {READY_TIMEOUT_S:g} s")
