"""Hosts that do something at the same time, and what that took: time, bytes on every link, CPU."""

import contextlib
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from tools.bench.peers.host import Host
from tools.bench.peers.network import Traffic
from tools.bench.peers.node import NodeFailed
from tools.bench.peers.reader import Done, Job
from tools.bench.peers.registry_node import RegistryNode
from tools.bench.peers.scheduler_node import SchedulerNode

POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Interruption:
    """Something that happens once the registry has sent `after_bytes`; `victims` need not finish."""

    after_bytes: float
    happen: Callable[[], object]
    victims: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured from the common start to the end of the last host that had to finish.

    `sent`: payload by what was asked for. `failures`: a line for each host that had to finish and did not.
    """

    makespan_s: float
    done: tuple[Done, ...]
    failures: tuple[str, ...]
    sent: Counter[str]
    registry: Traffic
    hosts: Traffic
    cpu_s: float
    scheduler_cpu_s: float


@dataclass(frozen=True, slots=True)
class Party:
    """The hosts of one measurement, with the registry and perhaps a scheduler."""

    registry: RegistryNode
    hosts: tuple[Host, ...]
    scheduler: SchedulerNode | None

    def together(
        self,
        jobs: Sequence[tuple[Host, Job]],
        timeout_s: float,
        interruption: Interruption | None = None,
    ) -> Measured:
        """Has all jobs done at the same time. Raises `NodeFailed` when there is nothing to measure."""
        sent, registry, hosts = self.registry.sent(), self.registry.link.traffic(), self._hosts_traffic()
        cpu_s, scheduler_cpu_s = self._cpu_s(), self._scheduler_cpu_s()
        with _readers(jobs) as readers:
            start_s = time.monotonic()
            for reader in readers:
                _tell(reader)
            if interruption is not None:
                self._interrupt(interruption, registry, readers, start_s + timeout_s)
            victims = interruption.victims if interruption else frozenset()
            expected = [
                (host, _answer(reader, start_s + timeout_s))
                for (host, _), reader in zip(jobs, readers, strict=True)
                if host.node.name not in victims
            ]
        done, failures = [], []
        for host, answer in expected:
            if answer is None or answer.error:
                failures.append(f"{host.node.name}: {answer.error if answer else 'killed, or too slow'}")
            if answer is not None:
                done.append(answer)
        return Measured(
            makespan_s=max((answer.finished_s for answer in done), default=start_s) - start_s,
            done=tuple(done),
            failures=tuple(failures),
            sent=self.registry.sent() - sent,
            registry=self.registry.link.traffic().since(registry),
            hosts=self._hosts_traffic().since(hosts),
            cpu_s=self._cpu_s() - cpu_s + sum(answer.cpu_s for answer in done),
            scheduler_cpu_s=self._scheduler_cpu_s() - scheduler_cpu_s,
        )

    def _interrupt(
        self,
        interruption: Interruption,
        before: Traffic,
        readers: Sequence["subprocess.Popen[str]"],
        deadline_s: float,
    ) -> None:
        """Waits for its moment; while somebody reads, or it was not mid-way."""
        limit = before.sent_bytes + interruption.after_bytes
        while self.registry.link.traffic().sent_bytes < limit:
            if time.monotonic() > deadline_s or all(reader.poll() is not None for reader in readers):
                why = f"the registry never sent {interruption.after_bytes:.0f} bytes"
                raise NodeFailed(node="registry", command="interruption", why=why)
            time.sleep(POLL_S)
        interruption.happen()

    def _hosts_traffic(self) -> Traffic:
        found = [host.link.traffic() for host in self.hosts]
        return Traffic(sum(each.sent_bytes for each in found), sum(each.received_bytes for each in found))

    def _cpu_s(self) -> float:
        return sum(host.node.cpu_s() for host in self.hosts)

    def _scheduler_cpu_s(self) -> float:
        return self.scheduler.node.cpu_s() if self.scheduler else 0.0


@contextlib.contextmanager
def _readers(jobs: Sequence[tuple[Host, Job]]) -> Iterator[list["subprocess.Popen[str]"]]:
    """Starts the readers and waits until all are ready; none is left at the end. Raises `NodeFailed`."""
    with contextlib.ExitStack() as stack:
        readers = []
        for host, job in jobs:
            reader = host.start_reader(job)
            stack.callback(_end, reader)
            readers.append(reader)
        for (host, _), reader in zip(jobs, readers, strict=True):
            assert reader.stdout is not None
            if reader.stdout.readline() != "ready\n":
                why = (host.directory / "reader.log").read_text(errors="replace")[-300:].strip()
                raise NodeFailed(node=host.node.name, command="reader", why=why)
        yield readers


def _tell(reader: "subprocess.Popen[str]") -> None:
    """Says the line that a reader waits for."""
    assert reader.stdin is not None
    reader.stdin.write("go\n")
    reader.stdin.flush()


def _answer(reader: "subprocess.Popen[str]", deadline_s: float) -> Done | None:
    """What a reader has found; None when it does not say by the deadline."""
    try:
        said, _ = reader.communicate(timeout=max(0.0, deadline_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    return msgspec.json.decode(said, type=Done) if said.strip() else None


def _end(reader: "subprocess.Popen[str]") -> None:
    """Ends the command that entered the node; what is inside ends with the node at the latest."""
    if reader.poll() is None:
        reader.kill()
    with reader:
        reader.wait()
