"""The scheduler of the hosts, in a node of its own; its link is not shaped."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tools.bench.nydus import Nydus
from tools.bench.peers.network import SCHEDULER_ADDRESS, Network
from tools.bench.peers.node import Node, NodeFailed, started_node
from tools.main import VERBS

PORT = 8770
PATIENCE_S = 30.0
POLL_S = 0.1


class _Blob(msgspec.Struct):
    blob_id: str
    pieces: int
    pieces_held: int


class SchedulerStatus(msgspec.Struct):
    """The part of `scheduler status` that is of interest here."""

    hosts: list[msgspec.Raw] = []
    blobs: list[_Blob] = []

    def has_all_of(self, blob_id: str) -> bool:
        """Whether hosts have all pieces of a blob."""
        return any(blob.blob_id == blob_id and 0 < blob.pieces <= blob.pieces_held for blob in self.blobs)


@dataclass(frozen=True, slots=True)
class SchedulerNode:
    """A running scheduler."""

    node: Node
    nydus: Nydus

    @property
    def url(self) -> str:
        """Where agents find it."""
        return f"http://{SCHEDULER_ADDRESS}:{PORT}"

    def wait_until(self, what: str, is_so: Callable[[SchedulerStatus], bool]) -> None:
        """Returns when its status is as wanted. Raises `NodeFailed`."""
        command = self.nydus.command("scheduler", "status", "--scheduler", self.url, "--json")
        end = time.monotonic() + PATIENCE_S
        said = ""
        while time.monotonic() < end:
            try:
                said = self.node.run(*command, environment=self.nydus.environment())
                if is_so(msgspec.json.decode(said, type=SchedulerStatus)):
                    return
            except NodeFailed as error:
                said = str(error)
            time.sleep(POLL_S)
        why = f"not within {PATIENCE_S:g} s: {what}; {said[-300:]}"
        raise NodeFailed(node=self.node.name, command="nydus-py scheduler", why=why)

    def wait_for_hosts(self, count: int) -> None:
        """Returns when it knows `count` hosts. Raises `NodeFailed`."""
        self.wait_until(f"{count} hosts", lambda status: len(status.hosts) == count)


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
