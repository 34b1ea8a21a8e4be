"""Hosts that give each other what they have: real agents, upload servers, scheduler and registry."""

import contextlib
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.peer_cluster import Cluster, PeerHost, peer_cluster, until

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]

MIB = 1 << 20


def make_model(directory: Path, size_bytes: int, seed: int = 1) -> Path:
    directory.mkdir()
    (directory / "model.bin").write_bytes(random.Random(seed).randbytes(size_bytes))
    (directory / "config.json").write_text(f"{seed:02}")  # no host has it of another model
    return directory


def same(one: Path, other: Path) -> bool:
    return subprocess.run(["diff", "-r", one, other], check=False).returncode == 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three hosts for tests that leave them as they were."""
    with peer_cluster(tmp_path_factory.mktemp("peers") / "cluster", 3) as made:
        yield made


def test_the_registry_sends_every_byte_once(cluster: Cluster, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", 24 * MIB)
    reference = cluster.build(source, "model:v1")
    for host in cluster.hosts:
        host.mount(reference, "--prefetch", "all")
    for host in cluster.hosts:
        assert same(source, host.mount_dir)
    unique = 24 * MIB + 2
    states = [host.peers() for host in cluster.hosts]
    assert cluster.origin_bytes() == unique, states
    received = sum(state["traffic"]["peer_bytes"] for state in states)
    assert 2 * unique <= received < 2.01 * unique  # with the zeros between files
    assert all(state["degraded"] == state["wrong_bytes"] == 0 for state in states)
    first = cluster.hosts[0]
    assert first.machine.json("status", "--peers")["members"] == 3
    assert "from peers" in first.machine.nydus("status", "--peers")
    for host in cluster.hosts:
        host.unmount()


def flip_cached_bytes(host: PeerHost) -> None:
    """Damages every MiB of what a host has decoded, behind its back."""
    for path in host.machine.directory.glob("cache/blobs/*.blob.data"):
        with path.open("r+b") as file:
            for offset in range(0, path.stat().st_size, MIB):
                file.seek(offset + 100)
                file.write(b"damage")


def test_a_host_with_a_corrupt_cache_harms_nobody(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", 6 * MIB)
    with peer_cluster(tmp_path / "cluster", 3) as cluster:
        reference = cluster.build(source, "model:v1")
        corrupt, *others = cluster.hosts
        corrupt.mount(reference, "--prefetch", "all", "--driver", "fuse")
        until(lambda: cached_bytes(corrupt) >= 6 * MIB)
        flip_cached_bytes(corrupt)
        until(lambda: cluster.scheduler_status()["blobs"][0]["pieces_held"] == 7)
        for host in others:
            host.mount(reference, "--prefetch", "all")
        for host in others:
            assert same(source, host.mount_dir)
        assert sum(host.peers()["wrong_bytes"] for host in others) > 0
        assert sum(host.peers()["traffic"]["origin_bytes"] for host in others) < 8 * MIB


def cached_bytes(host: PeerHost) -> int:
    return int(str(host.machine.statuses()[0]["cached_bytes"]))


def test_reads_go_on_without_scheduler_peers_or_upload_server_and_come_back(tmp_path: Path) -> None:
    first, second = make_model(tmp_path / "a", 4 * MIB), make_model(tmp_path / "b", 4 * MIB, 2)
    with peer_cluster(tmp_path / "cluster", 2) as cluster:
        references = [cluster.build(source, f"{source.name}:v1") for source in (first, second)]
        one, other = cluster.hosts
        other.mount(references[0], "--prefetch", "all")
        cluster.stop_scheduler()
        one.mount(references[0])
        assert same(first, one.mount_dir)
        assert one.peers()["traffic"]["peer_bytes"] > 0  # known from before

        for pid in upload_servers(one):
            os.kill(pid, signal.SIGKILL)
        until(lambda: one.peers()["upload_restarts"] == 1 and bool(upload_servers(one)))
        other.kill()
        one.machine.nydus("umount", one.mount_dir)
        one.mount(references[1])
        assert same(second, one.mount_dir)

        cluster.start_scheduler()
        third = cluster.add_host()
        until(lambda: third.peers()["members"] == one.peers()["members"] == 2)
        until(lambda: any(blob["pieces_held"] for blob in cluster.scheduler_status()["blobs"]))
        third.mount(references[1], "--prefetch", "all")
        assert same(second, third.mount_dir)
        assert third.peers()["traffic"]["peer_bytes"] > 0


def upload_servers(host: PeerHost) -> list[int]:
    """Processes that have the host's listening socket in their command line."""
    agents = {int(status["pid"]) for status in host.machine.statuses()}  # type: ignore[call-overload]
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(stat[1]) in agents and stat[0] != "Z":
                    found.append(int(entry.name))
    return found


def test_a_switch_turns_peers_off_everywhere(cluster: Cluster, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", 2 * MIB, seed=3)
    reference = cluster.build(source, "switched:v1")
    hosts, before = cluster.hosts, cluster.origin_bytes()
    machine = hosts[0].machine
    machine.nydus("scheduler", "disable", "--scheduler", cluster.scheduler_url)
    until(lambda: not any(host.peers()["enabled"] for host in hosts), patience_s=5.0)
    for host in hosts:
        host.mount(reference, "--prefetch", "all")
        assert same(source, host.mount_dir)
        host.unmount()
    assert cluster.origin_bytes() - before == 3 * (2 * MIB + 2)
    machine.nydus("scheduler", "enable", "--scheduler", cluster.scheduler_url)
    until(lambda: all(host.peers()["enabled"] for host in hosts), patience_s=5.0)


def test_an_owner_serves_what_it_has_not_mounted(cluster: Cluster, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", 8 * MIB, seed=4)
    reference = cluster.build(source, "guest:v1")
    reader, before = cluster.hosts[0], cluster.origin_bytes()
    reader.mount(reference, "--prefetch", "none")
    assert same(source, reader.mount_dir)
    states = [host.peers() for host in cluster.hosts]
    assert cluster.origin_bytes() - before == 8 * MIB + 2, states
    assert any(state["blobs"] for state in states[1:]), states
    reader.unmount()
