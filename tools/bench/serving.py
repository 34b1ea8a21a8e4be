"""`python -m tools.bench.serving`: the upload server beside nginx with one worker, in one run.

The server has one CPU for itself, the client another; scenes and servers take turns. CPU is that of the
server's process, user and system, from /proc (nanoseconds), so it holds when other work slows both down.
"""

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.bench.ledger import NYDUS, Ledger, Quantity
from tools.bench.serving_load import KIB, MIB, Scene, check_answers, run_load
from tools.bench.table import aligned, scene_table

BLOB_ID = "ab" * 32
TARGET = f"/v1/blobs/{BLOB_ID}/decoded"
FILE_BYTES = 256 * MIB
STARTED_WITHIN_S = 20.0
NGINX = "nginx"
"""With sendfile and tcp_nopush, as Debian sets it up."""
NGINX_PUSHING = "nginx, tcp_nopush off"
"""Sends the head of an answer as a packet of its own; costs less on loopback, and delays no small parts."""

RATE = Quantity("throughput", "MB/s", higher_is_better=True)
RATE_PER_CPU = Quantity("MB per CPU second", "MB/s", higher_is_better=True)
CPU_PER_RANGE = Quantity("CPU per range", "us")

ONE_MIB = tuple(Scene(f"1 MiB ranges, {count} connections", MIB, 1, count) for count in (1, 4, 16))
SCATTERED = Scene("4 KiB chunks, 64 apart in a request, 4 connections", 4 * KIB, 64, 4)
ADJACENT = Scene("4 KiB chunks, 64 adjacent in a request, 4 connections", 4 * KIB, 64, 4, adjacent=True)
ALONE = Scene("4 KiB chunks, one in a request, 4 connections", 4 * KIB, 1, 4)
SCENES = (*ONE_MIB, SCATTERED, ADJACENT, ALONE)

