"""`nydus-py umount`: takes a mount down and waits until its process has ended."""

import contextlib
import os
import select
from pathlib import Path
from typing import Annotated

import typer

from fuse.mountpoint import find_mount, real_path, unmount
from tools.mount_record import MountFiles, NotMounted, mount_files
from tools.output import talk
from tools.settings import settings_of
from tools.status_client import ask

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
    files = mount_files(settings_of(ctx).run_dir, path)
    with contextlib.ExitStack() as stack:
        process = _process_of(files, stack)
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
