"""`nydus-py umount`: takes a mount down and waits until nobody serves it any more."""

import contextlib
import os
import select
from pathlib import Path
from typing import Annotated

import typer

from fuse.agent.client import AgentRefused, call
from fuse.agent.request import UNMOUNT_TARGET, UnmountRequest
from fuse.mount_table import find_mount
from fuse.mountpoint import NothingMounted, real_path, unmount
from fuse.supervisor.main import SOCKET_NAME
from tools.agent_client import ask
from tools.mount_record import MountFiles, NotMounted, mount_files
from tools.output import talk
from tools.settings import Settings, settings_of

END_TIMEOUT_S = 30.0
"""For what a mount still has to write to its cache."""


def run(
    ctx: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the image is mounted.")],
    lazy: Annotated[
        bool, typer.Option("--lazy", help="Detach it now although it is in use; it ends with its last user.")
    ] = False,
) -> None:
    """Unmount an image. Everything fetched stays in the cache."""
    path = real_path(directory)
    mount = find_mount(path)
    if mount is None or not mount.is_ours:
        raise NotMounted(directory=directory)
    unmount_image(path, settings_of(ctx), lazy=lazy)


def unmount_image(path: Path, settings: Settings, *, lazy: bool) -> None:
    """Unmounts what is mounted at `path`, by its agent where that knows it. Raises as `unmount`."""
    request = UnmountRequest(os.fspath(path), lazy)
    try:
        call(settings.run_dir / SOCKET_NAME, "POST", UNMOUNT_TARGET, dict[str, str], request)
    except AgentRefused as refusal:
        if refusal.exit_code != NothingMounted.exit_code:
            raise
    except OSError:
        pass  # no agent, or one that has just ended: nobody has to be asked
    else:
        return
    _unmount_alone(path, mount_files(settings.run_dir, path), lazy=lazy)


def _unmount_alone(path: Path, files: MountFiles, *, lazy: bool) -> None:
    """Unmounts what a process of its own serves, or nobody."""
    with contextlib.ExitStack() as stack:
        process = _process_of(files, stack)
        if find_mount(path) is not None:
            unmount(path, lazy=lazy)
        if process is None:
            files.remove()
        elif not lazy and not select.select([process], [], [], END_TIMEOUT_S)[0]:
            talk(f"unmounted; its process is still busy, see {files.log}")


def _process_of(files: MountFiles, stack: contextlib.ExitStack) -> int | None:
    """A descriptor of the process that serves the mount, readable when it has ended; None when it is gone."""
    try:
        process = os.pidfd_open(ask(files.socket).pid)
    except OSError:
        return None
    stack.callback(os.close, process)
    return process