GOAL_BESIDE_NGINX = 0.7
GOAL_US_PER_CHUNK = 10.0


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: where it listens and which process works."""

    name: str
    port: int
    pid: int

    def cpu_s(self) -> float:
        """CPU seconds of all threads so far: proc(5), /proc/PID/task/TID/schedstat."""
        tasks = Path(f"/proc/{self.pid}/task")
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9


def measure(servers: Sequence[Server], file: Path, rounds: int, seconds: float, ledger: Ledger) -> None:
    """Every scene on every server, `rounds` times in turn."""
    for scene in SCENES:
        requests = scene.requests(TARGET, FILE_BYTES)
        for server in servers:
            check_answers(server.port, scene, requests, file)
        for number in range(rounds):
            for server in servers if number % 2 == 0 else servers[::-1]:
                before = server.cpu_s()
                count, took_s = run_load(server.port, scene, requests, seconds)
                cpu_s = server.cpu_s() - before
                sent_mb = count * scene.ranges * scene.size_bytes / 1e6
                ledger.add(scene.name, server.name, RATE, sent_mb / took_s)
                ledger.add(scene.name, server.name, RATE_PER_CPU, sent_mb / cpu_s)
                ledger.add(scene.name, server.name, CPU_PER_RANGE, cpu_s * 1e6 / (count * scene.ranges))


def verdicts(ledger: Ledger) -> Iterator[list[str]]:
    """The goals, as rows of a table."""
    yield ["goal", "measured", "bound", ""]
    for scene in ONE_MIB:
        for quantity in (RATE, RATE_PER_CPU):
            own = ledger.best(scene.name, NYDUS, quantity)
            for rival in (NGINX, NGINX_PUSHING):
                other = ledger.best(scene.name, rival, quantity)
                if own is not None and other:
                    name = f"{scene.name}: {quantity.name} / {rival}"
                    met = "met" if own / other >= GOAL_BESIDE_NGINX else "MISSED"
                    yield [name, f"{own / other:.2f}x", f">= {GOAL_BESIDE_NGINX}x", met]
    for scene in (SCATTERED, ADJACENT):
        own = ledger.best(scene.name, NYDUS, CPU_PER_RANGE)
        if own is not None:
            met = "met" if own <= GOAL_US_PER_CHUNK else "MISSED"
            yield [f"{scene.name}: CPU", f"{own:.1f} us", f"<= {GOAL_US_PER_CHUNK:.0f} us", met]


@contextlib.contextmanager
def peer_server(file: Path, cpu: int) -> Iterator[Server]:
    """The upload server in a process of its own."""
    port = free_port()
    command = [sys.executable, "-m", "tools.bench.serving_host", str(file), str(port)]
    with running(command, port, cpu) as process:
        yield Server(NYDUS, port, process.pid)


@contextlib.contextmanager
def nginx_server(file: Path, directory: Path, cpu: int, name: str) -> Iterator[Server]:
    """nginx with one worker, sendfile and no log, on the same file."""
    port, nopush = free_port(), "on" if name == NGINX else "off"
    link = directory / "root" / TARGET.lstrip("/")
    link.parent.mkdir(parents=True)
    link.symlink_to(file)
    user = "user root;" if os.geteuid() == 0 else ""
    config = directory / "nginx.conf"
    config.write_text(
        f"{user} daemon off; worker_processes 1; pid {directory}/nginx.pid;\n"
        "events { worker_connections 1024; }\n"
        f"http {{ access_log off; sendfile on; tcp_nopush {nopush}; keepalive_requests 100000000;\n"
        f"client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;\n"
        f"fastcgi_temp_path {directory}/fastcgi; uwsgi_temp_path {directory}/uwsgi;\n"
        f"scgi_temp_path {directory}/scgi; default_type application/octet-stream;\n"
        f"server {{ listen 127.0.0.1:{port} backlog=128; root {directory}/root; }} }}\n"
    )
    with running(["nginx", "-c", str(config), "-e", f"{directory}/error.log"], port, cpu) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield Server(name, port, int(children[0]))


@contextlib.contextmanager
def running(command: Sequence[str], port: int, cpu: int) -> Iterator["subprocess.Popen[bytes]"]:
    """A server on one CPU, that listens at `port`, until the block ends."""
    process = subprocess.Popen(["taskset", "-c", str(cpu), *command], stdin=subprocess.DEVNULL)
    try:
        _wait_until(lambda: _listens(port), process)
        yield process
    finally:
        process.terminate()
        process.wait()


def _wait_until(condition: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + STARTED_WITHIN_S
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"{process.args!r} does not start")
        time.sleep(0.02)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """A port that nobody listened at a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _make_file(path: Path) -> None:
    with path.open("wb") as file:
        for _ in range(FILE_BYTES // MIB):
            file.write(os.urandom(MIB))


def main(arguments: Sequence[str]) -> None:
    """Runs it and prints the tables."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.serving", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="best of so many (default 3)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement (default 2)")
    options = parser.parse_args(arguments)
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[-1]})
    ledger = Ledger()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="serving-")))
        file = directory / "blob"
        _make_file(file)
        servers = [stack.enter_context(peer_server(file, cpus[0]))]
        if shutil.which(NGINX):
            for name in (NGINX, NGINX_PUSHING):
                own = directory / name.replace(" ", "-")
                servers.append(stack.enter_context(nginx_server(file, own, cpus[0], name)))
        else:
            ledger.miss(NGINX, "not installed")
        measure(servers, file, options.rounds, options.seconds, ledger)
    print(f"load {os.getloadavg()[0]:.2f}; server on CPU {cpus[0]}, client on CPU {cpus[-1]}")
    for scene in ledger.scenes():
        print("\n".join(scene_table(scene, ledger)))
    print("\n".join(aligned(list(verdicts(ledger)))))
    for note in ledger.missing:
        print(f"{note.what}: {note.why}")


if __name__ == "__main__":
    main(sys.argv[1:])
