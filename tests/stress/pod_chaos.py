"""Kills snapshotter and agent under running and starting pods: `python -m tests.stress.pod_chaos --kills
100`.

The real containerd, runc and registry, the product as a user starts it. Containers verify the same files all
the time, while the kernel is told to forget what it has cached; others are started meanwhile. Prints one JSON
document, and exits with 1 when a read has failed or a start has not come about within its retries.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.integration.cli_machine import Machine
from tests.integration.containerd_host import ContainerdHost, containerd_host, trust_registry
from tests.integration.pod_images import PodImages, base_layer
from tests.integration.registry_server import registry_server
from tests.oci_images import Layer
from tests.stress.chaos import serving_agent
from tools.bench.pods.cri import CriError, Pod

FILES, FILE_BYTES = 400, 160_000
START_RETRY_S = 60.0
SEEN_WITHIN_S = 60.0
FORGET_EVERY_S = 0.5
PASS, READY = "pass", "ready"
VERIFY = f"while :; do sha256sum -c /sums 2>&1 | grep -v ': OK$'; echo {PASS}; done"
START = f"sha256sum -c /some-sums >/tmp/said 2>&1 && echo {READY} || cat /tmp/said; exec sleep 100000"


@dataclass(slots=True)
class PodChaosReport:
    """The outcome. `bad_lines`: what a container must not say; `failed_starts`: after all retries."""

    driver: str
    kills: dict[str, int] = field(default_factory=lambda: {"snapshotter": 0, "agent": 0})
    seconds: float = 0.0
    passes: int = 0
    starts: int = 0
    retried_starts: int = 0
    longest_start_s: float = 0.0
    bad_lines: list[str] = field(default_factory=list)
    failed_starts: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether nothing was noticed but time."""
        return not (self.bad_lines or self.failed_starts) and self.passes > 0 and self.starts > 0


def make_image(place: PodImages) -> str:
    """Files of random bytes and their sums; its name."""
    chance, layer, sums = random.Random(0), Layer().directory("data"), []
    for number in range(FILES):
        data = chance.randbytes(FILE_BYTES)
        layer.add(f"data/f{number:03}", data)
        sums.append(f"{hashlib.sha256(data).hexdigest()}  /data/f{number:03}\n")
    layer.add("sums", "".join(sums).encode()).add("some-sums", "".join(sums[::20]).encode())
    shell = base_layer().symlink("bin/grep", "busybox")
    plain = place.push("chaos/app", [shell, layer])
    return place.convert(plain, "nydus", "--chunk-size", "128KiB", "--compressor", "none")


def kill_in_turn(host: ContainerdHost, kills: int, seconds: float, report: PodChaosReport) -> None:
    """So many SIGKILLs at random moments; the snapshotter is started again, as a service manager does.

    `seconds`: how long it is left in peace, all together.
    """
    chance, start = random.Random(), time.monotonic()
    for number in range(kills):
        time.sleep(chance.random() * 2 * seconds / kills)
        if number % 2:
            agent = serving_agent(host.machine)
            if agent is not None:
                os.kill(agent, signal.SIGKILL)
                report.kills["agent"] += 1
        else:
            host.kill_snapshotter()
            report.kills["snapshotter"] += 1
            host.start_snapshotter()
    report.seconds = round(time.monotonic() - start, 1)


def start_all_the_time(pod: Pod, image: str, stop: threading.Event, report: PodChaosReport) -> None:
    """Starts container after container, each until it has said that it is ready."""
    while not stop.is_set():
        begin = time.monotonic()
        try:
            start_with_retries(pod, image, begin + START_RETRY_S, report)
        except CriError as error:
            report.failed_starts.append(str(error))
            continue
        said = first_line(pod, pod.started)
        if said != READY:
            report.bad_lines.append(f"start: {said}")
        report.starts += 1
        report.longest_start_s = max(report.longest_start_s, round(time.monotonic() - begin, 2))


def start_with_retries(pod: Pod, image: str, end: float, report: PodChaosReport) -> None:
    """As the kubelet does it, but sooner. Raises `CriError`."""
    while True:
        try:
            pod.start(image, "/bin/sh", "-c", START)
            return
        except CriError:
            if time.monotonic() >= end:
                raise
            report.retried_starts += 1
            time.sleep(0.2)


def first_line(pod: Pod, number: int) -> str:
    """What a container says first."""
    log, end = pod.log_path(number), time.monotonic() + SEEN_WITHIN_S
    while time.monotonic() < end:
        if log.exists() and (lines := whole_lines(log)):
            return lines[0]
        time.sleep(0.01)
    return "nothing"


def whole_lines(log: Path) -> list[str]:
    """What a container has said, without what is being written: time, stream and a mark stand before it."""
    return [line.split(" ", 3)[3] for line in log.read_text().split("\n")[:-1]]


def forget_all_the_time(stop: threading.Event) -> None:
    """Has the kernel ask again for what it has read."""
    while not stop.wait(FORGET_EVERY_S):
        Path("/proc/sys/vm/drop_caches").write_text("1")


def run_pod_chaos(driver: str, kills: int, seconds: float, containers: int) -> PodChaosReport:
    """All of the above."""
    report = PodChaosReport(driver)
    with tempfile.TemporaryDirectory(prefix="pod-chaos-") as name:
        (Path(name) / "machine").mkdir()
        with registry_server(Path(name) / "registry") as server:
            place = PodImages(server.host, Machine(Path(name) / "machine"))
            image = make_image(place)
            with containerd_host(image, snapshotter_options=("--driver", driver), holds_socket=True) as host:
                trust_registry(host, server.host)
                host.cri.pull(image)
                readers, starters = host.cri.run_pod(), host.cri.run_pod()
                for _ in range(containers):
                    readers.start(image, "/bin/sh", "-c", VERIFY)
                stop = threading.Event()
                with ThreadPoolExecutor(2) as pool:
                    work = [
                        pool.submit(start_all_the_time, starters, image, stop, report),
                        pool.submit(forget_all_the_time, stop),
                    ]
                    try:
                        kill_in_turn(host, kills, seconds, report)
                    finally:
                        stop.set()
                for done in work:
                    done.result()  # raises what ended it early: then nothing was shown
                collect(readers, report)
                if not report.is_clean:
                    print(host.log()[-4000:], file=sys.stderr)
    return report


def collect(readers: Pod, report: PodChaosReport) -> None:
    """Adds up what the verifying containers have said."""
    for number in range(1, readers.started + 1):
        for said in whole_lines(readers.log_path(number)):
            if said == PASS:
                report.passes += 1
            else:
                report.bad_lines.append(f"container {number}: {said}")


def main(arguments: Sequence[str]) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.pod_chaos", description=__doc__)
    parser.add_argument("--driver", default="erofs", choices=["erofs", "fuse"])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--containers", type=int, default=3)
    options = parser.parse_args(arguments)
    report = run_pod_chaos(options.driver, options.kills, options.seconds, options.containers)
    report.bad_lines = report.bad_lines[:20]
    print(json.dumps(asdict(report), indent=2))
    return 0 if report.is_clean else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
