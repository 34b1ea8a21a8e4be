"""`nydus-py mount`: an image becomes a directory; its chunks come when they are read."""

import enum
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import trio
import typer

from backend.prefetch import PrefetchMode
from backend.reference import Reference
from backend.store import open_store
from fuse.mountpoint import prepare_mountpoint, require_fuse
from fuse.session import MountOptions, MountSession, open_mount
from tools.detach import detach
from tools.image import absolute_reference
from tools.mount_record import MountFiles, MountRecord, mount_files
from tools.output import talk
from tools.runtime import run_async
from tools.settings import Settings, settings_of

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Driver(enum.StrEnum):
    """How the kernel is served."""

    AUTO = "auto"
    PYFUSE3 = "pyfuse3"


@dataclass(frozen=True, slots=True)
class MountJob:
    """What is to be mounted, where, and whom to tell when it is usable."""

    reference: Reference
    options: MountOptions
    files: MountFiles
    settings: Settings
    ready: Callable[[], None]


def run(
    ctx: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="REF", help="The image.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An empty directory.")],
    driver: Annotated[Driver, typer.Option(help="How the kernel is served.")] = Driver.AUTO,
    prefetch: Annotated[
        PrefetchMode,
        typer.Option(help="What to fetch unasked: what the image's builder named, all, or none."),
    ] = PrefetchMode.HINTS,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay until unmounted or told to end.")
    ] = False,
) -> None:
    """Mount an image lazily; returns when the mount is usable.

    The mount lives in a process of its own until `nydus-py umount`; `nydus-py status` shows it.
    """
    settings = settings_of(ctx)
    image = absolute_reference(reference)
    require_fuse()
    mountpoint = prepare_mountpoint(directory)
    files = mount_files(settings.run_dir, mountpoint)
    # From here on in a process of its own: trio and its threads would not survive a fork later.
    ready = _stay if foreground else detach(files.log)
    options = MountOptions(mountpoint, settings.cache_dir, prefetch, status_socket=files.socket)
    job = MountJob(image, options, files, settings, ready)
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
    talk(f"{status.reference} is mounted at {status.mountpoint} ({status.driver})")
    job.ready()


async def _end_on_signal(
    scope: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(*STOP_SIGNALS) as signals:
        task_status.started()
        async for _ in signals:
            scope.cancel()
            return
