"""A host as a mirror of the registry, for the clients that people have: curl, skopeo and containerd."""

import hashlib
import json
import os
import random
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fuse.supervisor.main import SOCKET_NAME
from tests.integration.peer_cluster import Cluster, PeerHost, peer_cluster, until
from tests.integration.registry_server import free_port
from tests.integration.test_peers import same

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]

MIB = 1 << 20


def compressible(directory: Path, size_bytes: int, seed: int = 1) -> Path:
    """A directory that compresses to about a half: runs of random and of equal bytes."""
    directory.mkdir()
    chance = random.Random(seed)
    parts = [
        chance.randbytes(4096) + bytes([chance.randrange(256)]) * 4096 for _ in range(size_bytes // 8192)
    ]
    (directory / "model.bin").write_bytes(b"".join(parts))
    (directory / "config.json").write_text(f"{seed:02}")
    return directory


@dataclass(frozen=True, slots=True)
class Published:
    """An image in the registry: its manifest by digest, and all that it names."""

    reference: str
    digest: str
    manifest: dict[str, Any]
    blobs: Path

    @property
    def data_blob(self) -> str:
        """The digest of its data blob."""
        return str(self.manifest["layers"][0]["digest"])

    def content(self, digest: str) -> bytes:
        """What the registry has under a digest."""
        name = digest.removeprefix("sha256:")
        return (self.blobs / name[:2] / name / "data").read_bytes()


def publish(cluster: Cluster, source: Path, name: str) -> Published:
    reference = cluster.build(source, name)
    blobs = cluster.registry.root / "data/docker/registry/v2/blobs/sha256"
    repository, _, tag = name.partition(":")
    link = (
        cluster.registry.root
        / f"data/docker/registry/v2/repositories/{repository}/_manifests/tags/{tag}/current/link"
    )
    digest = link.read_text()
    found = Published(reference, digest, {}, blobs)
    return Published(reference, digest, json.loads(found.content(digest)), blobs)


def curl(url: str, *options: str) -> tuple[int, bytes]:
    """Status and body."""
    done = subprocess.run(
        ["curl", "-sS", "--max-time", "20", "-w", "%{stderr}%{http_code}", *options, url],
        capture_output=True,
        check=True,
    )
    return int(done.stderr[-3:]), done.stdout


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, PeerHost, Published]]:
    """A host that has all of an image, and keeps encoded bytes."""
    directory = tmp_path_factory.mktemp("mirror")
    source = compressible(directory / "model", 12 * MIB)
    port = free_port()
    options = ["--keep-encoded", "always", "--metrics-listen", f"127.0.0.1:{port}"]
    with peer_cluster(directory / "cluster", 1, options) as cluster:
        cluster.metrics_port = port
        (host,) = cluster.hosts
        image = publish(cluster, source, "team/model:v1")
        host.mount(image.reference, "--prefetch", "all")
        assert same(source, host.mount_dir)
        yield cluster, host, image


def test_curl_reads_a_whole_blob_and_ranges_of_it(mirror: tuple[Cluster, PeerHost, Published]) -> None:
    _, host, image = mirror
    content, url = image.content(image.data_blob), f"{host.url}/v2/team/model/blobs/{image.data_blob}"
    assert curl(url) == (200, content)
    assert curl(url, "-r", "4096-1000000") == (206, content[4096:1000001])
    assert curl(url, "-r", "-5000") == (206, content[-5000:])  # what is no chunk
    status, head = curl(url, "-I")
    assert (status, f"content-length: {len(content)}" in head.decode().lower()) == (200, True)
    other = "sha256:" + "0" * 64
    assert curl(url.replace(image.data_blob, other))[0] == 404
    assert curl(f"{host.url}/v2/team/model/manifests/v1")[0] == 404  # the registry knows what tags name
    kept = host.machine.directory / "cache/blobs" / f"{image.data_blob[7:]}.blob"
    assert hashlib.sha256(kept.read_bytes()).hexdigest() == image.data_blob[7:]


