"""`nydus-py scheduler`: the process through which hosts find each other, and what it knows."""

import functools
import resource
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar

import msgspec
import trio
import typer

from backend.peers.leases import OriginShare
from backend.peers.listen import listen_at
from backend.peers.scheduler import LimitsStatus, Scheduler, SchedulerStatus, Switch, new_epoch, new_leases
from backend.peers.scheduler_state import SETTLE_S, SchedulerState
from backend.peers.scope import ScopeRule
from backend.peers.tls import PeerTls, TlsFiles
from backend.peers.wire import LIMITS_TARGET, STATUS_TARGET, SWITCH_TARGET, LimitsChange
from rafs.errors import NydusError
from tools.limit_options import (
    ClusterOrigin,
    ClusterOriginConcurrency,
    ClusterOriginRequests,
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
from tools.output import JsonOption, emit, talk
from tools.runtime import run_async
from tools.scheduler_client import ask_scheduler
from tools.scheduler_url import check_scheduler_urls
from tools.sizes import format_size

DEFAULT_URL = "http://127.0.0.1:8770"

PkiOption = Annotated[
    Path | None,
    typer.Option(
        help="Directory of `nydus-py pki issue`, for mutual TLS; "
        "to change something needs a certificate with --scope admin."
    ),
]


class CannotListen(NydusError):
    """The address cannot be listened on."""

    message = "{address}: {why}"
    exit_code: ClassVar[int] = 220


def run(
    ctx: typer.Context,
    action: Annotated[
        str,
        typer.Argument(
            help="Nothing to serve; or status, limits, enable, disable to ask a running scheduler."
        ),
    ] = "serve",
    listen: Annotated[str, typer.Option(help="Address and port to listen on.")] = ":8770",
    scope: Annotated[
        str, typer.Option(help="Which hosts use each other: cluster, zone, label:NAME, cidr:LENGTH, list:...")
    ] = "cluster",
    trust_addresses: Annotated[
        bool, typer.Option("--trust-addresses", help="Believe hosts behind NAT what address they have.")
    ] = False,
    peer_scheduler: Annotated[
        list[str] | None,
        typer.Option(
            help="URL of another scheduler of the same hosts, repeatable: changes of limits and of the "
            "switch are passed on, and the limits of the origin are split evenly."
        ),
    ] = None,
    url: Annotated[
        str, typer.Option("--scheduler", help="The scheduler that status, limits, enable and disable ask.")
    ] = DEFAULT_URL,
    pki: PkiOption = None,
    limit_up: LimitUp = None,
    limit_down: LimitDown = None,
    limit_origin: LimitOrigin = None,
    limit_origin_requests: LimitOriginRequests = None,
    limit_origin_concurrency: LimitOriginConcurrency = None,
    limit_task_up: LimitTaskUp = None,
    limit_task_down: LimitTaskDown = None,
    cluster_origin: ClusterOrigin = None,
    cluster_origin_requests: ClusterOriginRequests = None,
    cluster_origin_concurrency: ClusterOriginConcurrency = None,
    as_json: JsonOption = False,
) -> None:
    """Serve until told to end. State is in memory only: hosts tell a new scheduler everything again.

    Limits count for every host, beside its own. `nydus-py scheduler limits` shows those of a running
    scheduler, or changes those that are named; every host hears of it within 2 s.
    """
    change = LimitsChange(flag_values(ctx.params), flag_values(ctx.params, "cluster"))
    tls = PeerTls(TlsFiles.in_directory(pki)) if pki else None
    ask = functools.partial(ask_scheduler, url, context=tls.client if tls else None)
    if action == "serve":
        _run(_scheduler(change, scope, peer_scheduler or [], tls, trusts_addresses=trust_addresses), listen)
    elif action == "status":
        emit(ask("GET", STATUS_TARGET, SchedulerStatus), as_json=as_json, render=_lines)
    elif action == "limits":
        body = change if change.hosts or change.cluster else None
        limits = ask("POST" if body else "GET", LIMITS_TARGET, LimitsStatus, body)
        emit(limits, as_json=as_json, render=_limit_lines)
    elif action in ("enable", "disable"):
        ask("POST", SWITCH_TARGET, Switch, Switch(action == "enable"))
        talk(f"peers are {action}d; every host hears of it within 2 s")
    else:
        raise typer.BadParameter(f"{action}: serve, status, limits, enable or disable")


def listen_on(address: str) -> socket.socket:
    """A non-blocking listening socket at `[ADDRESS]:PORT`. Raises `CannotListen`."""
    try:
        return listen_at(address, backlog=4096)
    except (OSError, ValueError, OverflowError) as error:
        raise CannotListen(address=address, why=str(error)) from error


def _scheduler(
    change: LimitsChange, scope: str, others: list[str], tls: PeerTls | None, *, trusts_addresses: bool
) -> Scheduler:
    others = list(dict.fromkeys(others))
    check_scheduler_urls(others)
    state = SchedulerState(
        new_epoch(),
        ScopeRule(scope),
        leases=new_leases(),
        schedulers=len(others) + 1,
        settled_at=time.monotonic() + SETTLE_S,
    )
    state.change_limits(change.applied_to(state.limits))
    return Scheduler(state, trusts_addresses=trusts_addresses, tls=tls, others=others)


def _run(scheduler: Scheduler, address: str) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # two connections of each host
    listener = listen_on(address)
    talk(f"scheduler listens on {listener.getsockname()[0]} port {listener.getsockname()[1]}")
    run_async(lambda: _serve(scheduler, listener))


async def _serve(scheduler: Scheduler, listener: socket.socket) -> None:
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            nursery.start_soon(scheduler.serve, listener)
            async for _ in signals:
                break
        nursery.cancel_scope.cancel()


def _lines(status: SchedulerStatus) -> Iterator[str]:
    traffic = status.traffic
    yield (
        f"{len(status.hosts)} hosts, peers {'on' if status.peers_enabled else 'OFF'}; "
        f"from the origin {format_size(traffic.origin_bytes)}, from peers {format_size(traffic.peer_bytes)}"
    )
    yield from _limit_lines(status.limits)
    for host in status.hosts:
        traffic = host.traffic
        yield (
            f"host {host.host.id} in {host.scope}: {host.blobs} blobs, {host.uploads} uploads, "
            f"origin {format_size(traffic.origin_bytes)}, peers {format_size(traffic.peer_bytes)}, "
            f"served {format_size(traffic.served_bytes)}"
        )
    for blob in status.blobs:
        yield (
            f"blob {blob.blob_id[:12]} in {blob.scope}: {blob.hosts} hosts, "
            f"{blob.pieces_held} of {blob.pieces} pieces are somewhere"
        )


def _limit_lines(limits: LimitsStatus) -> Iterator[str]:
    yield f"limits of each host: {', '.join(limit_lines(msgspec.structs.asdict(limits.hosts))) or 'none'}"
    lent = "" if limits.origin == OriginShare() else f"; lent: {_lent_line(limits.granted)}"
    yield f"limits of all together: {_origin_line(limits.origin)}{lent}"


def _origin_line(share: OriginShare) -> str:
    values = {"origin_bps": share.bps, "origin_rps": share.rps, "origin_concurrency": share.concurrency}
    return ", ".join(limit_lines(values)) or "no limit"


def _lent_line(share: OriginShare) -> str:
    """A limit of 0 is a pause; of which nobody wants anything, nothing is lent."""
    lent = OriginShare(share.bps or None, share.rps or None, share.concurrency or None)
    return "nothing" if lent == OriginShare() != share else _origin_line(lent)
