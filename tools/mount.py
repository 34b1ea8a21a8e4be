"""`nydus-py mount`: an image becomes a directory; its chunks come when they are read."""

import os
from pathlib import Path
from typing import Annotated

import typer

from backend.prefetch_mode import PrefetchMode
from backend.reference import Reference, absolute_reference
from fuse.agent.client import AgentRefused, call
from fuse.agent.request import MOUNT_TARGET, NO_DRIVER, Driver, MountRequest
from fuse.mountpoint import prepare_mountpoint
from tools.agent_client import MountAnswer
from tools.agent_command import AgentNotStarted, ensure_agent
from tools.mount_stay import catch_stop_signals, stay_until_unmounted
from tools.output import mounted_line, talk
from tools.settings import Settings, settings_of

TRIES = 5
"""The agent may be about to end with its last mount, or be replaced, just when it is asked."""
CREDENTIAL_VARIABLES = ("HOME", "REGISTRY_AUTH_FILE", "DOCKER_CONFIG", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME")
"""What says where credentials are: places of files, never a secret."""


def run(
    ctx: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="REF", help="The image.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An empty directory.")],
    driver: Annotated[
        Driver,
        typer.Option(
            help="How the kernel is served; auto takes the first of erofs, fuse and pyfuse3 that works."
        ),
    ] = Driver.AUTO,
    prefetch: Annotated[
        PrefetchMode,
        typer.Option(help="What to fetch unasked: what the image's builder named, all, or none."),
    ] = PrefetchMode.HINTS,
    passthrough: Annotated[
        bool,
        typer.Option(
            "--passthrough",
            help="With driver fuse: let the kernel read large complete files itself (may copy them).",
        ),
    ] = False,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay until unmounted or told to end.")
    ] = False,
) -> None:
    """Mount an image lazily; returns when the mount is usable.

    The agent serves it until `nydus-py umount`; `nydus-py status` shows it.
    """
    settings = settings_of(ctx)
    image = absolute_reference(reference)
    mountpoint = prepare_mountpoint(directory)
    remark = ""
    if driver is not Driver.PYFUSE3:
        request = _request(image, mountpoint, settings, driver, prefetch, passthrough=passthrough)
        try:
            answer = _mount(request, settings)
        except AgentRefused as refusal:
            if driver is not Driver.AUTO or refusal.exit_code != NO_DRIVER:
                raise
            remark = str(refusal)
        else:
            # Heard from before anybody is told that it is mounted, and may send a signal.
            stopped = catch_stop_signals() if foreground else -1
            talk(mounted_line(answer.reference, answer.mountpoint, answer.driver, answer.driver_remark))
            if foreground:
                stay_until_unmounted(mountpoint, settings, stopped)
            return
    from tools.mount_process import mount_in_own_process

    mount_in_own_process(image, mountpoint, settings, prefetch, foreground=foreground, remark=remark)


def _mount(request: MountRequest, settings: Settings) -> MountAnswer:
    """Has the agent mount. A request whose agent dies has no effect, so it is made again."""
    for _ in range(TRIES - 1):
        path = ensure_agent(settings)
        try:
            return call(path, "POST", MOUNT_TARGET, MountAnswer, request)
        except (ConnectionError, FileNotFoundError):
            continue
    path = ensure_agent(settings)
    try:
        return call(path, "POST", MOUNT_TARGET, MountAnswer, request)
    except (ConnectionError, FileNotFoundError) as error:
        raise AgentNotStarted(log=settings.run_dir / "agent.log") from error


def _request(
    reference: Reference,
    mountpoint: Path,
    settings: Settings,
    driver: Driver,
    prefetch: PrefetchMode,
    *,
    passthrough: bool,
) -> MountRequest:
    return MountRequest(
        reference=str(reference),
        mountpoint=os.fspath(mountpoint),
        cache_dir=os.fspath(settings.cache_dir),
        driver=driver,
        prefetch=prefetch,
        allow_other=os.geteuid() == 0,
        passthrough=passthrough,
        plain_http=True if settings.plain_http else None,
        ca_file=os.fspath(settings.ca_file) if settings.ca_file else None,
        insecure=settings.insecure_skip_verify,
        environment={name: os.environ[name] for name in CREDENTIAL_VARIABLES if name in os.environ},
    )
