"""`python -m tools.bench.pods`: pods from an image that is mounted lazily, and from one that is pulled.

Needs root, containerd and runc. The registry and each host have namespaces of their own and are joined by
shaped links. Cold: the host has nothing of the image. Warm: it has run a container of it before, and
everything that a start reads is in the page cache; starts of both hosts take turns.
"""

import argparse
import contextlib
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from backend.sizes import parse_size
from tools.bench.corpus import Corpus
from tools.bench.machine import load_now
from tools.bench.origin import Origin
from tools.bench.peers.network import Network, host_address, running_network
from tools.bench.peers.rate import Rate, parse_rate
from tools.bench.peers.registry_node import RegistryNode, registry_on
from tools.bench.pods.containerd import PROXY_NAME
from tools.bench.pods.host import OVERLAYFS, PodHost, pod_host
from tools.bench.pods.image import AppImage, AppShape, write_app_image, write_sandbox_image
from tools.bench.pods.measure import (
    Calls,
    Cold,
    Together,
    measure_calls,
    measure_cold,
    measure_together,
    measure_warm,
)
from tools.failure import report_failure
from tools.output import talk
from tools.sizes import format_size

HOSTS = 3
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(slots=True)
class Outcome:
    """Everything that was measured. Seconds."""

    files: int = 0
    size_bytes: int = 0
    rate: str = ""
    load: tuple[float, ...] = ()
    drivers: list[str] = field(default_factory=list)
    cold: dict[str, Cold] = field(default_factory=dict)
    warm_s: dict[str, list[float]] = field(default_factory=dict)
    calls: Calls | None = None
    together: Together | None = None


@dataclass(frozen=True, slots=True)
class Bed:
    """Registry and images that all hosts use. References are complete."""

    network: Network
    registry: RegistryNode
    directory: Path
    rate: Rate
    app: AppImage
    ordinary: str
    nydus: str
    sandbox: str

    @property
    def origin(self) -> Origin:
        """The registry, with what it has sent."""
        return self.registry.origin

    @contextlib.contextmanager
    def host(self, number: int, snapshotter: str) -> Iterator[PodHost]:
        """A host."""
        started = pod_host(
            self.network, self.directory, number, self.rate, snapshotter, self.origin.address, self.sandbox
        )
        with started as host:
            yield host


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; wrong ones end the process with exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.pods", description=__doc__)
    parser.add_argument("--files", type=int, default=30_000, help="in the image")
    parser.add_argument("--size", type=parse_size, default="512MiB", help="of the image, unpacked")
    parser.add_argument("--reads", type=int, default=300, help="files read before the first output")
    parser.add_argument("--rate", type=parse_rate, default="100mbit", help="of each link")
    parser.add_argument("--warm", type=int, default=11, help="warm starts of each kind")
    parser.add_argument("--snapshots", type=int, default=200, help="for the times of calls")
    parser.add_argument("--containers", type=int, default=50, help="started at once")
    parser.add_argument("--dir", type=Path, help="work below this directory; its path is short")
    parser.add_argument("--json", action="store_true", help="one JSON document, no table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Runs it; the exit code."""
    options = parse(arguments)
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)
    try:
        outcome = measure(options)
        if options.json:
            print(msgspec.json.encode(outcome).decode())
        else:
            print(*table(outcome), sep="\n")
        return 0
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        return report_failure(error, debug=False)


def measure(options: argparse.Namespace) -> Outcome:
    """Makes the image and measures everything, one after the other."""
    outcome = Outcome(rate=str(options.rate))
    with (
        tempfile.TemporaryDirectory(prefix="pods-", dir=options.dir) as name,
        running_bed(Path(name), options) as bed,
    ):
        outcome.files, outcome.size_bytes = bed.app.files, bed.app.size_bytes
        load = load_now()
        outcome.load = (load.one, load.five, load.fifteen)
        with bed.host(1, PROXY_NAME) as lazy, bed.host(2, OVERLAYFS) as eager:
            for label, host, image in (("lazy", lazy, bed.nydus), ("pulled", eager, bed.ordinary)):
                talk(f"cold start, {label}")
                outcome.cold[label] = measure_cold(host, bed.origin, image, bed.app.start)
            outcome.drivers = sorted(lazy.drivers())
            talk(f"{options.warm} warm starts of each")
            outcome.warm_s = _warm(bed, lazy, eager, options.warm)
            talk(f"calls, {options.snapshots} snapshots")
            outcome.calls = measure_calls(lazy, options.snapshots)
        talk(f"{options.containers} containers at once")
        with bed.host(3, PROXY_NAME) as fresh:
            unique = outcome.cold["lazy"].origin_bytes
            outcome.together = measure_together(
                fresh, bed.origin, bed.nydus, bed.app.start, options.containers, unique
            )
    return outcome


