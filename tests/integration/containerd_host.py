"""A host for containers: containerd and runc as plain processes in directories of their own, asked by CRI.

The snapshotter beside it is the product as a user starts it.
"""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuse.agent.client import wait_for
from fuse.supervisor.listener import listen
from tests.integration.cli_machine import Machine, kill_all, processes_of, unmount_anyway, with_socket
from tools.bench.pods.containerd import PROXY_NAME, SNAPSHOTTER_SOCKET_NAME, SOCKET_NAME, ContainerdSetup
from tools.bench.pods.cri import Cri, Pod, connect
from tools.snapshotter import PASSED_SUFFIX

UP_WITHIN_S = 60.0
CALL_TIMEOUT_S = 120.0
RETRY_S = 0.05


@dataclass(slots=True)
class ContainerdHost:
    """Everything that runs on one host; `directory` is short, because of the sockets in it."""

    directory: Path
    sandbox: str
    machine: Machine
    snapshotter: str = PROXY_NAME
    snapshotter_options: tuple[str, ...] = ()
    has_annotations: bool = True
    log_level: str = "info"
    environment: dict[str, str] = field(default_factory=dict)
    holds_socket: bool = False
    _listener: socket.socket | None = None
    _containerd: "subprocess.Popen[bytes] | None" = None
    _service: "subprocess.Popen[bytes] | None" = None
    _cri: Cri | None = None

    # -- processes

    def start(self) -> None:
        """Starts snapshotter and containerd; returns when both answer."""
        self.start_snapshotter()
        self.start_containerd()

    def start_containerd(self) -> None:
        """Starts containerd alone."""
        command = self.setup.command()
        with (self.directory / "containerd.log").open("ab") as log:
            self._containerd = subprocess.Popen(command, stdout=log, stderr=log)
        logs = self.directory / "logs"
        logs.mkdir(exist_ok=True)
        self._cri = connect(self.directory / SOCKET_NAME, logs)

    @property
    def setup(self) -> ContainerdSetup:
        """How containerd is set up."""
        return ContainerdSetup(self.directory, self.sandbox, self.snapshotter, self.has_annotations)

    def start_snapshotter(self) -> None:
        """Starts the snapshotter alone, as a user does."""
        options = ["--log-level", self.log_level, *self.snapshotter_options]
        address = self.directory / SNAPSHOTTER_SOCKET_NAME
        command = self.machine.command("snapshotter", "--address", address, *options)
        environment = {**self.machine.environment, **self.environment}
        passed: tuple[int, ...] = ()
        if self.holds_socket:
            passed = (self._held_socket(address),)
            command = with_socket(command, passed[0])
        with (self.directory / "snapshotter.log").open("ab") as log:
            self._service = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, pass_fds=passed
            )
        served = address.with_name(address.name + PASSED_SUFFIX) if self.holds_socket else address
        assert wait_for(served, UP_WITHIN_S), self.log()

    def _held_socket(self, address: Path) -> int:
        if self._listener is None:
            self._listener = listen(address)
        return self._listener.fileno()

    def kill_snapshotter(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Ends the snapshotter."""
        assert self._service is not None
        self._service.send_signal(number)
        self._service.wait(UP_WITHIN_S)

    def kill_containerd(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Ends containerd; containers run on."""
        assert self._containerd is not None
        self.cri.channel.close()
        self._containerd.send_signal(number)
        self._containerd.wait(UP_WITHIN_S)

    def kill_agent(self) -> None:
        """Ends agent and supervisor, which does not come back by itself."""
        kill_all(self.machine.directory / "run")

    def agent_processes(self) -> list[int]:
        """Supervisor, template and agent."""
        return processes_of(self.machine.directory / "run")

    @property
    def cri(self) -> Cri:
        """The client of this host."""
        assert self._cri is not None
        return self._cri

    # -- looking

    @property
    def root(self) -> Path:
        """Where the snapshotter keeps everything."""
        return self.machine.directory / "cache" / "snapshotter"

    def log(self) -> str:
        """What the snapshotter has said."""
        return (self.directory / "snapshotter.log").read_text()

    def content(self) -> set[str]:
        """Digests of what containerd has fetched."""
        blobs = self.directory / "data/io.containerd.content.v1.content/blobs/sha256"
        return {f"sha256:{path.name}" for path in blobs.iterdir()} if blobs.exists() else set()

    def image_mounts(self) -> list[str]:
        """Mount points of images that the snapshotter has had mounted."""
        start = f"{self.root}/snapshots/"
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line.split()[4] for line in lines if line.split()[4].startswith(start)]

    def snapshot_directories(self) -> list[str]:
        """Names in the directory of the snapshots."""
        return sorted(path.name for path in (self.root / "snapshots").iterdir())

    def image_of(self, name: str) -> str:
        """The chain ID of an image that was pulled."""
        config = self.cri.pull(name)  # the ID of an image is the digest of its config
        label = f"containerd.io/gc.ref.snapshot.{self.snapshotter}="
        (line,) = [line for line in self.ctr("content", "ls").splitlines() if line.startswith(config)]
        return line.partition(label)[2].partition(",")[0].split()[0]

    def ctr(self, *arguments: str, namespace: str = "k8s.io") -> str:
        """Standard output of containerd's own client."""
        command = ["ctr", "-a", str(self.directory / SOCKET_NAME), "-n", namespace, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=CALL_TIMEOUT_S)
        assert done.returncode == 0, done.stderr
        return done.stdout

    # -- the end

    def stop(self) -> None:
        """Ends everything and leaves no mount."""
        for pod in self._pods():
            pod.remove()
        if self._cri is not None:
            self._cri.channel.close()
        for process in (self._containerd, self._service):
            if process is not None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.kill()
                process.wait()
        if self._listener is not None:
            self._listener.close()
        self.end_containers()
        kill_all(self.machine.directory / "run")

    def _pods(self) -> list[Pod]:
        if self._cri is None or self._containerd is None or self._containerd.poll() is not None:
            return []
        with contextlib.suppress(AssertionError, subprocess.SubprocessError):
            names = [line.split()[0] for line in self.ctr("containers", "ls").splitlines()[1:]]
            return [Pod(self._cri, None, name) for name in names]
        return []

    def end_containers(self) -> None:
        """Kills what runs in containers, and takes all mounts away, those of images too."""
        self._end_shims()
        self._unmount_below()

    def _end_shims(self) -> None:
        """Shims are known by the socket of containerd on their command lines."""
        wanted = os.fsencode(self.directory / SOCKET_NAME)
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    if wanted in words and b"containerd-shim" in words[0]:
                        for child in _descendants(int(entry.name)):
                            os.kill(child, signal.SIGKILL)

    def _unmount_below(self) -> None:
        inside = (f"{self.directory}/", f"{self.machine.directory}/")
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        for line in reversed(lines):
            if (path := line.split()[4]).startswith(inside):
                unmount_anyway(Path(path))


