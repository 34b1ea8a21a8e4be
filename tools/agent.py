"""`nydus-py agent`: the process that serves all mounts of this host, under its supervisor."""

import os
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from backend.keep_mode import KeepEncoded
from fuse.agent.client import call
from fuse.supervisor.launch import become_supervisor
from fuse.supervisor.main import SOCKET_NAME
from rafs.errors import NydusError
from tools.agent_client import AgentAnswer, ask_agent
from tools.agent_command import agent_command
from tools.limit_options import (
    LimitDown,
    LimitOrigin,
    LimitOriginConcurrency,
    LimitOriginRequests,
    LimitTaskDown,
    LimitTaskUp,
    LimitUp,
    flag_values,
    section_limits,
)
from tools.output import talk
from tools.peer_config import ConfigOption, PeerSection, config_path, parse_labels, peer_options, read_config
from tools.settings import Settings, settings_of

UPGRADE_TARGET = "/api/v1/upgrade"
UPGRADE_TIMEOUT_S = 60.0

PkiOption = Annotated[
    Path | None,
    typer.Option(help="Directory of `nydus-py pki issue`: other hosts are reached with mutual TLS."),
]

KeepOption = Annotated[
    KeepEncoded | None,
    typer.Option(
        help="Keep blobs also as they are in the registry, for other hosts and clients of registries: those "
        "that compress well, all, or none.  [default: auto]"
    ),
]

MetricsOption = Annotated[
    str | None, typer.Option(help="[ADDRESS]:PORT to answer scrapers of Prometheus at, besides the socket.")
]


class AgentRunning(NydusError):
    """There is one agent for each run directory."""

    message = "an agent runs already, process {pid}; `nydus-py agent --upgrade` replaces it"
    exit_code = 97


class NoAgent(NydusError):
    """There is no agent to talk to."""

    message = "no agent runs here; `nydus-py agent` or the next mount starts one"
    exit_code = 98


class UpgradeFailed(NydusError):
    """The new agent did not take over; the old one goes on."""

    message = "the agent, process {pid}, was not replaced within {timeout_s:g} s and goes on; see {log}"
    exit_code = 99


def run(
    ctx: typer.Context,
    upgrade: Annotated[
        bool, typer.Option("--upgrade", help="Replace the running agent by a new process; reads only wait.")
    ] = False,
    scheduler: Annotated[
        list[str] | None,
        typer.Option(help="URL of a scheduler, through which hosts find each other; several for failover."),
    ] = None,
    zone: Annotated[str | None, typer.Option(help="Zone of this host: near hosts are asked first.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, for scopes by label.")] = None,
    peer_listen: Annotated[
        str | None, typer.Option(help="[ADDRESS]:PORT to serve other hosts at.  [default: :8771]")
    ] = None,
    pki: PkiOption = None,
    keep_encoded: KeepOption = None,
    metrics_listen: MetricsOption = None,
    limit_up: LimitUp = None,
    limit_down: LimitDown = None,
    limit_origin: LimitOrigin = None,
    limit_origin_requests: LimitOriginRequests = None,
    limit_origin_concurrency: LimitOriginConcurrency = None,
    limit_task_up: LimitTaskUp = None,
    limit_task_down: LimitTaskDown = None,
    config: ConfigOption = None,
) -> None:
    """Serve all mounts of this host until told to end (SIGTERM), which unmounts them first.

    Stays in the foreground, as a service manager wants it. Without it, the first mount starts an agent that
    ends with the last mount.
    """
    settings = settings_of(ctx)
    settings.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    socket_path = settings.run_dir / SOCKET_NAME
    if upgrade:
        _upgrade(socket_path, settings)
        return
    if (running := ask_agent(socket_path)) is not None:
        raise AgentRunning(pid=running.pid)
    file = read_config(config_path(config))
    section = _with_flags(
        file.peers,
        scheduler=scheduler,
        zone=zone,
        labels={**file.peers.labels, **parse_labels(label or ())},
        peer_listen=peer_listen or None,
        pki=os.fspath(pki) if pki else None,
        keep_encoded=keep_encoded,
    )
    command = agent_command(
        settings.run_dir,
        ends_when_idle=False,
        log_level=settings.log_level,
        peers=peer_options(settings, section),
        limits=msgspec.structs.replace(section_limits(file.limits), **flag_values(ctx.params)),
        metrics_listen=file.metrics_listen if metrics_listen is None else metrics_listen,
    )
    become_supervisor(settings.run_dir, command)


def _with_flags(section: PeerSection, **flags: object) -> PeerSection:
    """What the file says, and before it what was given on the command line."""
    return msgspec.structs.replace(section, **{k: v for k, v in flags.items() if v not in (None, [])})


def _upgrade(socket_path: Path, settings: Settings) -> None:
    before = ask_agent(socket_path)
    if before is None:
        raise NoAgent
    call(socket_path, "POST", UPGRADE_TARGET, AgentAnswer)
    deadline = time.monotonic() + UPGRADE_TIMEOUT_S
    while time.monotonic() < deadline:
        after = ask_agent(socket_path)
        if after is not None and after.pid != before.pid:
            talk(f"agent {before.pid} is replaced by {after.pid} (version {after.version})")
            return
        time.sleep(0.05)
    log = settings.run_dir / "agent.log"
    raise UpgradeFailed(pid=before.pid, timeout_s=UPGRADE_TIMEOUT_S, log=log)
