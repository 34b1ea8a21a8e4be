"""`nydus-py limits`: what this host may send and receive, changed while it runs."""

from collections.abc import Iterator
from pathlib import Path

import typer
from msgspec.structs import asdict

from backend.peers.limit_status import LimitStatus
from fuse.agent.client import call
from fuse.agent.request import LIMITS_TARGET, LimitsChange
from fuse.supervisor.main import SOCKET_NAME
from tools.agent import NoAgent
from tools.limit_options import (
    LimitDown,
    LimitOrigin,
    LimitOriginConcurrency,
    LimitOriginRequests,
    LimitTaskDown,
    LimitTaskUp,
    LimitUp,
    flag_values,
    limit_lines,
)
from tools.output import JsonOption, emit
from tools.settings import settings_of


def show(ctx: typer.Context, as_json: JsonOption = False) -> None:
    """Show the limits of this host."""
    emit(_ask(settings_of(ctx).run_dir), as_json=as_json, render=lines)


def change(
    ctx: typer.Context,
    limit_up: LimitUp = None,
    limit_down: LimitDown = None,
    limit_origin: LimitOrigin = None,
    limit_origin_requests: LimitOriginRequests = None,
    limit_origin_concurrency: LimitOriginConcurrency = None,
    limit_task_up: LimitTaskUp = None,
    limit_task_down: LimitTaskDown = None,
    as_json: JsonOption = False,
) -> None:
    """Change limits of the running agent at once; those not named stay, `none` lifts one.

    They last until the agent is started again with other ones.
    """
    values = flag_values(ctx.params)
    if not values:
        raise typer.BadParameter("name a limit, --limit-up 50MiB/s for example")
    emit(_ask(settings_of(ctx).run_dir, LimitsChange(values)), as_json=as_json, render=lines)


ACTIONS = {"show": show, "set": change}


def lines(status: LimitStatus) -> Iterator[str]:
    """The limits for people."""
    yield f"limits: {', '.join(limit_lines(asdict(status.effective))) or 'none'}"
    if cluster := ", ".join(limit_lines(asdict(status.cluster))):
        yield f"  of the cluster: {cluster}"
    lent = asdict(status.lease) if status.lease is not None else {}
    if any(value is not None for value in lent.values()):
        shown = limit_lines({f"origin_{key}": value for key, value in lent.items()})
        yield f"  lent by the cluster: {', '.join(shown)}"
    if status.yielded_bps is not None:
        yield "  serving yields to reads of this host"


def _ask(run_dir: Path, change: LimitsChange | None = None) -> LimitStatus:
    path = run_dir / SOCKET_NAME
    try:
        return call(path, "POST" if change else "GET", LIMITS_TARGET, LimitStatus, change)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise NoAgent from error