@dataclass(frozen=True, slots=True)
class MountOption:
    """A bind mount, or an option of an overlay that names directories."""

    name: str
    paths: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Ctr:
    """Snapshots by containerd's own client."""

    host: ContainerdHost
    snapshotter: str
    namespace: str = "ctr"

    @property
    def option(self) -> tuple[str, str]:
        """What chooses the snapshotter."""
        return ("--snapshotter", self.snapshotter)

    def run(self, *arguments: str) -> str:
        """What `ctr snapshots` prints."""
        return self.host.ctr("snapshots", *self.option, *arguments, namespace=self.namespace)

    def top(self) -> str:
        """The committed snapshot on which no other one stands."""
        rows = [line.split() for line in self.run("ls").splitlines()[1:]]
        parents = {row[1] for row in rows if len(row) == 3}
        (top,) = [row[0] for row in rows if row[0] not in parents and row[-1] == "Committed"]
        return top

    def mounts(self, action: str, key: str, parent: str) -> list[MountOption]:
        """What a new snapshot is mounted of."""
        # In one call: containerd may collect a view of nobody at any moment.
        (line,) = self.run(action, "-t", "/nowhere", key, parent).splitlines()
        words = line.split()
        kind, source, options = words[words.index("-t") + 1], words[3], words[-1].split(",")
        if kind == "bind":
            return [MountOption("bind", (Path(source),))]
        found = [option.partition("=") for option in options]
        return [
            MountOption(name, tuple(map(Path, value.split(":"))) if value.startswith("/") else ())
            for name, _, value in found
        ]


def _descendants(pid: int) -> list[int]:
    """A process and all below it, those last that are nearest to it."""
    found = []
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found += _descendants(int(child))
    return [*found, pid]


@contextlib.contextmanager
def containerd_host(sandbox: str, **options: Any) -> Iterator[ContainerdHost]:
    """A running host, which is gone afterwards. `sandbox` is the image that holds pods."""
    with tempfile.TemporaryDirectory(prefix="nydus-ctr-") as name:
        directory = Path(name)
        host = ContainerdHost(directory, sandbox, Machine(directory / "host"), **options)
        (directory / "host").mkdir()
        try:
            host.start()
            yield host
        finally:
            host.stop()


def trust_registry(host: ContainerdHost, registry: str) -> None:
    """Has containerd talk plain HTTP to a registry on this machine."""
    host.setup.trust_registry(registry)


def wait_until(what: str, is_true: Any, timeout_s: float = UP_WITHIN_S) -> None:
    """Returns when it is; there is no event for what other programs do."""
    end = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < end, f"not within {timeout_s} s: {what}"
        time.sleep(RETRY_S)
