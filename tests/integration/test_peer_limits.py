"""Limits of real hosts: what passes is counted by the hosts themselves."""

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from fuse.agent.client import wait_for
from fuse.agent.peer_report import PeerStatus
from fuse.supervisor.main import SOCKET_NAME
from tests.integration.cli_machine import Machine, kill_all
from tests.integration.peer_cluster import PATIENCE_S, Cluster, PeerHost, peer_cluster, until
from tests.integration.test_peers import make_model, same
from tools.agent_client import ask_agent

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]

MIB = 1 << 20
MEASURED_S = 2.0
TOLD_LATE_S = 0.5


def state(host: PeerHost) -> PeerStatus:
    agent = ask_agent(host.machine.directory / "run" / SOCKET_NAME)
    assert agent is not None
    assert agent.peers is not None
    return agent.peers


def keeps_to(limit: float, passed: Callable[[], int]) -> bool:
    """Whether a limit is kept while `MEASURED_S` of it pass, however long that takes on a busy machine.

    What is counted may be told late: the first look may miss what has passed in `TOLD_LATE_S`.
    """
    began, before = time.monotonic(), passed()
    until(lambda: passed() - before >= limit * MEASURED_S)
    count = passed() - before
    elapsed_s = time.monotonic() - began
    print(f"{count / elapsed_s / limit:.3f} of the limit")
    return count <= 1.05 * limit * (elapsed_s + TOLD_LATE_S)


@contextmanager
def reading(host: PeerHost, reference: str) -> Iterator[None]:
    """Has a host fetch all of an image, and goes on at once."""
    mounting = threading.Thread(target=host.mount, args=(reference, "--prefetch", "all"))
    mounting.start()
    try:
        yield
    finally:
        mounting.join()


def held(cluster: Cluster, host: PeerHost, source: Path) -> str:
    """The name of an image of which `host` has everything."""
    reference = cluster.build(source, "model:v1")
    host.mount(reference, "--prefetch", "all")
    assert same(source, host.mount_dir)
    return reference


