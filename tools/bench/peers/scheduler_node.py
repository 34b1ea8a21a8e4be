"""The scheduler of the hosts, in a node of its own; its link is not shaped."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tools.bench.nydus import Nydus
from tools.bench.peers.network import SCHEDULER_ADDRESS, Network
from tools.bench.peers.node import Node, NodeFailed, started_node
from tools.main import VERBS

PORT = 8770
UP_TIMEOUT_S = 30.0


class _Status(msgspec.Struct):
    """The part of `scheduler status` that is of interest here."""

    hosts: list[msgspec.Raw]


@dataclass(frozen=True, slots=True)
class SchedulerNode:
    """A running scheduler."""

    node: Node
    nydus: Nydus

    @property
    def url(self) -> str:
        """Where agents find it."""
        return f"http://{SCHEDULER_ADDRESS}:{PORT}"

    def status(self) -> str:
        """What it says of itself, as JSON. Raises `NodeFailed`."""
        command = self.nydus.command("scheduler", "status", "--scheduler", self.url, "--json")
        return self.node.run(*command, environment=self.nydus.environment())

    def wait_for_hosts(self, count: int) -> None:
        """Returns when it knows `count` hosts. Raises `NodeFailed`."""
        end = time.monotonic() + UP_TIMEOUT_S
        said = ""
        while time.monotonic() < end:
            try:
                said = self.status()
                if len(msgspec.json.decode(said, type=_Status).hosts) >= count:
                    return
            except NodeFailed as error:
                said = str(error)
            time.sleep(0.1)
        why = f"{count} hosts did not register within {UP_TIMEOUT_S:g} s: {said[-300:]}"
        raise NodeFailed(node=self.node.name, command="nydus-py scheduler", why=why)


def peers_missing() -> str | None:
    """Why nothing can be measured with peers; None when it can."""
    return None if "scheduler" in VERBS else "this nydus-py has no scheduler"


@contextlib.contextmanager
def scheduler_on(network: Network, directory: Path) -> Iterator[SchedulerNode]:
    """Runs a scheduler."""
    place = directory / "scheduler"
    place.mkdir(parents=True)
    with started_node("scheduler") as node:
        network.connect(node, SCHEDULER_ADDRESS, None)
        scheduler = SchedulerNode(node, Nydus(place / "cache", place / "run"))
        command = scheduler.nydus.command("scheduler", "--listen", f"{SCHEDULER_ADDRESS}:{PORT}")
        node.start(place / "scheduler.log", *command, environment=scheduler.nydus.environment())
        scheduler.wait_for_hosts(0)
        yield scheduler
