"""`nydus-py scheduler`: the process through which hosts find each other, and what it knows."""

import signal
import socket
from collections.abc import Iterator
from typing import Annotated, ClassVar

import trio
import typer

from backend.peers.scheduler import Scheduler, SchedulerStatus, Switch, new_epoch
from backend.peers.scheduler_state import SchedulerState
from backend.peers.scope import ScopeRule
from backend.peers.wire import STATUS_TARGET, SWITCH_TARGET
from rafs.errors import NydusError
from tools.output import JsonOption, emit, talk
from tools.runtime import run_async
from tools.scheduler_client import ask_scheduler
from tools.sizes import format_size

DEFAULT_URL = "http://127.0.0.1:8770"


class CannotListen(NydusError):
    """The address cannot be listened on."""

    message = "{address}: {why}"
    exit_code: ClassVar[int] = 152


def run(
    action: Annotated[
        str, typer.Argument(help="Nothing to serve; or status, enable, disable to ask a running scheduler.")
    ] = "serve",
    listen: Annotated[str, typer.Option(help="Address and port to listen on.")] = ":8770",
    scope: Annotated[
        str, typer.Option(help="Which hosts use each other: cluster, zone, label:NAME, cidr:LENGTH, list:...")
    ] = "cluster",
    trust_addresses: Annotated[
        bool, typer.Option("--trust-addresses", help="Believe hosts behind NAT what address they have.")
    ] = False,
    url: Annotated[
        str, typer.Option("--scheduler", help="The scheduler that status, enable and disable ask.")
    ] = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Serve until told to end. State is in memory only: hosts tell a new scheduler everything again."""
    if action == "serve":
        scheduler = Scheduler(SchedulerState(new_epoch(), ScopeRule(scope)), trusts_addresses=trust_addresses)
        listener = listen_on(listen)
        talk(f"scheduler listens on {listener.getsockname()[0]} port {listener.getsockname()[1]}")
        run_async(lambda: _serve(scheduler, listener))
    elif action == "status":
        status = ask_scheduler(url, "GET", STATUS_TARGET, SchedulerStatus)
        emit(status, as_json=as_json, render=_lines)
    elif action in ("enable", "disable"):
        ask_scheduler(url, "POST", SWITCH_TARGET, Switch, Switch(action == "enable"))
        talk(f"peers are {action}d; every host hears of it within 2 s")
    else:
        raise typer.BadParameter(f"{action}: serve, status, enable or disable")


def listen_on(address: str) -> socket.socket:
    """A non-blocking listening socket at `[ADDRESS]:PORT`. Raises `CannotListen`."""
    host, _, port = address.rpartition(":")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host.strip("[]"), int(port)), family=family, backlog=1024)
    except (OSError, ValueError, OverflowError) as error:
        raise CannotListen(address=address, why=str(error)) from error
    listener.setblocking(False)
    return listener


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
