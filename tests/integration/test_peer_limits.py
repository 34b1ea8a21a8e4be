"""Limits of real hosts: what passes is counted over 5 s, by the hosts themselves."""

import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from fuse.supervisor.main import SOCKET_NAME
from tests.integration.cli_machine import Machine, kill_all
from tests.integration.peer_cluster import PATIENCE_S, Cluster, PeerHost, peer_cluster, until
from tests.integration.test_peers import make_model, same
from tools.agent_client import PeersAnswer, ask_agent, wait_for

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]

MIB = 1 << 20
WINDOW_S = 5.0


def state(host: PeerHost) -> PeersAnswer:
    agent = ask_agent(host.machine.directory / "run" / SOCKET_NAME)
    assert agent is not None
    assert agent.peers is not None
    return agent.peers


def rates(hosts: list[PeerHost], field: str) -> list[float]:
    """Bytes per second of each host over `WINDOW_S`."""
    before = [(time.monotonic(), getattr(state(host).traffic, field)) for host in hosts]
    time.sleep(WINDOW_S)  # it is the time itself that is measured
    after = [(time.monotonic(), getattr(state(host).traffic, field)) for host in hosts]
    return [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(before, after, strict=True)]


def keeps_to(measured: float, limit: float) -> bool:
    """Within 5 %; less is no breach of a limit, only a sign of a busy machine, or of nothing to send."""
    print(f"{measured / limit:.3f} of the limit")
    return 0.8 * limit <= measured <= 1.05 * limit


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
    source = make_model(tmp_path / "model", 100 * MIB)
    with peer_cluster(tmp_path / "cluster", 2) as cluster:
        giver, taker = cluster.hosts
        reference = held(cluster, giver, source)
        giver.machine.nydus("limits", "set", "--limit-up", "2MiB/s")
        with reading(taker, reference):
            until(lambda: state(giver).traffic.served_bytes > MIB)
            assert keeps_to(rates([giver], "served_bytes")[0], 2 * MIB)
            changed = giver.machine.json("limits", "set", "--limit-up", "4MiB/s")
            assert changed["effective"]["host_up_bps"] == 4 * MIB  # type: ignore[index]
            assert keeps_to(rates([giver], "served_bytes")[0], 4 * MIB)
            giver.machine.nydus("limits", "set", "--limit-up", "none")
            assert same(source, taker.mount_dir)


@pytest.mark.slow
def test_what_a_host_receives_keeps_to_its_limit(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", 100 * MIB)
    with peer_cluster(tmp_path / "cluster", 1) as cluster:
        (giver,) = cluster.hosts
        taker = cluster.add_host("--limit-down", "4MiB/s")
        cluster.wait_acquainted()
        reference = held(cluster, giver, source)
        with reading(taker, reference):
            until(lambda: state(taker).limits.statistics["down_bytes"] > MIB)
            before = state(taker).limits.statistics["down_bytes"]
            time.sleep(WINDOW_S)
            received = state(taker).limits.statistics["down_bytes"] - before
            assert keeps_to(received, 4 * MIB * WINDOW_S)
        assert "limits: down 4.0 MiB/s" in taker.machine.nydus("status", "--peers")


@pytest.mark.slow
def test_all_hosts_together_keep_to_the_limit_of_the_origin(tmp_path: Path) -> None:
    limit = 6 * MIB
    with peer_cluster(tmp_path / "cluster", 3) as cluster, ExitStack() as readers:
        at = ("--scheduler", cluster.scheduler_url)
        machine = cluster.hosts[0].machine
        shown = machine.json("scheduler", "limits", "--cluster-origin", "6MiB/s", "--limit-up", "9MiB/s", *at)
        assert shown["origin"]["bps"] == limit  # type: ignore[index]
        until(lambda: all((state(host).limits.lease or {}).get("bps") for host in cluster.hosts))
        assert state(cluster.hosts[0]).limits.effective["host_up_bps"] == 9 * MIB
        for number, host in enumerate(cluster.hosts):  # nothing that one could have from another
            source = make_model(tmp_path / f"model{number}", 32 * MIB, seed=number)
            readers.enter_context(reading(host, cluster.build(source, f"model{number}:v1")))
        until(lambda: sum(asked(host) for host in cluster.hosts) > 6 * MIB)
        before, began = sum(asked(host) for host in cluster.hosts), time.monotonic()
        time.sleep(WINDOW_S)
        after, ended = sum(asked(host) for host in cluster.hosts), time.monotonic()
        assert keeps_to((after - before) / (ended - began), limit)
        machine.nydus("scheduler", "limits", "--cluster-origin", "none", *at)
        until(lambda: all((state(host).limits.lease or {}).get("bps") is None for host in cluster.hosts))


def asked(host: PeerHost) -> int:
    """Encoded bytes that a host has received from the registry."""
    return state(host).limits.statistics["origin_bytes"]


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
