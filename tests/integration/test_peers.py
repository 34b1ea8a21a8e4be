"""Hosts that give each other what they have: real agents, upload servers, scheduler and registry."""

import random
import subprocess
from pathlib import Path

import pytest

from tests.integration.peer_cluster import peer_cluster

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]

MIB = 1 << 20


def make_model(directory: Path, size_bytes: int, seed: int = 1) -> Path:
    directory.mkdir()
    (directory / "model.bin").write_bytes(random.Random(seed).randbytes(size_bytes))
    (directory / "config.json").write_text("{}")
    return directory


def same(one: Path, other: Path) -> bool:
    return subprocess.run(["diff", "-r", one, other], check=False).returncode == 0


def test_the_registry_sends_every_byte_once(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", 24 * MIB)
    with peer_cluster(tmp_path / "cluster", 3) as cluster:
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
