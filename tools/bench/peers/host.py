"""A host: its node, its link, and nydus-py on it, with a cache and a run directory of its own."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fuse.agent.client import wait_for
from fuse.supervisor.main import SOCKET_NAME
from tools.bench.nydus import Nydus
from tools.bench.peers.model import damage
from tools.bench.peers.network import Link, Network, host_address
from tools.bench.peers.node import Node, NodeFailed, started_node
from tools.bench.peers.rate import Rate
from tools.bench.peers.reader import Job
from tools.bench.peers.registry_node import Image

AGENT_TIMEOUT_S = 60.0
PEER_PORT = 8771


class MountCounts(msgspec.Struct):
    """The part of a status that is of interest here. None: this nydus-py knows no peers."""

    driver: str
    fetched_bytes: int
    from_peers_bytes: int | None = None


class PeerCounts(msgspec.Struct):
    """The part of a status of the peers that is of interest here: what was answered to trouble."""

    wrong_bytes: int = 0
    dead_peers: int = 0
    hedges: int = 0
    degraded: int = 0
    busy_answers: int = 0


@dataclass(frozen=True, slots=True)
class Host:
    """A host on the network."""

    link: Link
    address: str
    nydus: Nydus
    directory: Path
    driver: str

    @property
    def node(self) -> Node:
        """Its namespaces."""
        return self.link.node

    def run(self, *arguments: str | Path) -> str:
        """Standard output of a command line of nydus-py on this host. Raises `NodeFailed`."""
        command = self.nydus.command("--plain-http", *arguments)
        return self.node.run(*command, environment=self.nydus.environment())

    def start_agent(self, options: Sequence[str]) -> None:
        """Starts the agent. Raises `NodeFailed`."""
        command = self.nydus.command("--plain-http", "agent", *options)
        self.node.start(self._agent_log, *command, environment=self.nydus.environment())

    def wait_for_agent(self) -> None:
        """Returns when the agent listens. Raises `NodeFailed`."""
        if not wait_for(self.nydus.run_dir / SOCKET_NAME, AGENT_TIMEOUT_S):
            why = self._agent_log.read_text(errors="replace").strip() or "it does not listen"
            raise NodeFailed(node=self.node.name, command="nydus-py agent", why=why)

    @property
    def _agent_log(self) -> Path:
        return self.directory / "agent-output.log"

    def mountpoint(self, image: Image) -> Path:
        """Where an image is mounted here: an empty directory for each."""
        directory = self.directory / "mnt" / image.reference.rpartition(":")[2]
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def job(self, image: Image, prefetch: str, readers: int = 0, reads: int = 0, seed: str = "") -> Job:
        """What a reader here is to do with an image."""
        mountpoint = self.mountpoint(image)
        options = [f"--cache-dir={self.nydus.cache_dir}", "--plain-http"]
        options += ["mount", f"--driver={self.driver}", f"--prefetch={prefetch}"]
        mount = [*options, image.reference, str(mountpoint)]
        file = str(mountpoint / image.file.name)
        return Job(mount, file, str(image.file), readers, reads, f"{seed} {self.address}")

    def start_reader(self, job: Job) -> "subprocess.Popen[str]":
        """Starts a reader, which says `ready` and waits for a line."""
        encoded = msgspec.json.encode(job).decode()
        command = self.node.enter(sys.executable, "-m", "tools.bench.peers.reader", encoded)
        with (self.directory / "reader.log").open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.nydus.environment(),
                start_new_session=True,
            )

    def counts(self, image: Image) -> MountCounts:
        """What the mount of an image says of itself. Raises `NodeFailed`."""
        said = self.run("status", "--json", self.mountpoint(image))
        (mount,) = msgspec.json.decode(said, type=list[MountCounts])
        return mount

    def peer_counts(self) -> PeerCounts:
        """What the agent says of other hosts. Raises `NodeFailed`."""
        return msgspec.json.decode(self.run("status", "--peers", "--json"), type=PeerCounts)

    def damage_cache(self) -> int:
        """Flips bytes of every decoded file of the cache; nothing may be mounted. How many."""
        return sum(damage(path) for path in (self.nydus.cache_dir / "blobs").glob("*.blob.data"))

    def download_s(self, url: str) -> float:
        """Seconds to download something with curl."""
        return float(self.node.run("curl", "-sSf", "-o", os.devnull, "-w", "%{time_total}", url))


@contextlib.contextmanager
def host_on(network: Network, directory: Path, number: int, rate: Rate, driver: str) -> Iterator[Host]:
    """Host `number` on the network, nothing running on it yet."""
    name = f"host-{number}"
    place = directory / name
    place.mkdir(parents=True)
    with started_node(name) as node:
        link = network.connect(node, host_address(number), rate)
        yield Host(link, host_address(number), Nydus(place / "cache", place / "run"), place, driver)
