"""A mount through pyfuse3, which can have one mount in a process: without the agent, wherever FUSE works."""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from backend.prefetch_mode import PrefetchMode
from backend.reference import Reference
from backend.store import open_store
from fuse.mountpoint import require_fuse
from fuse.session import MountOptions, MountSession, open_mount
from tools.detach import detach
from tools.mount_record import MountFiles, MountRecord, mount_files
from tools.output import mounted_line, talk
from tools.runtime import run_async
from tools.settings import Settings

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class MountJob:
    """What is to be mounted, where, and whom to tell when it is usable."""

    reference: Reference
    options: MountOptions
    files: MountFiles
    settings: Settings
    ready: Callable[[], None]


def mount_in_own_process(
    reference: Reference,
    mountpoint: Path,
    settings: Settings,
    prefetch: PrefetchMode,
    *,
    foreground: bool,
    remark: str = "",
) -> None:
    """Mounts through pyfuse3 in a process of its own; returns, unless in the foreground, when it is usable.

    `remark` tells why no other driver was taken. Leaves by `SystemExit`.
    """
    require_fuse()
    files = mount_files(settings.run_dir, mountpoint)
    # From here on in a process of its own: trio and its threads would not survive a fork later.
    ready = _stay if foreground else detach(files.log)
    options = MountOptions(
        mountpoint, settings.cache_dir, prefetch, status_socket=files.socket, driver_remark=remark
    )
    job = MountJob(reference, options, files, settings, ready)
    run_async(lambda: _mount(job))


def _stay() -> None:
    """A mount in the foreground goes nowhere when it is ready."""


async def _mount(job: MountJob) -> None:
    """Mounts, and stays until somebody unmounts or a signal tells to."""
    async with trio.open_nursery() as nursery:
        await nursery.start(_end_on_signal, nursery.cancel_scope)
        async with open_store(job.reference, job.settings.registry_options()) as store:
            metadata = await store.fetch_metadata(job.settings.images_dir)
            try:
                async with open_mount(
                    store, metadata, job.options, lambda live: _announce(live, job)
                ) as session:
                    await session.wait_unmounted()
            finally:
                job.files.remove()
        nursery.cancel_scope.cancel()


def _announce(session: MountSession, job: MountJob) -> None:
    status = session.status()
    job.files.write(
        MountRecord(status.mountpoint, status.reference, status.digest, status.driver, status.pid)
    )
    talk(mounted_line(status.reference, status.mountpoint, status.driver, status.driver_remark))
    job.ready()


async def _end_on_signal(
    scope: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(*STOP_SIGNALS) as signals:
        task_status.started()
        async for _ in signals:
            scope.cancel()
            return
