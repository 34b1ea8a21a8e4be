"""What the bench of peers measures with: hosts in namespaces of their own on shaped links, no peers yet."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.bench.peers.bed import Bed, Shape, running_bed
from tools.bench.peers.node import NodeFailed, started_node
from tools.bench.peers.rate import PAYLOAD_SHARE, Rate
from tools.bench.peers.scenarios import owner_killed, start

pytestmark = [pytest.mark.needs_net_namespaces, pytest.mark.needs_fuse, pytest.mark.needs_registry]

SIZE = 4 << 20
RATE = Rate(100_000_000)
HOSTS = 2
GONE_WITHIN_S = 10.0

DIES_WITH_A_NODE = """
import os, signal, sys
from pathlib import Path
from tools.bench.peers.node import started_node
with started_node("doomed") as node:
    node.start(Path(os.devnull), "sleep", "1000")
    print(*node.processes(), *node.holders, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """A registry with a small model; every test has hosts of its own."""
    shape = Shape(SIZE, RATE, RATE)
    with running_bed(tmp_path_factory.mktemp("bed"), shape, HOSTS) as bed:
        yield bed


@pytest.mark.slow
def test_without_peers_the_registry_sends_everything_to_everybody(bed: Bed) -> None:
    outcome = start(bed, HOSTS, False)
    assert outcome.is_right, outcome
    assert outcome.origin_ratio == pytest.approx(HOSTS, rel=0.01)
    assert outcome.moved_ratio == pytest.approx(1, rel=0.01)
    # Nothing is faster than the links but what a bucket lets through at first.
    assert outcome.payload_ratio > 0.9
    assert outcome.origin_link_bytes * PAYLOAD_SHARE > 0.98 * outcome.origin_blob_bytes
    assert outcome.hosts_sent_link_bytes < 0.05 * outcome.origin_link_bytes
    assert outcome.cpu_s > 0


def test_a_host_that_is_killed_does_not_stop_the_other(bed: Bed) -> None:
    outcome = owner_killed(bed, HOSTS, False)
    assert outcome.is_right, outcome
    assert outcome.origin_link_bytes > SIZE


def test_a_node_sees_only_itself(tmp_path: Path) -> None:
    before = Path("/proc/net/dev").read_text().count(":")
    with started_node("one") as node:
        assert node.run("ip", "-o", "link", "show").count("\n") == 1
        node.start(tmp_path / "log", "sleep", "1000")
        node.run("mount", "-t", "tmpfs", "tmpfs", tmp_path)
        assert len(node.processes()) == 1
        assert node.cpu_s() >= 0
        assert node.kill_all() == 1
        with pytest.raises(NodeFailed, match=r"one: nsenter .* false: exit code 1"):
            node.run("false")
        assert not os.path.ismount(tmp_path)
    assert not Path(f"/proc/{node.pid}").exists()
    assert Path("/proc/net/dev").read_text().count(":") == before


def test_a_node_ends_with_the_process_that_made_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", DIES_WITH_A_NODE], stdout=subprocess.PIPE, text=True, check=False, timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    left = [int(pid) for pid in done.stdout.split()]
    assert len(left) == 3
    end = time.monotonic() + GONE_WITHIN_S
    while any(Path(f"/proc/{pid}").exists() for pid in left):
        assert time.monotonic() < end, "processes are left"
        time.sleep(0.01)
