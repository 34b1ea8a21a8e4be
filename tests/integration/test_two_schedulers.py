"""Two scheduler processes and agents that know both: nothing is lost when one of them dies."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.integration.peer_cluster import PROGRAM, Cluster, peer_cluster, until
from tests.integration.registry_server import free_port
from tests.integration.test_peers import make_model, same

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse, pytest.mark.slow]

MIB = 1 << 20
LIMIT = 64 * MIB


def ask(url: str, action: str, *options: str) -> Any:
    done = subprocess.run(
        [*PROGRAM, "scheduler", action, "--scheduler", url, "--json", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    return json.loads(done.stdout) if done.stdout else None


def start_other(cluster: Cluster, port: int) -> "subprocess.Popen[bytes]":
    listen = f"127.0.0.1:{port}"
    command = [*PROGRAM, "scheduler", "--listen", listen, "--peer-scheduler", cluster.scheduler_url]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cluster.ends.callback(process.wait)
    cluster.ends.callback(process.kill)
    until(lambda: ask(f"http://{listen}", "status") is not None)
    return process


def lent(cluster: Cluster) -> list[int]:
    leases = [host.peers()["limits"]["lease"] for host in cluster.hosts]
    return [lease["bps"] for lease in leases if lease is not None and lease["bps"] is not None]


def test_hosts_go_on_with_the_second_scheduler_and_its_part_of_the_limits(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", 4 * MIB)
    other_port = free_port()
    other_url = f"http://127.0.0.1:{other_port}"
    with peer_cluster(tmp_path / "cluster", 0) as cluster:
        cluster.stop_scheduler()
        cluster.start_scheduler("--peer-scheduler", other_url)
        start_other(cluster, other_port)
        for _ in range(2):
            cluster.add_host("--scheduler", other_url)
        cluster.wait_acquainted()
        for url in (cluster.scheduler_url, other_url):
            until(lambda url=url: len(ask(url, "status")["hosts"]) == 2)

        # What one is told, both know, and all hosts.
        ask(other_url, "limits", "--limit-up", str(LIMIT), "--cluster-origin", str(LIMIT))
        until(lambda: ask(cluster.scheduler_url, "limits")["origin"]["bps"] == LIMIT)
        until(lambda: len(lent(cluster)) == 2)
        assert sum(lent(cluster)) <= LIMIT
        until(lambda: all(h.peers()["limits"]["effective"]["host_up_bps"] == LIMIT for h in cluster.hosts))

        reference = cluster.build(source, "model:v1")
        one, two = cluster.hosts
        one.mount(reference, "--prefetch", "all")
        assert same(source, one.mount_dir)
        cluster.stop_scheduler()
        until(lambda: all(host.peers()["scheduler"] == other_url for host in cluster.hosts))
        two.mount(reference, "--prefetch", "all")
        assert same(source, two.mount_dir)
        assert two.peers()["traffic"]["peer_bytes"] > 0
        assert cluster.origin_bytes() <= 1.05 * (4 * MIB)
        assert sum(lent(cluster)) <= LIMIT

        # The first one comes back with nothing, and has it all again: hosts, limits, its place.
        cluster.start_scheduler("--peer-scheduler", other_url)
        until(lambda: ask(cluster.scheduler_url, "limits")["origin"]["bps"] == LIMIT)
        until(lambda: all(host.peers()["scheduler"] == cluster.scheduler_url for host in cluster.hosts))
        assert len(cluster.scheduler_status()["hosts"]) == 2
        ask(cluster.scheduler_url, "disable")
        until(lambda: not any(host.peers()["enabled"] for host in cluster.hosts))
        until(lambda: not ask(other_url, "status")["peers_enabled"])
