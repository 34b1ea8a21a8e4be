"""A cluster on loopback: a registry, a scheduler and hosts, each with an agent and an upload server."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec

from fuse.agent.client import wait_for
from fuse.supervisor.main import SOCKET_NAME
from tests.integration.cli_machine import Machine, kill_all, unmount_anyway
from tests.integration.registry_server import RegistryServer, free_port, registry_server
from tests.tls_hosts import LOOPBACK
from tests.tls_hosts import Cluster as Authority
from tools.agent_client import ask_agent

PATIENCE_S = 20.0
PROGRAM = (sys.executable, "-m", "tools.main")


@dataclass(slots=True)
class PeerHost:
    """A host with its agent. `process` is the supervisor."""

    machine: Machine
    url: str
    process: "subprocess.Popen[bytes]"

    @property
    def mount_dir(self) -> Path:
        """Where it mounts."""
        return self.machine.directory / "mnt"

    def mount(self, reference: str, *options: str) -> None:
        """Mounts an image at `mount_dir`."""
        self.mount_dir.mkdir(exist_ok=True)
        self.machine.nydus("mount", reference, self.mount_dir, *options)

    def unmount(self) -> None:
        """Unmounts what it has mounted."""
        self.machine.nydus("umount", self.mount_dir)

    def peers(self) -> dict[str, Any]:
        """What it says of its part, as `status --peers --json` shows it."""
        agent = ask_agent(self.machine.directory / "run" / SOCKET_NAME)
        assert agent is not None
        assert agent.peers is not None
        return cast("dict[str, Any]", msgspec.to_builtins(agent.peers))

    def kill(self) -> None:
        """Everything of this host dies at once; the upload server follows its agent."""
        kill_all(self.machine.directory / "run")  # the supervisor among them: alone, its agent starts another
        self.process.wait()


@dataclass(slots=True)
class Cluster:
    """See above. `ends` undoes everything."""

    directory: Path
    registry: RegistryServer
    scheduler_port: int
    ends: ExitStack
    pki: Authority | None = None
    scheduler: "subprocess.Popen[bytes] | None" = None
    hosts: list[PeerHost] = field(default_factory=list)
    metrics_port: int = 0

    @property
    def scheduler_url(self) -> str:
        """Where the scheduler listens."""
        return f"http{'s' if self.pki else ''}://127.0.0.1:{self.scheduler_port}"

    @property
    def as_admin(self) -> tuple[str, ...]:
        """Options of `nydus-py scheduler` to ask the one of this cluster."""
        pki = self.pki_options("admin", scopes=("admin",)) if self.pki else ()
        return "--scheduler", self.scheduler_url, *pki

    def pki_options(
        self,
        name: str,
        *,
        authority: Authority | None = None,
        scopes: tuple[str, ...] = (),
        addresses: tuple[str, ...] = (LOOPBACK,),
    ) -> tuple[str, ...]:
        """Options for a certificate, issued the first time; `authority` in place of the cluster's."""
        chosen = authority or self.pki
        if chosen is None:
            return ()
        directory = chosen.directory.parent / f"{chosen.directory.name}-{name}"
        if not directory.exists():
            chosen.issue(name, scopes=scopes, addresses=addresses)
        return "--pki", str(directory)

    def start_scheduler(self, *options: str) -> None:
        """Runs a scheduler, at the port of the one before."""
        listen = f"127.0.0.1:{self.scheduler_port}"
        command = [*PROGRAM, "scheduler", "--listen", listen, *self.pki_options("scheduler"), *options]
        self.scheduler = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(lambda: self.scheduler_status() is not None)

    def stop_scheduler(self) -> None:
        """Kills it."""
        if self.scheduler is not None:
            self.scheduler.kill()
            self.scheduler.wait()
            self.scheduler = None

    def scheduler_status(self) -> Any:
        """What it says as JSON; None when it does not answer."""
        done = subprocess.run(
            [*PROGRAM, "scheduler", "status", "--json", *self.as_admin],
            capture_output=True,
            text=True,
            check=False,
        )
        return json.loads(done.stdout) if done.returncode == 0 else None

    def add_host(self, *options: str, url: str = "", pki: tuple[str, ...] = ()) -> PeerHost:
        """Starts another host and waits until it answers; `pki`: see `pki_options`."""
        name = f"host{len(self.hosts)}"
        machine = Machine(self.directory / name)
        machine.directory.mkdir()
        listen = f"127.0.0.1:{free_port()}"
        schedulers = ["--scheduler", url or self.scheduler_url, *(pki or self.pki_options(name))]
        with (machine.directory / "agent.stderr").open("wb") as log:
            process = subprocess.Popen(
                machine.command("agent", *schedulers, "--peer-listen", listen, *options),
                env=machine.environment,
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        host = PeerHost(machine, f"http{'s' if self.pki else ''}://{listen}", process)
        self.hosts.append(host)
        self.ends.callback(host.kill)
        self.ends.callback(unmount_anyway, host.mount_dir)
        assert wait_for(machine.directory / "run" / SOCKET_NAME, PATIENCE_S)
        return host

    def wait_acquainted(self) -> None:
        """Waits until every host knows every other one."""
        until(lambda: all(host.peers()["members"] == len(self.hosts) for host in self.hosts))

    def build(self, source: Path, name: str, *options: str) -> str:
        """Builds an image of a directory and pushes it; its reference."""
        reference = f"{self.registry.host}/{name}"
        Machine(self.directory / "builder").nydus("build", source, reference, *options)
        return reference

    def origin_bytes(self) -> int:
        """Decoded bytes that all hosts have fetched from the registry."""
        return sum(host.peers()["traffic"]["origin_bytes"] for host in self.hosts)


@contextmanager
def peer_cluster(
    directory: Path, hosts: int, options: Sequence[str] = (), *, pki: Authority | None = None
) -> Iterator[Cluster]:
    """A cluster with a scheduler and `hosts` hosts that know each other; all is gone after the block.

    With `pki` all have certificates of that authority.
    """
    with ExitStack() as ends:
        registry = ends.enter_context(registry_server(directory / "registry"))
        cluster = Cluster(directory, registry, free_port(), ends, pki)
        ends.callback(cluster.stop_scheduler)
        cluster.start_scheduler()
        for _ in range(hosts):
            cluster.add_host(*options)
        cluster.wait_acquainted()
        yield cluster


def until(condition: "Any", patience_s: float = PATIENCE_S) -> None:
    """Asks until something is so: another process gives no event for it."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.05)
