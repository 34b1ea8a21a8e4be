"""How an agent is started; apart from the agent itself, whose imports a client need not wait for."""

import os
from pathlib import Path

import msgspec

from backend.peers.limit_settings import LimitSettings
from fuse.agent.client import wait_for
from fuse.agent.peer_options import PeerOptions
from fuse.supervisor.launch import python_command, start_in_background
from fuse.supervisor.main import SOCKET_NAME
from rafs.errors import NydusError
from tools.limit_options import section_limits
from tools.logs import LogLevel
from tools.peer_config import config_path, peer_options, read_config
from tools.settings import Settings

START_TIMEOUT_S = 30.0


class AgentNotStarted(NydusError):
    """The agent did not come up."""

    message = "the agent was started and does not listen; see {log}"
    exit_code = 93


def agent_command(
    run_dir: Path,
    *,
    ends_when_idle: bool,
    log_level: LogLevel,
    peers: PeerOptions | None = None,
    limits: LimitSettings | None = None,
    metrics_listen: str = "",
) -> list[str]:
    """The command line that starts an agent, but for the channel."""
    flags = ["--run-dir", os.fspath(run_dir), "--log-level", log_level.value]
    if ends_when_idle:
        flags.append("--ends-when-idle")
    if peers is not None:
        flags += ["--peers", msgspec.json.encode(peers).decode()]
    if limits is not None:
        flags += ["--limits", msgspec.json.encode(limits).decode()]
    if metrics_listen:
        flags += ["--metrics-listen", metrics_listen]
    return [*python_command("tools.agent_process"), *flags]


def ensure_agent(settings: Settings) -> Path:
    """The socket of the agent, which is started when there is none. Raises `AgentNotStarted`."""
    run_dir = settings.run_dir
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = run_dir / SOCKET_NAME
    if wait_for(path, 0.0):
        return path
    # Two may start one at the same time: the second finds the lock taken, and ends.
    file = read_config(config_path())
    command = agent_command(
        run_dir,
        ends_when_idle=True,
        log_level=settings.log_level,
        peers=peer_options(settings, file.peers),
        limits=section_limits(file.limits),
        metrics_listen=file.metrics_listen,
    )
    start_in_background(run_dir, command)
    if not wait_for(path, START_TIMEOUT_S):
        raise AgentNotStarted(log=run_dir / "agent.log")
    return path
