"""Whatever dies, running containers go on reading and new ones start; one broken image concerns no other."""

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend.chunkmap import ChunkMapHeader
from tests.integration.containerd_host import (
    ContainerdHost,
    containerd_host,
    trust_registry,
    wait_until,
)
from tests.integration.pod_images import PodImageSet, make_pod_images
from tests.integration.registry_server import registry_server
from tests.integration.test_snapshotter_pods import LARGE_SHA256, see
from tests.stress.chaos import serving_agent
from tools.bench.pods.cri import CriError

pytestmark = [pytest.mark.needs_containerd, pytest.mark.needs_registry, pytest.mark.needs_fuse]

DRIVERS = ["erofs", pytest.param("fuse", marks=pytest.mark.slow)]


@pytest.fixture(params=DRIVERS)
def host(request: pytest.FixtureRequest, pod_images: PodImageSet) -> Iterator[ContainerdHost]:
    if request.param == "erofs":
        from tests.integration.kernel_drivers import need_erofs_events

        need_erofs_events()
    with containerd_host(pod_images.nydus, snapshotter_options=("--driver", request.param)) as host:
        trust_registry(host, pod_images.place.host)
        yield host


def kill_serving_agent(host: ContainerdHost) -> None:
    """Kills the agent, not its supervisor."""
    agent = serving_agent(host.machine)
    assert agent is not None
    os.kill(agent, signal.SIGKILL)


def test_nobody_notices_that_agent_snapshotter_and_containerd_are_killed(
    host: ContainerdHost, pod_images: PodImageSet
) -> None:
    host.cri.pull(pod_images.nydus)
    pod = host.cri.run_pod()
    running = pod.start(pod_images.nydus, "/bin/sleep", "1000")
    kill_serving_agent(host)
    assert pod.run(running, "/bin/sha256sum", "/etc/large").split()[0] == LARGE_SHA256
    host.kill_snapshotter()
    assert pod.run(running, "/bin/cat", "/srv/link") == "hello\n"
    host.start_snapshotter()
    host.kill_containerd()
    host.start_containerd()
    pod.cri = host.cri
    assert pod.run(running, "/bin/cat", "/etc/also") == "hello\n"
    see(pod, pod_images.nydus)
    host.cri.pull(pod_images.index)
    see(pod, pod_images.index)
    assert "mounted again" not in host.log()


@pytest.mark.slow
def test_a_new_agent_gets_the_mounts_of_one_that_is_gone_with_its_supervisor(
    host: ContainerdHost, pod_images: PodImageSet
) -> None:
    host.cri.pull(pod_images.nydus)
    host.kill_agent()
    pod = host.cri.run_pod()
    see(pod, pod_images.nydus)


@pytest.fixture
def own_images(tmp_path: Path) -> Iterator[tuple[PodImageSet, contextlib.ExitStack]]:
    """Images in a registry that the test may stop."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(registry_server(tmp_path / "registry"))
        yield make_pod_images(server.host, tmp_path / "machine", "own"), stack


def reboot(host: ContainerdHost) -> None:
    """Ends every process, and takes away what a start of the machine takes away."""
    host.kill_containerd()
    host.kill_snapshotter()
    host.kill_agent()
    host.end_containers()
    for path in (host.directory / "state", host.machine.directory / "run"):
        shutil.rmtree(path, ignore_errors=True)
    host.start()


@pytest.mark.slow
def test_images_are_mounted_again_after_a_reboot_without_their_registry(
    own_images: tuple[PodImageSet, contextlib.ExitStack], pod_images: PodImageSet
) -> None:
    images, registry = own_images
    with containerd_host(pod_images.plain) as host:
        trust_registry(host, images.place.host)
        trust_registry(host, pod_images.place.host)
        host.cri.pull(images.nydus)
        pod = host.cri.run_pod()
        see(pod, images.nydus)
        # All but that of the file which a layer above hides.
        chunks = images.place.machine.json("inspect", images.nydus)["chunks"]
        assert isinstance(chunks, int)
        wait_until("what was read is marked", lambda: _marked_chunks(host) == chunks - 1)
        host.cri.pull(images.no_copy)
        host.cri.pull(images.index)
        registry.close()
        before = host.image_mounts()
        reboot(host)
        wait_until("all are mounted again", lambda: len(host.image_mounts()) == len(before) == 3)
        pod = host.cri.run_pod()
        see(pod, images.nydus)


def _marked_chunks(host: ContainerdHost) -> int:
    maps = (host.machine.directory / "cache" / "blobs").glob("*.chunk_map")
    bits = (int.from_bytes(path.read_bytes()[ChunkMapHeader.SIZE :], "big") for path in maps)
    return sum(found.bit_count() for found in bits)


@pytest.mark.slow
def test_an_image_that_is_broken_stops_neither_the_start_nor_the_others(
    own_images: tuple[PodImageSet, contextlib.ExitStack], pod_images: PodImageSet
) -> None:
    images, registry = own_images
    with containerd_host(pod_images.plain) as host:
        trust_registry(host, images.place.host)
        trust_registry(host, pod_images.place.host)
        host.cri.pull(images.nydus)
        (metadata,) = (host.machine.directory / "cache" / "images").iterdir()
        host.cri.pull(pod_images.nydus)
        registry.close()
        host.kill_snapshotter()
        host.kill_agent()
        host.end_containers()
        shutil.rmtree(metadata)
        host.start_snapshotter()
        wait_until("it is in the log", lambda: "not mounted again" in host.log())
        pod = host.cri.run_pod()
        see(pod, pod_images.nydus)
        with pytest.raises(CriError, match="unavailable"):
            pod.start(images.nydus, "/bin/sleep", "1")