def scrape(url: str, *options: str) -> dict[str, float]:
    """The samples at an address, those of a family added up."""
    status, body = curl(url, *options)
    assert status == 200
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def test_a_scraper_reads_the_metrics_of_agent_upload_server_and_scheduler(
    mirror: tuple[Cluster, PeerHost, Published],
) -> None:
    cluster, host, image = mirror
    socket_path = host.machine.directory / "run" / SOCKET_NAME
    agent = scrape("http://localhost/metrics", "--unix-socket", str(socket_path))
    assert agent["nydus_py_fetched_bytes_total"] >= 12 * MIB
    assert agent["nydus_py_fetch_duration_seconds_count"] > 0
    assert agent["nydus_py_peer_members"] == agent["nydus_py_peer_scheduler_up"] == 1
    assert agent["nydus_py_peer_encoded_bytes"] > 0
    assert agent["nydus_py_mounts"] == 1
    assert "encoded: " in host.machine.nydus("status", "--peers")
    page = (Path(__file__).resolve().parents[2] / "docs/metrics.md").read_text()
    names = {re.sub("_(total|bucket|sum|count)$", "", name).removeprefix("nydus_py_") for name in agent}
    assert not [name for name in names if f"`{name}" not in page]
    assert scrape(f"http://127.0.0.1:{cluster.metrics_port}/metrics").keys() >= agent.keys()
    curl(f"{host.url}/v2/team/model/blobs/{image.data_blob}")
    server = scrape(f"{host.url}/metrics")
    assert server["nydus_py_server_sent_bytes_total"] >= len(image.content(image.data_blob))
    assert server["nydus_py_server_requests_total"] >= 2
    scheduler = scrape(f"{cluster.scheduler_url}/metrics")
    assert scheduler["nydus_py_scheduler_hosts"] == 1
    assert scheduler["nydus_py_scheduler_announcements_total"] > 0
    assert curl(f"http://127.0.0.1:{cluster.metrics_port}/api/v1/status")[0] == 404


def test_curl_reads_manifest_config_and_bootstrap_layer(mirror: tuple[Cluster, PeerHost, Published]) -> None:
    _, host, image = mirror
    status, manifest = curl(f"{host.url}/v2/team/model/manifests/{image.digest}", "-i")
    head, _, body = manifest.partition(b"\r\n\r\n")
    assert (status, body) == (200, image.content(image.digest))
    assert f"content-type: {image.manifest['mediaType']}" in head.decode().lower()
    for part in (image.manifest["config"], image.manifest["layers"][-1]):
        url = f"{host.url}/v2/team/model/blobs/{part['digest']}"
        assert curl(url) == (200, image.content(part["digest"]))
        assert curl(url, "-r", "1-9") == (206, image.content(part["digest"])[1:10])


@contextmanager
def registry_down(cluster: Cluster) -> Iterator[None]:
    """The registry stops for a while: what is read meanwhile comes from somewhere else."""
    os.kill(cluster.registry.pid, 19)
    try:
        yield
    finally:
        os.kill(cluster.registry.pid, 18)


@pytest.mark.needs_skopeo
def test_skopeo_copies_an_image_from_the_mirror(
    mirror: tuple[Cluster, PeerHost, Published], tmp_path: Path
) -> None:
    cluster, host, image = mirror
    (tmp_path / "registries.conf").write_text(
        f'[[registry]]\nprefix = "{cluster.registry.host}"\nlocation = "{cluster.registry.host}"\n'
        f'insecure = true\n[[registry.mirror]]\nlocation = "{host.url[7:]}"\ninsecure = true\n'
    )
    source = f"docker://{cluster.registry.host}/team/model@{image.digest}"
    options = ["--insecure-policy", "--registries-conf", str(tmp_path / "registries.conf")]
    command = ["skopeo", *options, "copy", source, f"dir:{tmp_path / 'copied'}"]
    assert curl(f"{host.url}/v2/team/model/manifests/{image.digest}")[0] == 200
    with registry_down(cluster):
        done = subprocess.run(command, check=False, capture_output=True, timeout=30)
    assert done.returncode == 0, done.stderr
    for part in (image.manifest["config"], *image.manifest["layers"]):
        assert (tmp_path / "copied" / part["digest"][7:]).read_bytes() == image.content(part["digest"])


@contextmanager
def containerd(directory: Path) -> Iterator[list[str]]:
    """A containerd of its own; the command of its client."""
    address = directory / "containerd.sock"
    command = [f"--root={directory / 'root'}", f"--state={directory / 'state'}", f"--address={address}"]
    with (directory / "log").open("wb") as log:
        (directory / "config.toml").write_text(
            'version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
        )
        command.append(f"--config={directory / 'config.toml'}")
        process = subprocess.Popen(["containerd", *command], stdout=log, stderr=log)
    try:
        client = ["ctr", "-a", str(address), "-n", "test"]
        until(lambda: subprocess.run([*client, "version"], capture_output=True, check=False).returncode == 0)
        yield client
    finally:
        process.terminate()
        process.wait()


