"""Pods by the real containerd and runc: what is fetched, what the containers see, what is left."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend.manifest import NYDUS_ARTIFACT
from tests.integration.cli_machine import Machine
from tests.integration.containerd_host import (
    ContainerdHost,
    Ctr,
    containerd_host,
    trust_registry,
    wait_until,
)
from tests.integration.pod_images import PodImages, PodImageSet, base_layer, upper_layer
from tests.integration.registry_server import USER, RegistryServer
from tests.oci_images import OCI_INDEX, OCI_MANIFEST, Layer
from tests.tree_compare import describe_tree
from tools.bench.pods.containerd import PROXY_NAME
from tools.bench.pods.cri import CriError, Pod

pytestmark = [pytest.mark.needs_containerd, pytest.mark.needs_registry, pytest.mark.needs_fuse]

LARGE_SHA256 = hashlib.sha256(bytes(range(256)) * 8192).hexdigest()


@pytest.fixture(scope="module")
def host(pod_images: PodImageSet) -> Iterator[ContainerdHost]:
    with containerd_host(pod_images.nydus) as host:
        trust_registry(host, pod_images.place.host)
        yield host


@pytest.fixture(scope="module")
def pod(host: ContainerdHost, pod_images: PodImageSet) -> Iterator[Pod]:
    host.cri.pull(pod_images.nydus)
    pod = host.cri.run_pod()
    yield pod
    pod.remove()


def fetched_by_pull(host: ContainerdHost, image: str) -> set[str]:
    """Digests of what a pull brings into containerd's content store."""
    before = host.content()
    host.cri.pull(image)
    return host.content() - before


def see(pod: Pod, image: str) -> None:
    """A container of the image has the files of the image, and takes new ones."""
    container = pod.start(image, "/bin/sleep", "1000")
    script = "cat /etc/hello /srv/link; sha256sum /etc/large; ls /etc/below; touch /etc/new && ls /etc/new"
    lines = pod.run(container, "/bin/sh", "-c", script).splitlines()
    assert lines == ["hello", "hello", f"{LARGE_SHA256}  /etc/large", "/etc/new"]
    status = pod.run(container, "/bin/stat", "-c", "%u %g %a %h", "/etc/hello")
    assert status == "1000 70000 640 2\n"


@pytest.mark.parametrize("form", ["nydus", "no_copy", "index", "referrer"])
def test_a_pod_starts_without_its_layers(
    host: ContainerdHost, pod: Pod, pod_images: PodImageSet, form: str
) -> None:
    image = getattr(pod_images, form)
    fetched = fetched_by_pull(host, image)
    documents = [json.loads(host.ctr("content", "get", digest)) for digest in fetched]
    assert all("layers" in one or "rootfs" in one or "manifests" in one for one in documents)
    see(pod, image)


def test_a_layer_that_was_left_out_is_fetched_for_an_image_that_has_no_variant(
    host: ContainerdHost, pod: Pod, pod_images: PodImageSet
) -> None:
    host.cri.pull(pod_images.index)
    host.cri.pull(pod_images.sharing)
    see(pod, pod_images.sharing)
    see(pod, pod_images.index)
    assert "is fetched whole" in host.log()
    ours, theirs = Ctr(host, PROXY_NAME, "k8s.io"), Ctr(host, "overlayfs", "compared")
    pull = ("images", "pull", "--plain-http", *theirs.option, pod_images.sharing)
    host.ctr(*pull, namespace=theirs.namespace)
    found = [
        ctr.mounts("view", "compared", host.image_of(pod_images.sharing))[-1].paths for ctr in (ours, theirs)
    ]
    for own, other in zip(*found, strict=True):
        # As containerd unpacks it; without times, for some members say none.
        assert describe_tree(own, with_times=False) == describe_tree(other, with_times=False)


def test_ordinary_images_are_unpacked_as_overlayfs_has_them(
    host: ContainerdHost, pod_images: PodImageSet
) -> None:
    found = {}
    for snapshotter in (PROXY_NAME, "overlayfs"):
        ctr = Ctr(host, snapshotter)
        host.ctr("images", "pull", "--plain-http", *ctr.option, pod_images.plain, namespace=ctr.namespace)
        top = ctr.top()
        found[snapshotter] = (ctr.mounts("prepare", "active", top), ctr.mounts("view", "view", top))
    ours, theirs = found[PROXY_NAME], found["overlayfs"]
    for own, other in zip(ours, theirs, strict=True):
        assert [option.name for option in own] == [option.name for option in other]
        for mine, its in zip(own, other, strict=True):
            for path, its_path in zip(mine.paths, its.paths, strict=True):
                # Without times: what was unpacked twice has two of them where its layer says none.
                trees = [describe_tree(directory, with_times=False) for directory in (path, its_path)]
                assert trees[0] == trees[1], mine.name


def test_an_active_snapshot_over_an_image_is_committed(host: ContainerdHost, pod_images: PodImageSet) -> None:
    host.cri.pull(pod_images.nydus)
    ctr = Ctr(host, PROXY_NAME, "k8s.io")
    image = host.image_of(pod_images.nydus)
    before = ctr.mounts("prepare", "work", image)
    upper = next(option.paths[0] for option in before if option.name == "upperdir")
    (upper / "added").write_bytes(b"x" * 5000)
    ctr.run("commit", "made-of-it", "work")
    container = ctr.mounts("prepare", "next", "made-of-it")
    (lower,) = [option.paths for option in container if option.name == "lowerdir"]
    assert (lower[0] / "added").stat().st_size == 5000
    assert (lower[1] / "etc/hello").read_bytes() == b"hello\n"
    (view,) = ctr.mounts("view", "look", image)
    assert (view.name, view.paths) == ("bind", (lower[1],))
    for key in ("next", "made-of-it"):
        ctr.run("rm", key)


