"""`--driver fuse`: one mount through our own transport, from mounting to the end of its superblock."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import trio

from fuse.devfuse.attach import (
    mount_by_helper,
    mount_device,
    negotiate,
    open_device,
    raise_readahead,
)
from fuse.devfuse.open_ledger import create_memory
from fuse.devfuse.passthrough import PassthroughOpens
from fuse.devfuse.server import RequestServer
from fuse.driver import DriverOptions, HoldMount
from fuse.filesystem import ImageFilesystem
from fuse.image import OpenedImage
from fuse.mount_table import find_mount
from fuse.mountpoint import require_fuse
from fuse.supervisor.holdings import KIND_FUSE

log = logging.getLogger(__name__)


class FuseMount:
    """A mount through /dev/fuse. See `DriverMount`."""

    name = "fuse"

    def __init__(self, descriptors: Sequence[int], server: RequestServer) -> None:
        """Use `attach_fuse` or `adopt_fuse`."""
        self._descriptors = descriptors
        self._server = server
        self.state = "mounted"

    async def serve(self) -> None:
        """Answers until the superblock is gone: unmounted, and no file of it open any more."""
        await self._server.serve()

    async def release(self) -> None:
        """Closes the device of a mount that is gone."""
        await trio.lowlevel.checkpoint()
        for descriptor in self._descriptors:
            os.close(descriptor)


async def attach_fuse(
    image: OpenedImage, mountpoint: Path, options: DriverOptions, hold: HoldMount
) -> FuseMount:
    """Mounts. Raises `FuseUnavailable`, `MountFailed`."""
    await trio.to_thread.run_sync(require_fuse)
    as_root = os.geteuid() == 0
    source, allow_other = image.reference, options.allow_other
    if as_root:
        device = open_device()
    else:
        device = await trio.to_thread.run_sync(
            lambda: mount_by_helper(mountpoint, source, allow_other=allow_other)
        )
    try:
        # Held before it is mounted: from then on the death of this process is not felt.
        await hold(KIND_FUSE, {}, [device])
        if as_root:
            await trio.to_thread.run_sync(
                lambda: mount_device(device, mountpoint, source, allow_other=allow_other)
            )
        connection = await trio.to_thread.run_sync(
            lambda: negotiate(device, mountpoint, passthrough=options.passthrough and as_root)
        )
    except BaseException:
        os.close(device)
        raise
    if not connection.resends:
        log.warning("this kernel (before 6.9) cannot send requests again: reads may hang if the agent dies")
    descriptors = [device]
    if connection.passthrough:
        descriptors.append(create_memory())
    # With all descriptors: what is held under one name is replaced as a whole.
    await hold(KIND_FUSE, {}, descriptors)
    await trio.to_thread.run_sync(_raise_readahead, mountpoint, options.readahead_kib)
    return adopt_fuse(image, options, descriptors)


def adopt_fuse(image: OpenedImage, options: DriverOptions, descriptors: Sequence[int]) -> FuseMount:
    """Serves a mount that is there; after the death of an agent, its successor. Takes the descriptors over.

    They are /dev/fuse and, when the kernel asks OPEN, the ledger of opens.
    """
    filesystem = ImageFilesystem(image.bootstrap, image.fetchers, options.read_timeout_s, maps_files=False)
    opens = None
    if len(descriptors) > 1:
        opens = PassthroughOpens(descriptors[0], descriptors[1], filesystem, image.cache_dir)
    return FuseMount(descriptors, RequestServer(descriptors[0], filesystem, opens))


def _raise_readahead(mountpoint: Path, size_kib: int) -> None:
    """Without asking the mount itself, which nobody serves yet."""
    mount = find_mount(mountpoint)
    if mount is None:
        return
    try:
        raise_readahead(mount.device, size_kib)
    except OSError as error:
        log.info("readahead stays small, large reads take longer: %s", error.strerror)
