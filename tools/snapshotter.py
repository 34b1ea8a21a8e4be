"""`nydus-py snapshotter`: serves containerd, which asks it for the root filesystems of its containers."""

import logging
import os
import signal
import socket
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import trio
import typer

from backend.registry import RegistryOptions
from fuse.agent.request import Driver
from fuse.snapshotter.agent_mounter import AgentMounter, MountOptions
from fuse.snapshotter.credential_sources import CredentialOptions, open_credentials
from fuse.snapshotter.from_threads import LoopPlanning, LoopRestoring
from fuse.snapshotter.layer_restore import LayerRestorer
from fuse.snapshotter.pull_plan import PullPlanner
from fuse.snapshotter.relay import relay
from fuse.snapshotter.service import start_service
from fuse.snapshotter.snapshotter import Snapshotter
from fuse.snapshotter.variants import VariantPlaces
from fuse.supervisor.main import SOCKET_NAME
from fuse.supervisor.systemd import passed_descriptors, tell_ready
from rafs.errors import NydusError
from tools.agent_command import ensure_agent
from tools.credential_options import (
    ContainerdSocket,
    CriListen,
    ProviderBinDir,
    ProviderConfig,
    PullSecretNamespace,
    PullSecrets,
    credential_options,
    merged_section,
)
from tools.mount import CREDENTIAL_VARIABLES
from tools.output import talk
from tools.peer_config import ConfigOption, config_path, read_config
from tools.runtime import run_async
from tools.settings import Settings, settings_of

log = logging.getLogger(__name__)

_PLACES = {
    "none": VariantPlaces.NOWHERE,
    "index": VariantPlaces.INDEX,
    "referrers": VariantPlaces.REFERRERS,
    "all": VariantPlaces.INDEX | VariantPlaces.REFERRERS,
}
CLEANUP_EVERY_S = 300.0
PASSED_SUFFIX = ".own"
"""Of the socket that gRPC listens on, beside the one for containerd that a service manager holds."""
STOP_GRACE_S = 5.0
"""For calls that are being answered when it is told to end."""


def run(
    ctx: typer.Context,
    address: Annotated[
        Path | None,
        typer.Option(help="Unix socket for containerd.  [default: snapshotter.sock beside the agent's]"),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(help="Where snapshots are kept.  [default: snapshotter in the cache directory]"),
    ] = None,
    agent_socket: Annotated[
        Path | None,
        typer.Option(help="Socket of an agent that others start.  [default: one is started when needed]"),
    ] = None,
    driver: Annotated[
        Driver, typer.Option(help="How images are mounted; see `nydus-py mount`.")
    ] = Driver.AUTO,
    variants: Annotated[
        str,
        typer.Option(
            help="Where Nydus variants of ordinary images are looked for: all, index, referrers, none."
        ),
    ] = "all",
    cri_listen: CriListen = None,
    containerd: ContainerdSocket = None,
    image_credential_provider_config: ProviderConfig = None,
    image_credential_provider_bin_dir: ProviderBinDir = None,
    pull_secrets: PullSecrets = None,
    pull_secret_namespace: PullSecretNamespace = None,
    config: ConfigOption = None,
) -> None:
    """Serve containerd as a snapshotter: Nydus images start without being downloaded, others as ever.

    Stays in the foreground, as a service manager wants it. It may be killed at any moment: containers run on,
    and the next one goes on where this one was. docs/snapshotter.md says how containerd is told of it.
    """
    settings = settings_of(ctx)
    section = merged_section(
        read_config(config_path(config)).credentials,
        cri_listen=cri_listen,
        containerd=containerd,
        provider_config=image_credential_provider_config,
        provider_bin_dir=image_credential_provider_bin_dir,
        pull_secrets=pull_secrets,
        pull_secret_namespaces=pull_secret_namespace,
    )
    options = SnapshotterOptions(
        address=(address or settings.run_dir / "snapshotter.sock").absolute(),
        root=(root or settings.cache_dir / "snapshotter").absolute(),
        agent_socket=agent_socket.absolute() if agent_socket else None,
        driver=driver,
        variants=parse_variants(variants),
        credentials=credential_options(settings, section),
    )
    if driver is Driver.PYFUSE3:
        raise typer.BadParameter("the agent serves erofs and fuse", param_hint="--driver")
    for directory in (settings.run_dir, options.address.parent):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    run_async(lambda: _serve(settings, options))
    _leave_waiting_calls()


