"""hosts.toml as it is installed: containerd asks the upload server of its host, then the registry."""

import contextlib
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cli_machine import Machine
from tests.integration.containerd_host import ContainerdHost, containerd_host
from tests.integration.peer_cluster import peer_cluster
from tests.integration.pod_images import PodImages, base_layer, upper_layer
from tests.integration.registry_server import RegistryServer, free_port, registry_server

pytestmark = [pytest.mark.needs_containerd, pytest.mark.needs_registry]


def push(host: str, directory: Path) -> str:
    directory.mkdir()
    repository = f"mirror/{directory.parent.name.replace('_', '-').lower()}"
    return PodImages(host, Machine(directory)).push(repository, [base_layer(), upper_layer()])


@pytest.fixture
def image(anonymous_registry: RegistryServer, tmp_path: Path) -> str:
    return push(anonymous_registry.host, tmp_path / "image")


@contextlib.contextmanager
def containerd_with(image: str, mirror: str) -> Iterator[ContainerdHost]:
    """containerd as it is, with the hosts.toml of an installation."""
    with containerd_host(image, snapshotter="overlayfs") as host:
        root = host.directory / "installed"
        root.mkdir()
        host.machine.nydus("install", "--root", root, "--without", "systemd", "--mirror", mirror)
        host.kill_containerd(signal.SIGTERM)
        (root / "etc/containerd/certs.d").rename(host.directory / "certs.d")
        host.start_containerd()
        yield host


def asked(registry: RegistryServer, method: str, kind: str) -> int:
    """How often its log has a request for blobs or manifests."""
    log = (registry.root / "registry.log").read_text()
    return len(re.findall(rf'"{method} /v2/mirror/\S+/{kind}/', log))


def pulls(host: ContainerdHost, image: str) -> None:
    """It pulls the whole image; the snapshotter beside it is not ours, so the layers are fetched."""
    host.cri.pull(image)
    assert len(host.content()) >= 4


def test_what_the_mirror_has_is_not_asked_of_the_registry(
    image: str, anonymous_registry: RegistryServer, tmp_path: Path
) -> None:
    with registry_server(tmp_path / "mirror") as mirror:
        # Stands for an upload server that has everything of the image.
        push(mirror.host, tmp_path / "copy")
        before = asked(anonymous_registry, "GET", "blobs"), asked(anonymous_registry, "HEAD", "manifests")
        with containerd_with(image, f"http://{mirror.host}") as host:
            pulls(host, image)
        after = asked(anonymous_registry, "GET", "blobs"), asked(anonymous_registry, "HEAD", "manifests")
        assert after == (before[0], before[1] + 1)
        assert asked(mirror, "GET", "blobs") == 3
        # What a tag means the registry says, nobody else.
        assert asked(mirror, "HEAD", "manifests") == 0


@pytest.mark.slow
def test_what_the_upload_server_lacks_comes_from_the_registry(
    image: str, anonymous_registry: RegistryServer, tmp_path: Path
) -> None:
    with peer_cluster(tmp_path, 1) as peers:
        url = peers.hosts[0].peers()["host"]["url"]
        with containerd_with(image, url) as host:
            pulls(host, image)


@pytest.mark.slow
def test_nobody_listens_there(image: str, anonymous_registry: RegistryServer) -> None:
    with containerd_with(image, f"http://127.0.0.1:{free_port()}") as host:
        pulls(host, image)
