"""A host for pods on the network of the benchmark: containerd, and the snapshotter where it is to be lazy."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import msgspec

from fuse.agent.client import wait_for
from fuse.supervisor.main import SOCKET_NAME as AGENT_SOCKET_NAME
from rafs.errors import NydusError
from tools.bench.nydus import Nydus
from tools.bench.peers.network import Link, Network, host_address
from tools.bench.peers.node import Node, started_node
from tools.bench.peers.rate import Rate
from tools.bench.pods.containerd import (
    PROXY_NAME,
    SNAPSHOTTER_SOCKET_NAME,
    SOCKET_NAME,
    ContainerdSetup,
)
from tools.bench.pods.cri import Cri, Pod, connect

OVERLAYFS = "overlayfs"
UP_WITHIN_S = 60.0
OUTPUT_WITHIN_S = 1800.0
LOOK_EVERY_S = 0.002


class NoOutput(NydusError):
    """A container that says nothing."""

    message = "container {number} of pod {pod}: {why}"
    exit_code: ClassVar[int] = 237


class _Mounted(msgspec.Struct):
    driver: str


@dataclass(frozen=True, slots=True)
class PodHost:
    """A running host; `snapshotter` is containerd's name of it."""

    link: Link
    directory: Path
    snapshotter: str
    cri: Cri
    nydus: Nydus

    def drivers(self) -> set[str]:
        """How the kernel is served on this host."""
        command = self.nydus.command("status", "--json")
        said = self.node.run(*command, environment=self.nydus.environment())
        return {mount.driver for mount in msgspec.json.decode(said, type=list[_Mounted])}

    @property
    def node(self) -> Node:
        """Its namespaces."""
        return self.link.node

    @property
    def is_lazy(self) -> bool:
        """Whether images are mounted by nydus-py."""
        return self.snapshotter == PROXY_NAME

    def pull_s(self, image: str) -> float:
        """Pulls an image; the seconds that it took."""
        start = time.perf_counter()
        self.cri.pull(image)
        return time.perf_counter() - start

    def start_s(self, pod: Pod, image: str, command: tuple[str, ...], first: str) -> float:
        """Starts a container; seconds until its first line, which must be `first`. Raises `NoOutput`."""
        start = time.perf_counter()
        pod.start(image, *command)
        self.wait_for_line(pod, pod.started, first)
        return time.perf_counter() - start

    def wait_for_line(self, pod: Pod, number: int, first: str) -> None:
        """Returns when that container has said `first`. Raises `NoOutput`."""
        log = pod.log_path(number)
        end = time.perf_counter() + OUTPUT_WITHIN_S
        while time.perf_counter() < end:
            text = log.read_text() if log.exists() else ""
            if "\n" in text:
                if not text.splitlines()[0].endswith(f" {first}"):
                    raise NoOutput(number=number, pod=pod.id[:12], why=f"it said {text[:200]!r}")
                return
            time.sleep(LOOK_EVERY_S)
        raise NoOutput(number=number, pod=pod.id[:12], why=f"nothing within {OUTPUT_WITHIN_S:g} s")

    @property
    def snapshotter_socket(self) -> Path:
        """Where the snapshotter listens."""
        return self.directory / SNAPSHOTTER_SOCKET_NAME


@contextlib.contextmanager
def pod_host(
    network: Network, directory: Path, number: int, rate: Rate, snapshotter: str, registry: str, sandbox: str
) -> Iterator[PodHost]:
    """Host `number`, with nothing in its caches but the sandbox image."""
    place = directory / f"h{number}"
    place.mkdir()
    nydus = Nydus(place / "cache", place / "run")
    setup = ContainerdSetup(place, sandbox, snapshotter)
    setup.trust_registry(registry)
    logs = place / "logs"
    logs.mkdir()
    with started_node(f"pods-{number}") as node:
        link = network.connect(node, host_address(number), rate)
        node.run("mount", "-t", "tmpfs", "tmpfs", "/run")  # shims of containerd leave sockets there
        if snapshotter == PROXY_NAME:
            # As the service manager has it: the agent is there before anybody wants something of it.
            agent = nydus.command("--plain-http", "agent")
            node.start(place / "agent.log", *agent, environment=nydus.environment())
            _expect(wait_for(nydus.run_dir / AGENT_SOCKET_NAME, UP_WITHIN_S), place / "agent.log")
            address = place / SNAPSHOTTER_SOCKET_NAME
            command = nydus.command("--plain-http", "--log-level=info", "snapshotter", f"--address={address}")
            node.start(place / "snapshotter.log", *command, environment=nydus.environment())
            _expect(wait_for(address, UP_WITHIN_S), place / "snapshotter.log")
        node.start(place / "containerd.log", *setup.command(), environment=dict(os.environ))
        _expect(wait_for(place / SOCKET_NAME, UP_WITHIN_S), place / "containerd.log")
        cri = connect(place / SOCKET_NAME, logs)
        try:
            cri.pull(sandbox)
            yield PodHost(link, place, snapshotter, cri, nydus)
        finally:
            cri.channel.close()
            node.kill_all()


def _expect(is_up: bool, log: Path) -> None:
    if not is_up:
        raise NoOutput(number=0, pod="", why=log.read_text(errors="replace")[-500:])
