"""`nydus-py limits`: what this host may send and receive, changed while it runs."""

from collections.abc import Iterator
from pathlib import Path

import typer

from fuse.supervisor.main import SOCKET_NAME
from tools.agent import NoAgent
from tools.agent_client import LimitsAnswer, LimitsChange, call
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

LIMITS_TARGET = "/api/v1/limits"


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


def lines(status: LimitsAnswer) -> Iterator[str]:
    """The limits for people."""
    yield f"limits: {', '.join(limit_lines(status.effective)) or 'none'}"
    if cluster := ", ".join(limit_lines(status.cluster)):
        yield f"  of the cluster: {cluster}"
    if status.lease is not None and any(value is not None for value in status.lease.values()):
        names = {"bps": "origin_bps", "rps": "origin_rps", "concurrency": "origin_concurrency"}
        lent = limit_lines({names[key]: value for key, value in status.lease.items()})
        yield f"  lent by the cluster: {', '.join(lent)}"
    if status.yielded_bps is not None:
        yield "  serving yields to reads of this host"


def _ask(run_dir: Path, change: LimitsChange | None = None) -> LimitsAnswer:
    path = run_dir / SOCKET_NAME
    try:
        return call(path, "POST" if change else "GET", LIMITS_TARGET, LimitsAnswer, change)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise NoAgent from error