@contextlib.contextmanager
def running_bed(directory: Path, options: argparse.Namespace) -> Iterator[Bed]:
    """The network, the registry and the images in it; these are made and converted on the registry's host."""
    talk(f"making an image of {options.files} files, {format_size(options.size)}")
    shape = AppShape(options.files, options.size, options.reads)
    app = write_app_image(directory / "layout", shape, Corpus.of_machine())
    sandbox = write_sandbox_image(directory / "layout")
    addresses = [host_address(number) for number in range(1, HOSTS + 1)]
    with (
        running_network() as network,
        registry_on(network, directory, options.rate, addresses) as registry,
    ):

        def nydus(*arguments: str | Path) -> None:
            command = registry.nydus.command("--plain-http", *arguments)
            registry.link.node.run(*command, environment=registry.nydus.environment())

        repository = f"{registry.origin.address}/bench/app"
        names = {tag: f"{repository}:{tag}" for tag in ("ordinary", "nydus", "sandbox")}
        talk("pushing and converting")
        nydus("copy", f"oci:{app.layout}:{app.tag}", names["ordinary"])
        nydus("copy", f"oci:{app.layout}:{sandbox}", names["sandbox"])
        nydus("convert", names["ordinary"], names["nydus"])
        yield Bed(
            network,
            registry,
            directory,
            options.rate,
            app,
            names["ordinary"],
            names["nydus"],
            names["sandbox"],
        )


def _warm(bed: Bed, lazy: PodHost, eager: PodHost, count: int) -> dict[str, list[float]]:
    starts = {
        "lazy": measure_warm(lazy, bed.nydus, bed.app.start),
        "pulled": measure_warm(eager, bed.ordinary, bed.app.start),
    }
    times: dict[str, list[float]] = {label: [] for label in starts}
    for number in range(count + 1):
        for label, start in starts.items():
            took_s = start()
            if number:  # the first one fills the page cache
                times[label].append(took_s)
    return times


def table(outcome: Outcome) -> Iterator[str]:
    """The outcome in lines."""
    yield (
        f"image: {outcome.files} files, {format_size(outcome.size_bytes)}; links {outcome.rate}/s; "
        f"driver {', '.join(outcome.drivers)}"
    )
    yield f"load of the machine: {', '.join(f'{value:.1f}' for value in outcome.load)}"
    yield "| cold start | pull s | pod s | first output s | together s | sent by the registry |"
    yield "|---|---|---|---|---|---|"
    for label, cold in outcome.cold.items():
        parts = (cold.pull_s, cold.pod_s, cold.output_s, cold.total_s)
        numbers = " | ".join(f"{value:.2f}" for value in parts)
        yield f"| {label} | {numbers} | {format_size(cold.origin_bytes)} |"
    yield f"cold: {outcome.cold['pulled'].total_s / outcome.cold['lazy'].total_s:.1f} times as fast"
    medians = {label: statistics.median(times) for label, times in outcome.warm_s.items()}
    share = medians["lazy"] / medians["pulled"] - 1
    yield (
        f"warm, median of {len(outcome.warm_s['lazy'])}: lazy {medians['lazy'] * 1e3:.0f} ms, "
        f"pulled {medians['pulled'] * 1e3:.0f} ms: {share:+.1%}"
    )
    if outcome.calls is not None:
        calls = outcome.calls
        yield (
            f"medians over {calls.snapshots} snapshots: Prepare {calls.prepare_ms:.2f} ms, "
            f"Mounts {calls.mounts_ms:.2f} ms, Remove {calls.remove_ms:.2f} ms"
        )
    if outcome.together is not None:
        many = outcome.together
        yield (
            f"{many.containers} containers at once: the last says something after {many.slowest_s:.2f} s; "
            f"sent {format_size(many.origin_bytes)}, "
            f"{many.origin_bytes / many.unique_bytes:.2f} times what one needs"
        )


def _stop(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    sys.exit(main(sys.argv[1:]))