@pytest.mark.slow
def test_images_that_are_removed_leave_nothing(pod_images: PodImageSet) -> None:
    with containerd_host(pod_images.nydus) as host:
        trust_registry(host, pod_images.place.host)
        names = [
            pod_images.nydus,
            pod_images.no_copy,
            pod_images.index,
            pod_images.referrer,
            pod_images.sharing,
            pod_images.plain,
        ]
        for name in names:
            host.cri.pull(name)
        assert len(host.image_mounts()) == 4
        cache = host.machine.directory / "cache"
        assert list((cache / "blobs").iterdir())
        for name in names:
            host.cri.remove_image(name)
        wait_until("nothing is left", lambda: not host.snapshot_directories())
        assert host.image_mounts() == []
        assert [*(cache / "blobs").iterdir(), *(cache / "images").iterdir()] == []
        wait_until("the agent has ended with its last mount", lambda: not host.agent_processes())


@pytest.mark.slow
def test_what_can_only_be_mounted_is_refused_when_its_name_is_not_told(
    pod_images: PodImageSet,
) -> None:
    with containerd_host(pod_images.nydus, has_annotations=False) as host:
        trust_registry(host, pod_images.place.host)
        with pytest.raises(CriError, match="disable_snapshot_annotations = false"):
            host.cri.pull(pod_images.nydus)
        host.cri.pull(pod_images.index)
        assert host.image_mounts() == []


@pytest.mark.slow
def test_without_an_agent_images_are_pulled_as_ever_and_the_log_says_why(
    pod_images: PodImageSet, tmp_path: Path
) -> None:
    options = ("--agent-socket", str(tmp_path / "nobody.sock"))
    with containerd_host(pod_images.plain, snapshotter_options=options) as host:
        trust_registry(host, pod_images.place.host)
        fetched = fetched_by_pull(host, pod_images.index)
        assert len(fetched) > 4  # index, manifest, config and layers
        pod = host.cri.run_pod()
        see(pod, pod_images.index)
        with pytest.raises(CriError, match=r"the agent does not answer.*can only be mounted"):
            host.cri.pull(pod_images.nydus)
        said = [line for line in host.log().splitlines() if "not mounted lazily" in line]
        assert [line.split("lazily: ")[0].split()[-3] for line in said] == [
            f"{name}:" for name in (pod_images.index, pod_images.nydus)
        ]
        assert host.image_mounts() == []


@pytest.mark.slow
def test_a_registry_that_wants_to_know_who_asks(
    htpasswd_registry: RegistryServer, pod_images: PodImageSet, tmp_path: Path
) -> None:
    place = PodImages(htpasswd_registry.host, Machine(tmp_path), USER.basic())
    plain = place.push("private/app", [base_layer(), upper_layer()])
    auths = {"auths": {place.host: {"username": USER.username, "password": USER.password}}}
    file = tmp_path / "auth.json"
    file.write_text(json.dumps(auths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGISTRY_AUTH_FILE", str(file))
        nydus = place.convert(plain, "nydus")
        place.machine.nydus("convert", "--both", plain, plain)
    hidden = tmp_path / "hidden.json"
    environment = {"REGISTRY_AUTH_FILE": str(hidden)}
    with containerd_host(pod_images.nydus, environment=environment) as host:
        trust_registry(host, pod_images.place.host)
        trust_registry(host, place.host)
        host.cri.pull(plain, USER.username, USER.password)
        assert "not authorized" in host.log()
        with pytest.raises(CriError, match="not authorized"):
            host.cri.pull(nydus, USER.username, USER.password)
        assert host.image_mounts() == []
        file.rename(hidden)
        wait_until("it is tried again", lambda: _pulls(host, nydus))
        see(host.cri.run_pod(), nydus)


def _pulls(host: ContainerdHost, image: str) -> bool:
    try:
        host.cri.pull(image, USER.username, USER.password)
    except CriError:
        return False
    return True


@pytest.mark.slow
def test_images_of_128_layers(host: ContainerdHost, pod: Pod, pod_images: PodImageSet) -> None:
    """More layers than the label that lists them has room for; lazily, and as ever."""
    place, repository = pod_images.place, "pods/high"
    layers = [base_layer(), upper_layer()] + [Layer().add(f"srv/l{number}", b"x") for number in range(126)]
    plain = place.push(repository, layers, "plain")
    host.cri.pull(plain)
    see(pod, plain)
    # The same with a variant: what it has is seen, and no layer is fetched.
    place.push(repository, [*layers[:-1], Layer().add("srv/other", b"y")], "other")
    variant = place.get_raw_manifest("pods/plain", "nydus")
    manifest = json.loads(variant)
    for part in (manifest["config"], *manifest["layers"]):
        place.put_blob(repository, part["digest"], place.get_blob("pods/plain", part["digest"]))
    place.put_manifest(repository, "variant", OCI_MANIFEST, variant)
    entries = [
        {"mediaType": OCI_MANIFEST, "digest": place.manifest_digest(repository, tag), "size": size, **more}
        for tag, size, more in (
            ("other", len(place.get_raw_manifest(repository, "other")), {}),
            ("variant", len(variant), {"artifactType": NYDUS_ARTIFACT}),
        )
    ]
    for entry in entries:
        entry["platform"] = {"architecture": "amd64", "os": "linux"}
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    place.put_manifest(repository, "both", OCI_INDEX, json.dumps(index).encode())
    fetched = fetched_by_pull(host, place.name(repository, "both"))
    assert len(fetched) <= 3
    see(pod, place.name(repository, "both"))