@pytest.mark.slow
def test_what_a_host_sends_keeps_to_its_limit_and_to_another_one_at_once(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", 48 * MIB)
    with peer_cluster(tmp_path / "cluster", 2) as cluster:
        giver, taker = cluster.hosts
        reference = held(cluster, giver, source)
        giver.machine.nydus("limits", "set", "--limit-up", "2MiB/s")
        with reading(taker, reference):
            until(lambda: served(giver) > MIB)
            assert keeps_to(2 * MIB, lambda: served(giver))
            changed = giver.machine.json("limits", "set", "--limit-up", "4MiB/s")
            assert changed["effective"]["host_up_bps"] == 4 * MIB  # type: ignore[index]
            assert keeps_to(4 * MIB, lambda: served(giver))
            giver.machine.nydus("limits", "set", "--limit-up", "none")
            assert same(source, taker.mount_dir)


@pytest.mark.slow
def test_a_host_that_is_to_send_nothing_keeps_nobody_waiting(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", 4 * MIB)
    with peer_cluster(tmp_path / "cluster", 2) as cluster:
        giver, taker = cluster.hosts
        reference = held(cluster, giver, source)
        giver.machine.nydus("limits", "set", "--limit-up", "0")
        assert "limits: up paused" in giver.machine.nydus("status", "--peers")
        taker.mount(reference, "--prefetch", "all")
        assert same(source, taker.mount_dir)
        assert (state(taker).traffic.peer_bytes, state(taker).dead_peers) == (0, 0)
        until(lambda: state(giver).refused.get("paused", 0) > 0)


@pytest.mark.slow
def test_a_tiny_limit_is_slow_and_no_error(tmp_path: Path) -> None:
    """A slice of 256 KiB did not get through within the time that hosts wait for each other."""
    source = make_model(tmp_path / "model", 256 << 10)
    with peer_cluster(tmp_path / "cluster", 2) as cluster:
        giver, taker = cluster.hosts
        reference = held(cluster, giver, source)
        giver.machine.nydus("limits", "set", "--limit-up", "8KiB/s")
        with reading(taker, reference):
            until(lambda: same(source, taker.mount_dir), patience_s=100.0)
        assert (state(taker).dead_peers, state(taker).wrong_bytes) == (0, 0)


@pytest.mark.slow
def test_what_a_host_receives_keeps_to_its_limit(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", 24 * MIB)
    with peer_cluster(tmp_path / "cluster", 1) as cluster:
        (giver,) = cluster.hosts
        taker = cluster.add_host("--limit-down", "4MiB/s")
        cluster.wait_acquainted()
        reference = held(cluster, giver, source)
        with reading(taker, reference):
            until(lambda: state(taker).limits.statistics.down_bytes > MIB)
            assert keeps_to(4 * MIB, lambda: state(taker).limits.statistics.down_bytes)
            taker.machine.nydus("limits", "set", "--limit-down", "none")
        taker.machine.nydus("limits", "set", "--limit-down", "4MiB/s")
        assert "limits: down 4.0 MiB/s" in taker.machine.nydus("status", "--peers")


@pytest.mark.slow
def test_all_hosts_together_keep_to_the_limit_of_the_origin(tmp_path: Path) -> None:
    limit = 6 * MIB
    with peer_cluster(tmp_path / "cluster", 3) as cluster, ExitStack() as readers:
        at = ("--scheduler", cluster.scheduler_url)
        machine = cluster.hosts[0].machine
        shown = machine.json("scheduler", "limits", "--cluster-origin", "6MiB/s", "--limit-up", "9MiB/s", *at)
        assert shown["origin"]["bps"] == limit  # type: ignore[index]
        until(lambda: all(lent(host) for host in cluster.hosts))
        assert state(cluster.hosts[0]).limits.effective.host_up_bps == 9 * MIB
        for number, host in enumerate(cluster.hosts):  # nothing that one could have from another
            source = make_model(tmp_path / f"model{number}", 16 * MIB, seed=number)
            readers.enter_context(reading(host, cluster.build(source, f"model{number}:v1")))
        until(lambda: sum(asked(host) for host in cluster.hosts) > 6 * MIB)
        assert keeps_to(limit, lambda: sum(asked(host) for host in cluster.hosts))
        machine.nydus("scheduler", "limits", "--cluster-origin", "none", *at)
        until(lambda: all(lent(host) is None for host in cluster.hosts))


def asked(host: PeerHost) -> int:
    """Encoded bytes that a host has received from the registry."""
    return state(host).limits.statistics.origin_bytes


def served(host: PeerHost) -> int:
    """Bytes that a host has sent to others."""
    return state(host).traffic.served_bytes


def lent(host: PeerHost) -> int | None:
    """What the cluster lends a host of the origin, in bytes per second."""
    lease = state(host).limits.lease
    return lease.bps if lease is not None else None


def test_changed_limits_outlive_the_agent_and_need_no_scheduler(tmp_path: Path) -> None:
    host = Machine(tmp_path / "host")
    host.directory.mkdir()
    with ExitStack() as ends:
        process = subprocess.Popen(
            host.command("agent", "--limit-down", "50MiB/s"),
            env=host.environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        ends.callback(kill_all, host.directory / "run")
        ends.callback(process.wait)
        ends.callback(process.kill)
        assert wait_for(host.directory / "run" / SOCKET_NAME, PATIENCE_S)
        host.nydus("limits", "set", "--limit-origin", "7MiB/s", "--limit-origin-concurrency", "3")
        host.nydus("agent", "--upgrade")
        shown = host.json("limits", "show")["effective"]
        assert isinstance(shown, dict)
        assert {name: value for name, value in shown.items() if value is not None} == {
            "host_down_bps": 50 * MIB,
            "origin_bps": 7 * MIB,
            "origin_concurrency": 3,
        }
        assert host.run("limits", "set", "--limit-up", "50Mbit/s").returncode == 2
