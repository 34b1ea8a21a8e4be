"""`python -m tools.bench.scheduling`: the scheduler on one CPU under thousands of hosts that announce.

The real `nydus-py scheduler` process has one CPU, the hosts are played by this process on another one. When
that one is full it is the player that is slow, and the latencies are its own.
"""

import argparse
import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from backend.peers.health import percentile
from backend.peers.scheduler_state import SETTLE_S
from tools.bench.scheduling_load import Hosts, Load
from tools.bench.serving import Server, free_port, running

PIECES = 2000
HEARD_WITHIN_S = 2.0
SWITCH_PATIENCE_S = 10.0
DEAD_S = 2.0
REBUILD_PATIENCE_S = 60.0
NYDUS = "import sys; from tools.main import main; main()"


def main(arguments: Sequence[str]) -> None:
    """Runs it and prints what was measured."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.scheduling", description=__doc__)
    parser.add_argument("--hosts", type=int, default=5000, help="hosts (default 5000)")
    parser.add_argument("--seconds", type=float, default=20.0, help="to measure (default 20)")
    parser.add_argument("--join-seconds", type=float, default=8.0, help="in which hosts join (default 8)")
    parser.add_argument(
        "--pieces-a-second", type=float, default=25.0, help="that each host gets (default 25)"
    )
    parser.add_argument("--idle", type=float, default=0.0, help="part that lacks nothing (default 0)")
    options = parser.parse_args(arguments)
    _allow_files(2 * options.hosts + 100)
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[-1]})
    port = free_port()
    hosts = Hosts(port, options.hosts, PIECES, options.pieces_a_second, options.idle)
    with contextlib.closing(hosts):
        with _scheduler(port, cpus[0]) as server:
            began_s = server.cpu_s()
            hosts.start(options.join_seconds)
            hosts.play(time.monotonic() + options.join_seconds + 3.0)
            joined_s = server.cpu_s() - began_s
            print(f"{options.hosts} hosts joined within {options.join_seconds:g} s: {joined_s:.1f} CPU s")
            _measure(hosts, server, options.seconds)
            _switch_off(hosts, server)
            os.kill(server.pid, signal.SIGKILL)
        _rebuild(hosts, port, cpus[0])
    print(f"load {os.getloadavg()[0]:.2f}; scheduler on CPU {cpus[0]}, hosts on CPU {cpus[-1]}")


def _measure(hosts: Hosts, server: Server, seconds: float) -> None:
    hosts.load = Load()
    own_s, cpu_s, began = time.process_time(), server.cpu_s(), time.monotonic()
    hosts.play(began + seconds)
    took_s = time.monotonic() - began
    own_s, cpu_s = time.process_time() - own_s, server.cpu_s() - cpu_s
    load = hosts.load
    count, ordered = len(load.latencies_s), sorted(load.latencies_s)
    if not ordered:
        raise SystemExit("no answer")
    print(
        f"{count / took_s:.0f} announces/s at an interval of {load.interval_s:g} s; "
        f"{cpu_s / took_s:.0%} of a CPU, {cpu_s / count * 1e6:.0f} us each (player: {own_s / took_s:.0%})"
    )
    print(
        f"answers: p50 {percentile(ordered, 0.5) * 1e3:.1f} ms, "
        f"p99 {percentile(ordered, 0.99) * 1e3:.1f} ms, {load.answer_bytes / count:.0f} bytes"
    )


def _switch_off(hosts: Hosts, server: Server) -> None:
    url = f"http://127.0.0.1:{server.port}"
    command = [sys.executable, "-c", NYDUS, "scheduler", "disable", "--scheduler", url]
    began, returned = time.monotonic(), 0.0
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while any(host.is_enabled for host in hosts.hosts):
            hosts.play(time.monotonic() + 0.02)
            if not returned and process.poll() is not None:
                returned = time.monotonic()
            if time.monotonic() - began > SWITCH_PATIENCE_S:
                raise SystemExit("the switch does not reach every host")
    ended = time.monotonic()
    heard_s = ended - (returned or ended)
    met = "met" if heard_s < HEARD_WITHIN_S else "MISSED"
    print(
        f"switch: every host has heard {heard_s:.2f} s after `scheduler disable` returned, "
        f"{ended - began:.2f} s after it was started (< {HEARD_WITHIN_S:g} s: {met})"
    )


def _rebuild(hosts: Hosts, port: int, cpu: int) -> None:
    """A scheduler has died; another one begins with nothing and hosts that know each other."""
    hosts.know_all = True
    lost = time.monotonic()
    hosts.play(lost + REBUILD_PATIENCE_S, lambda: not any(host.told_epoch for host in hosts.hosts))
    hosts.play(time.monotonic() + DEAD_S)
    if any(host.told_epoch for host in hosts.hosts):
        raise SystemExit("the scheduler lives on")
    with _scheduler(port, cpu) as server:
        began = time.monotonic()
        hosts.load = Load()
        hosts.play(began + REBUILD_PATIENCE_S, lambda: all(host.told_epoch for host in hosts.hosts))
        took_s, load = time.monotonic() - began, hosts.load
        print(
            f"restart: all {sum(bool(host.told_epoch) for host in hosts.hosts)} hosts known {took_s:.2f} s "
            f"after it listens, {server.cpu_s():.1f} CPU s with its start, {load.sent} announces, "
            f"p99 {percentile(sorted(load.latencies_s), 0.99) * 1e3:.0f} ms, "
            f"{load.answer_bytes / 1e6:.1f} MB of answers"
        )
        hosts.load = Load()
        hosts.play(time.monotonic() + SETTLE_S)
        print(f"then, within {SETTLE_S:g} s: {hosts.load.answer_bytes / 1e6:.1f} MB of answers")


@contextlib.contextmanager
def _scheduler(port: int, cpu: int) -> Iterator[Server]:
    command = [sys.executable, "-c", NYDUS, "scheduler", "--listen", f"127.0.0.1:{port}"]
    with running(command, port, cpu) as process:
        yield Server("scheduler", port, process.pid)


def _allow_files(count: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < count:
        raise SystemExit(f"{count} open files are needed, {most} allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    main(sys.argv[1:])
