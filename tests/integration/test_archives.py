"""Archive files between nydus-py, skopeo and umoci; conversion, mount and the other verbs on them."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.archives import saved_config, saved_layer_image, sha256
from tests.integration.cli_machine import Machine, unmount_anyway
from tests.integration.registry_server import RegistryServer
from tests.integration.test_layers_against_umoci import busy_layers
from tests.integration.test_mount_pyfuse3 import noise
from tests.oci_images import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST, Layer, Layout, gzipped
from tests.tree_compare import describe_tree

MIB = 1 << 20

pytestmark = [pytest.mark.needs_skopeo, pytest.mark.needs_umoci]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "source")
    same = Layer().add("same", b"s" * 700).tar()
    made.image([*busy_layers(), same, Layer().add("between", b"b"), same], tag="v1")
    return made


def skopeo(*arguments: str) -> str:
    """Standard output of skopeo."""
    return subprocess.run(
        ["skopeo", "--insecure-policy", *arguments], check=True, capture_output=True, text=True
    ).stdout


def raw_manifest(reference: str) -> dict[str, object]:
    found = json.loads(skopeo("inspect", "--raw", "--tls-verify=false", reference))
    assert isinstance(found, dict)
    return found


def unpacked(layout: str, target: Path) -> dict[str, dict[str, str]]:
    """What umoci makes of an image in a layout; it leaves some directories with the time of its run."""
    subprocess.run(["umoci", "unpack", "--image", layout, target], check=True, capture_output=True)
    tree = describe_tree(target / "rootfs")
    for facts in tree.values():
        if facts["mode"].startswith("0o4"):
            facts.pop("mtime", None)
    return tree


@pytest.mark.needs_registry
def test_what_skopeo_wrote_is_read(
    tmp_path: Path, machine: Machine, layout: Layout, anonymous_registry: RegistryServer
) -> None:
    """The copy of an OCI archive has the digest of the original, which skopeo knows too."""
    source = f"oci:{layout.path}:v1"
    skopeo("copy", source, f"oci-archive:{tmp_path / 'o.tar'}:v1")
    skopeo("copy", source, f"docker-archive:{tmp_path / 'd.tar'}:app:v1")
    target = f"{anonymous_registry.host}/archives/read"
    copied = machine.json("copy", f"oci-archive:{tmp_path / 'o.tar'}:v1", f"{target}:oci")
    original = json.loads(skopeo("inspect", source))["Digest"]
    assert copied["digest"] == original
    assert raw_manifest(f"docker://{target}:oci") == raw_manifest(source)
    machine.nydus("copy", f"docker-archive:{tmp_path / 'd.tar'}:app:v1", f"{target}:docker")
    layers = raw_manifest(f"docker://{target}:docker")["layers"]
    saved = raw_manifest(f"docker-archive:{tmp_path / 'd.tar'}")["layers"]
    assert isinstance(layers, list)
    assert isinstance(saved, list)
    assert [layer["digest"] for layer in layers] == [layer["digest"] for layer in saved]
    assert {layer["mediaType"] for layer in layers} == {"application/vnd.oci.image.layer.v1.tar"}


@pytest.mark.needs_root
def test_what_was_written_is_read_by_skopeo(tmp_path: Path, machine: Machine, layout: Layout) -> None:
    source = f"oci:{layout.path}:v1"
    wanted = unpacked(f"{layout.path}:v1", tmp_path / "wanted")
    oci, docker = f"oci-archive:{tmp_path / 'o.tar'}:v1", f"docker-archive:{tmp_path / 'd.tar'}:app:v1"
    machine.nydus("copy", source, oci)
    machine.nydus("copy", source, docker)
    assert json.loads(skopeo("inspect", oci))["Digest"] == json.loads(skopeo("inspect", source))["Digest"]
    assert json.loads(skopeo("inspect", docker))["Layers"] == _diff_ids(layout)
    for name, reference in (("o", oci), ("d", docker)):
        skopeo("copy", reference, f"oci:{tmp_path / name}:v1")
        assert unpacked(f"{tmp_path / name}:v1", tmp_path / f"tree-{name}") == wanted


def _diff_ids(layout: Layout) -> list[str]:
    config = json.loads(skopeo("inspect", "--config", f"oci:{layout.path}:v1"))
    found = config["rootfs"]["diff_ids"]
    assert isinstance(found, list)
    return found


@pytest.mark.needs_registry
def test_an_index_goes_round_through_an_archive(
    tmp_path: Path, machine: Machine, anonymous_registry: RegistryServer
) -> None:
    layout = Layout(tmp_path / "source")
    entries = []
    for architecture in ("amd64", "arm64"):
        made = layout.image([Layer().add("arch", architecture.encode())], architecture=architecture)
        entries.append(made.descriptor(platform={"os": "linux", "architecture": architecture}))
    index = layout.put_json(OCI_INDEX, {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries})
    layout.tag(index, "all")
    skopeo("copy", "--all", f"oci:{layout.path}:all", f"oci-archive:{tmp_path / 'theirs.tar'}:all")
    target = f"{anonymous_registry.host}/archives/index:all"
    assert machine.json("copy", f"oci-archive:{tmp_path / 'theirs.tar'}", target)["digest"] == index.digest
    ours = f"oci-archive:{tmp_path / 'ours.tar'}:all"
    assert machine.json("copy", target, ours)["digest"] == index.digest
    skopeo("copy", "--all", ours, f"oci:{tmp_path / 'back'}:all")
    blobs = sorted(path.name for path in (layout.path / "blobs/sha256").iterdir())
    assert sorted(path.name for path in (tmp_path / "back/blobs/sha256").iterdir()) == blobs


@pytest.mark.needs_root
def test_archives_are_converted(tmp_path: Path, machine: Machine, layout: Layout) -> None:
    source = f"oci:{layout.path}:v1"
    skopeo("copy", source, f"oci-archive:{tmp_path / 'o.tar'}:v1")
    skopeo("copy", source, f"docker-archive:{tmp_path / 'd.tar'}:app:v1")
    machine.nydus("convert", source, f"oci:{tmp_path / 'plain'}:v1")
    machine.nydus("unpack", f"oci:{tmp_path / 'plain'}:v1", tmp_path / "wanted")
    wanted = describe_tree(tmp_path / "wanted")
    for kind, file in (("oci-archive", "o.tar"), ("docker-archive", "d.tar")):
        target = f"oci-archive:{tmp_path / f'nydus-{file}'}:v1"
        report = machine.json("convert", f"{kind}:{tmp_path / file}", target, "--both")
        assert report["layers"] == len(_diff_ids(layout))
        again = machine.json("convert", f"{kind}:{tmp_path / file}", target, "--both")
        assert (again["layers_converted"], again["digest"]) == (0, report["digest"])
        machine.nydus("check", "--deep", target)
        machine.nydus("unpack", target, tmp_path / f"tree-{file}")
        assert describe_tree(tmp_path / f"tree-{file}") == wanted
        original = json.loads(skopeo("inspect", "--raw", target))["manifests"][0]
        assert original["platform"] == {"architecture": "amd64", "os": "linux"}


def test_the_content_of_packed_layers_is_what_the_config_says(tmp_path: Path, machine: Machine) -> None:
    """Of a plain layer, its digest says so already."""
    tar, other = Layer().add("f", b"f").tar(), Layer().add("g", b"g").tar()
    packed = gzipped(tar).data
    saved_layer_image(packed, saved_config([tar])).write(tmp_path / "sound.tar")
    machine.nydus("convert", f"docker-archive:{tmp_path}/sound.tar", f"oci:{tmp_path}/out:v1")
    saved_layer_image(packed, saved_config([other])).write(tmp_path / "lying.tar")
    code, line = machine.failure("convert", f"docker-archive:{tmp_path}/lying.tar", f"oci:{tmp_path}/lie:v1")
    assert (code, f"unpacks to {sha256(tar)}" in line, sha256(other) in line) == (62, True, True)


def test_a_conversion_that_failed_before_the_archive_was_there_goes_on(
    tmp_path: Path, machine: Machine
) -> None:
    """What is in an unfinished archive is nowhere: the converted layers must not be given away to it."""
    layout = Layout(tmp_path / "source")
    sound = layout.image([Layer().add("f", noise(MIB))], tag="sound")
    manifest = json.loads(sound.data)
    config = json.loads(layout.read(manifest["config"]["digest"])) | {"history": ["none"]}
    manifest["config"] = layout.put_json(OCI_CONFIG, config).descriptor()
    layout.tag(layout.put_json(OCI_MANIFEST, manifest), "broken")
    target = f"oci-archive:{tmp_path / 'a.tar'}"
    code, line = machine.failure("convert", f"oci:{layout.path}:broken", target)
    assert (code, "config" in line) == (47, True), line
    assert not (tmp_path / "a.tar").exists()
    assert machine.json("convert", f"oci:{layout.path}:sound", target)["layers_converted"] == 0
    kept = [path for path in (machine.directory / "cache/layers").rglob("*") if path.stat().st_size >= MIB]
    assert kept == [], "the archive has the blobs now"
    machine.nydus("check", "--deep", target)


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "mnt"
    directory.mkdir()
    yield directory
    unmount_anyway(directory)


@pytest.mark.needs_fuse
def test_a_nydus_image_in_an_archive_serves_every_verb(
    tmp_path: Path, machine: Machine, mountpoint: Path
) -> None:
    source = tmp_path / "tree"
    (source / "sub").mkdir(parents=True)
    (source / "sub/big").write_bytes(noise(5 * MIB))
    (source / "small").write_bytes(b"small")
    image = f"oci-archive:{tmp_path / 'a.tar'}"
    built = machine.json("build", source, f"{image}:v1")
    assert machine.json("inspect", image)["digest"] == built["digest"]
    assert "sub/big" in machine.nydus("ls", "-R", image)
    assert machine.nydus("cat", image, "/small") == "small"
    machine.nydus("check", "--deep", image)
    machine.nydus("mount", image, mountpoint, "--driver=pyfuse3")
    (tmp_path / "a.tar").unlink()  # it is open, and stays so as long as the mount
    assert (mountpoint / "sub/big").read_bytes() == noise(5 * MIB)
    machine.nydus("umount", mountpoint)


def test_a_killed_copy_leaves_what_was_there_and_is_swept(
    tmp_path: Path, machine: Machine, layout: Layout
) -> None:
    path = tmp_path / "out" / "a.tar"
    path.parent.mkdir()
    machine.nydus("copy", f"oci:{layout.path}:v1", f"oci-archive:{path}:v1")
    before = path.read_bytes()
    large = Layout(tmp_path / "large")
    large.image([Layer().add("f", noise(64 * MIB, 1))], tag="v1")
    command = machine.command("copy", f"oci:{large.path}:v1", f"oci-archive:{path}:v1")
    with subprocess.Popen(command, env=machine.environment) as process:
        deadline = time.monotonic() + 60
        while not list(path.parent.glob(".staging-*/archive")):
            assert process.poll() is None, "it was over before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert path.read_bytes() == before
    assert list(path.parent.glob(".staging-*"))
    machine.nydus("copy", f"oci:{layout.path}:v1", f"oci-archive:{path}:v2")
    assert [entry.name for entry in path.parent.iterdir()] == ["a.tar"]


def test_places_that_cannot_have_what_is_wanted(tmp_path: Path, machine: Machine, layout: Layout) -> None:
    source, file = f"oci:{layout.path}:v1", tmp_path / "a.tar"
    code, line = machine.failure("convert", source, f"docker-archive:{file}")
    assert (code, "holds no Nydus images" in line) == (2, True), line
    code, line = machine.failure(
        "convert", source, f"oci-archive:{file}", "--build-cache", f"oci-archive:{tmp_path / 'c.tar'}"
    )
    assert (code, "use a registry or oci:DIR" in line) == (2, True), line
    shutil.copy(layout.path / "index.json", file)
    code, line = machine.failure("copy", f"oci-archive:{file}", f"oci:{tmp_path / 'out'}")
    assert (code, "no tar file" in line) == (125, True), line
