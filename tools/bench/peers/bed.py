"""The test bed: a switch, a registry with two versions of a model, and hosts for each measurement."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tools.bench.peers.host import PEER_PORT, Host, host_on
from tools.bench.peers.model import CHUNK_BYTES, write_model, write_next_version
from tools.bench.peers.network import Network, host_address, running_network
from tools.bench.peers.outcome import Case
from tools.bench.peers.party import Party
from tools.bench.peers.rate import Rate
from tools.bench.peers.registry_node import Image, RegistryNode, registry_on
from tools.bench.peers.scheduler_node import scheduler_on

ZONE = "az1"
CHANGED_SHARE = 0.01
# What a host may take longer than the bound, before it counts as hanging.
PATIENCE = 8.0
PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes and rates of a run. `readers` and `reads` are of the lazy scenario, for each host and reader."""

    size_bytes: int
    origin_rate: Rate
    host_rate: Rate
    readers: int = 4
    reads: int = 8
    seed: int = 1
    driver: str = "auto"
    noise: float = 1.0
    agent_options: tuple[str, ...] = ()


@dataclass
class Bed:
    """What all measurements of a run share."""

    directory: Path
    network: Network
    registry: RegistryNode
    shape: Shape
    _parties: int = field(default=0, init=False)

    @cached_property
    def image(self) -> Image:
        """The model."""
        file = write_model(self.directory / "v1", self.shape.size_bytes, self.shape.seed, self.shape.noise)
        return self.registry.push(file, "v1")

    @cached_property
    def next_version(self) -> tuple[Image, int]:
        """The model with a hundredth of its chunks changed, and the bytes of those."""
        directory = self.directory / "v2"
        changed = write_next_version(directory, self.image.file, CHANGED_SHARE, self.shape.seed)
        return self.registry.push(directory / self.image.file.name, "v2"), changed * CHUNK_BYTES

    def case(
        self, scenario: str, peers: bool, image: Image, unique_bytes: int, wanted_bytes: Sequence[int]
    ) -> Case:
        """What is judged, with the rates of this bed."""
        shape = self.shape
        return Case(scenario, peers, image, unique_bytes, wanted_bytes, shape.origin_rate, shape.host_rate)

    def same_for_all(self, scenario: str, peers: bool, hosts: int) -> Case:
        """All hosts want all of the model."""
        size = self.image.size_bytes
        return self.case(scenario, peers, self.image, size, [size] * hosts)

    @contextlib.contextmanager
    def party(self, count: int, *, peers: bool, joining: int | None = None) -> Iterator[Party]:
        """`count` hosts with empty caches; with `peers` under a scheduler.

        The agents of all of them run, or of the first `joining`: who takes part may have to keep pieces for
        others.
        """
        self._parties += 1
        directory = self.directory / f"party-{self._parties}"
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            scheduler = stack.enter_context(scheduler_on(self.network, directory)) if peers else None
            shape = self.shape
            hosts = tuple(
                stack.enter_context(host_on(self.network, directory, number, shape.host_rate, shape.driver))
                for number in range(1, count + 1)
            )
            party = Party(self.registry, hosts, scheduler)
            first = hosts[:joining]
            self.join(party, first, len(first))
            yield party

    def join(self, party: Party, hosts: Sequence[Host], known: int) -> None:
        """Starts the agents of `hosts`, and returns when the scheduler knows `known` hosts in all."""
        for host in hosts:
            host.start_agent(self._agent_options(party, host))
        for host in hosts:
            host.wait_for_agent()
        if party.scheduler is not None:
            party.scheduler.wait_for_hosts(known)

    def _agent_options(self, party: Party, host: Host) -> list[str]:
        """What an agent is told."""
        if party.scheduler is None:
            return []
        listen = f"{host.address}:{PEER_PORT}"
        options = ["--scheduler", party.scheduler.url, "--zone", ZONE, "--peer-listen", listen]
        return [*options, *self.shape.agent_options]


def patience_s(case: Case) -> float:
    """When a host counts as hanging."""
    return case.bound_s() * PATIENCE + PATIENCE_S


@contextlib.contextmanager
def running_bed(directory: Path, shape: Shape, most_hosts: int) -> Iterator[Bed]:
    """Runs everything but the hosts."""
    addresses = [host_address(number) for number in range(1, most_hosts + 1)]
    with (
        running_network() as network,
        registry_on(network, directory, shape.origin_rate, addresses) as registry,
    ):
        yield Bed(directory, network, registry, shape)