@dataclass(frozen=True, slots=True)
class SnapshotterOptions:
    """The options of the verb, with defaults filled in."""

    address: Path
    root: Path
    agent_socket: Path | None
    driver: Driver
    variants: VariantPlaces
    credentials: CredentialOptions


def parse_variants(text: str) -> VariantPlaces:
    """Where to look for variants; raises `typer.BadParameter`."""
    places = VariantPlaces.NOWHERE
    for word in text.split(","):
        if word not in _PLACES:
            raise typer.BadParameter(f"{word!r} is none of {', '.join(_PLACES)}", param_hint="--variants")
        places |= _PLACES[word]
    return places


async def _serve(settings: Settings, options: SnapshotterOptions) -> None:
    async with open_credentials(options.credentials) as credentials:
        await _serve_with(replace(settings.registry_options(), credentials=credentials), settings, options)


async def _serve_with(registry: RegistryOptions, settings: Settings, options: SnapshotterOptions) -> None:
    token = trio.lowlevel.current_trio_token()
    planner = PullPlanner(registry, settings.images_dir, options.variants)
    snapshotter = Snapshotter(
        options.root,
        _mounter(settings, options),
        LoopPlanning(planner, token),
        LoopRestoring(LayerRestorer(registry), token),
        settings.cache_dir,
    )
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        passed = _passed_listener()
        own = options.address.with_name(options.address.name + PASSED_SUFFIX) if passed else options.address
        server = start_service(snapshotter, own)
        try:
            async with trio.open_nursery() as nursery:
                if passed is not None:
                    nursery.start_soon(relay, passed, own)
                nursery.start_soon(_recover, snapshotter)
                nursery.start_soon(_clean_up_forever, snapshotter)
                talk(f"snapshotter listens on {options.address}")
                tell_ready(f"listens on {options.address}")
                async for _ in signals:
                    break
                with trio.CancelScope(shield=True):
                    stopped = server.stop(STOP_GRACE_S)
                    await trio.to_thread.run_sync(stopped.wait)
                nursery.cancel_scope.cancel()
        finally:
            snapshotter.close()


def _leave_waiting_calls() -> None:
    """Ends the process also when a call still waits for an agent or a registry that does not answer.

    Python would wait for its thread. Whoever has called asks the next process again.
    """
    waiting = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if waiting:
        log.info("ends while %d threads are at work", len(waiting))
        logging.shutdown()
        os._exit(0)


async def _recover(snapshotter: Snapshotter) -> None:
    """In a thread that is left alone when the process is to end: what it does, the next start does again."""
    try:
        await trio.to_thread.run_sync(snapshotter.recover, abandon_on_cancel=True)
    except NydusError as error:
        log.warning("what was left by the process before: %s", error)


def _passed_listener() -> socket.socket | None:
    """The socket that a service manager listens on for us, if there is one."""
    descriptors = list(passed_descriptors(os.environ).values())
    return socket.socket(fileno=descriptors[0]) if descriptors else None


async def _clean_up_forever(snapshotter: Snapshotter) -> None:
    """containerd asks for it when it has removed something, and a pull that was given up removes nothing."""
    while True:
        await trio.sleep(CLEANUP_EVERY_S)
        try:
            await trio.to_thread.run_sync(snapshotter.cleanup, abandon_on_cancel=True)
        except NydusError as error:
            log.warning("cleaning up: %s", error)


def _mounter(settings: Settings, options: SnapshotterOptions) -> AgentMounter:
    mount_options = MountOptions(
        cache_dir=settings.cache_dir,
        driver=options.driver,
        plain_http=True if settings.plain_http else None,
        ca_file=settings.ca_file,
        insecure_skip_verify=settings.insecure_skip_verify,
        environment={name: os.environ[name] for name in CREDENTIAL_VARIABLES if name in os.environ},
        credentials_socket=options.credentials.socket,
    )
    if options.agent_socket is not None:
        return AgentMounter(options.agent_socket, mount_options)
    return AgentMounter(settings.run_dir / SOCKET_NAME, mount_options, lambda: ensure_agent(settings))