@pytest.mark.needs_containerd
def test_containerd_fetches_from_the_mirror_and_the_rest_from_the_registry(
    mirror: tuple[Cluster, PeerHost, Published], tmp_path: Path
) -> None:
    cluster, host, image = mirror
    hosts = tmp_path / "certs.d" / cluster.registry.host
    hosts.mkdir(parents=True)
    (hosts / "hosts.toml").write_text(
        f'server = "http://{cluster.registry.host}"\n'
        f'[host."{host.url}"]\ncapabilities = ["pull", "resolve"]\n'
    )
    before = host.peers()["traffic"]["served_bytes"]
    with containerd(tmp_path) as ctr:
        fetch = ["content", "fetch", "--hosts-dir", str(tmp_path / "certs.d"), image.reference]
        subprocess.run([*ctr, *fetch], check=True, capture_output=True, timeout=30)
        for part in (image.manifest["config"], *image.manifest["layers"]):
            done = subprocess.run([*ctr, "content", "get", part["digest"]], capture_output=True, check=True)
            assert done.stdout == image.content(part["digest"])
    size = len(image.content(image.data_blob))
    until(lambda: host.peers()["traffic"]["served_bytes"] >= before + size)


def test_what_is_not_all_here_is_not_offered(
    mirror: tuple[Cluster, PeerHost, Published], tmp_path: Path
) -> None:
    """An image that is read lazily: ranges that are here are served, the whole is not, nor its manifest."""
    cluster, host, _ = mirror
    image = publish(cluster, compressible(tmp_path / "model", 48 * MIB, seed=2), "lazy:v1")
    (mount_dir := tmp_path / "lazy").mkdir()
    host.machine.nydus("mount", image.reference, mount_dir, "--prefetch", "none")
    try:
        with (mount_dir / "model.bin").open("rb") as file:
            file.read(4096)
        url, content = f"{host.url}/v2/lazy/blobs/{image.data_blob}", image.content(image.data_blob)
        assert curl(url)[0] == 404
        assert curl(url, "-I")[0] == 404
        assert curl(f"{host.url}/v2/lazy/manifests/{image.digest}")[0] == 404
        until(lambda: curl(url, "-r", "0-4095") == (206, content[:4096]))
        assert curl(url, "-r", f"{len(content) - 10}-")[0] == 404
    finally:
        host.machine.nydus("umount", mount_dir)


@pytest.mark.slow
def test_incompressible_blobs_are_not_kept_by_default(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "weights").write_bytes(random.Random(1).randbytes(2 * MIB))
    with peer_cluster(tmp_path / "cluster", 1) as cluster:
        (host,) = cluster.hosts
        for name, directory in (("noise", source), ("text", compressible(tmp_path / "text", 2 * MIB))):
            image = publish(cluster, directory, f"{name}:v1")
            host.mount(image.reference, "--prefetch", "all")
            assert same(directory, host.mount_dir)
            expected = 200 if name == "text" else 404
            assert curl(f"{host.url}/v2/{name}/blobs/{image.data_blob}")[0] == expected
            host.unmount()


def kill_agent(host: PeerHost) -> None:
    """The agent dies; its supervisor starts another one."""
    (status,) = host.machine.statuses()
    pid = int(str(status["pid"]))
    os.kill(pid, 9)
    until(lambda: int(str(host.machine.statuses()[0]["pid"])) != pid)


@pytest.mark.slow
def test_what_was_kept_outlives_the_agent(tmp_path: Path) -> None:
    """Killed before anything was flushed: what is lacking then is brought again, and the whole compared."""
    source = compressible(tmp_path / "model", 4 * MIB)
    with peer_cluster(tmp_path / "cluster", 1, ["--keep-encoded", "always"]) as cluster:
        (host,) = cluster.hosts
        image = publish(cluster, source, "model:v1")
        host.mount(image.reference, "--prefetch", "all", "--driver", "fuse")
        assert same(source, host.mount_dir)
        kill_agent(host)
        url = f"{host.url}/v2/model/blobs/{image.data_blob}"
        deadline = time.monotonic() + 20
        while (answer := curl(url, "--retry-connrefused", "--retry", "5"))[0] != 200:
            assert time.monotonic() < deadline
        assert answer == (200, image.content(image.data_blob))


def test_hosts_that_keep_encoded_bytes_give_them_to_each_other(tmp_path: Path) -> None:
    """What the second host has is decoded from what the first one kept, and whole there, too."""
    source = compressible(tmp_path / "model", 8 * MIB)
    with peer_cluster(tmp_path / "cluster", 2) as cluster:
        first, second = cluster.hosts
        image = publish(cluster, source, "model:v1")
        first.mount(image.reference, "--prefetch", "all")
        assert same(source, first.mount_dir)
        second.mount(image.reference, "--prefetch", "all")
        assert same(source, second.mount_dir)
        traffic = second.peers()["traffic"]
        assert traffic["peer_bytes"] + traffic["origin_bytes"] >= 8 * MIB
        assert 0 < traffic["peer_encoded_bytes"] <= 0.6 * traffic["peer_bytes"]
        assert cluster.origin_bytes() <= 1.02 * 8 * MIB
        answer = curl(f"{second.url}/v2/model/blobs/{image.data_blob}")
        assert answer == (200, image.content(image.data_blob))
