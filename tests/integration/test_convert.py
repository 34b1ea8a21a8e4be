"""`nydus-py convert`, as a CI pipeline uses it: registries, layouts, platforms, reuse, and what must fail."""

import gzip
import json
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.integration.cli_machine import Machine
from tests.integration.registry_server import RegistryServer
from tests.integration.test_layers_against_umoci import busy_layers
from tests.integration.test_mount_pyfuse3 import noise
from tests.oci_images import OCI_INDEX, OCI_LAYER, Blob, Layer, Layout, gzipped, manifest_of
from tests.tree_compare import describe_tree

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "source")


def text_layer(name: str, size_bytes: int) -> Layer:
    return Layer().directory("d").add(f"d/{name}", (name.encode() * size_bytes)[:size_bytes])


@pytest.mark.needs_root
def test_a_registry_image_becomes_the_same_tree(
    tmp_path: Path, machine: Machine, layout: Layout, anonymous_registry: RegistryServer
) -> None:
    for tool in ("skopeo", "umoci"):
        if shutil.which(tool) is None:
            pytest.skip(f"not installed: {tool}")
    layout.image(busy_layers(), tag="v1")
    host = f"{anonymous_registry.host}/convert/busy"
    push = ["skopeo", "copy", "-q", "--insecure-policy", "--dest-tls-verify=false"]
    subprocess.run([*push, f"oci:{layout.path}:v1", f"docker://{host}:v1"], check=True)
    report = machine.json("convert", f"{host}:v1", f"{host}:v1-nydus")
    assert (report["layers"], report["layers_converted"], report["blobs_uploaded"]) == (3, 3, 3)
    machine.nydus("check", "--deep", f"{host}:v1-nydus")
    machine.nydus("unpack", f"{host}:v1-nydus", tmp_path / "ours")
    subprocess.run(["umoci", "unpack", "--image", f"{layout.path}:v1", tmp_path / "bundle"], check=True)
    ours, wanted = describe_tree(tmp_path / "ours"), describe_tree(tmp_path / "bundle/rootfs")
    for tree in (ours, wanted):
        del tree["/"]
        for name in ("/implied", "/implied/er"):  # nobody says when these were made
            del tree[name]["mtime"]
        for facts in tree.values():
            if facts["mode"].startswith("0o4"):
                facts.pop("mtime", None)
    assert ours == wanted


@pytest.mark.slow
def test_the_same_image_on_any_number_of_workers_and_again(machine: Machine, layout: Layout) -> None:
    layout.image([text_layer("a", 3 * MIB), Layer().add("b", noise(2 * MIB)), text_layer("c", 10)], tag="v1")
    first = machine.json("convert", f"oci:{layout.path}:v1", f"oci:{machine.directory}/one:v1", "--threads=1")
    other = Machine(machine.directory / "other")
    second = other.json(
        "convert", f"oci:{layout.path}:v1", f"oci:{machine.directory}/two:v1", "--threads=3", "--parallel=3"
    )
    again = machine.json("convert", f"oci:{layout.path}:v1", f"oci:{machine.directory}/one:v1")
    assert first["digest"] == second["digest"] == again["digest"]
    assert (again["layers_converted"], again["bytes_uploaded"]) == (0, 0)


@pytest.mark.slow
def test_of_several_variants_the_best_is_converted(machine: Machine, layout: Layout) -> None:
    """The order in the index says nothing."""
    variants = ("v5", "v7", "v6")
    entries = []
    for variant in variants:
        image = layout.image([Layer().add(variant, b"")], architecture="arm")
        platform = {"os": "linux", "architecture": "arm", "variant": variant}
        entries.append(image.descriptor(platform=platform))
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    layout.tag(layout.put_json(OCI_INDEX, index), "v1")
    for wanted, best in (
        ("arm", "v7"),
        ("arm/v8", "v7"),
        ("arm/v6", "v6"),
        ("arm/6", "v6"),
        ("arm/v5", "v5"),
    ):
        target = f"oci:{machine.directory}/{wanted.replace('/', '-')}:v1"
        source = f"oci:{layout.path}:v1"
        report = machine.json("convert", source, target, f"--platform=linux/{wanted}", "--both")
        assert report["platforms"] == [f"linux/arm/{best}"], wanted
    code, line = machine.failure(
        "convert", f"oci:{layout.path}:v1", f"oci:{machine.directory}/x:v1", "--platform=linux/arm/v4"
    )
    assert (code, "it has linux/arm/v5, linux/arm/v6, linux/arm/v7" in line) == (112, True), line


def test_both_variants_keep_the_nydus_images_of_others(machine: Machine, layout: Layout) -> None:
    """Converted one after the other in place: each replaces its own, and only that."""
    entries = [
        layout.image([Layer().add(variant, b"")], architecture="arm").descriptor(
            platform={"os": "linux", "architecture": "arm", "variant": variant}
        )
        for variant in ("v6", "v7")
    ]
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    layout.tag(layout.put_json(OCI_INDEX, index), "v1")
    place = f"oci:{layout.path}:v1"
    for variant, count in (("v6", 3), ("v7", 4), ("v7", 4)):
        report = machine.json("convert", place, place, "--both", f"--platform=linux/arm/{variant}")
        made = manifest_of(layout.path, str(report["digest"]))["manifests"]
        assert [entry["digest"] for entry in made[:2]] == [entry["digest"] for entry in entries]
        assert len(made) == count


def test_gzip_layers_stay_the_blobs_that_they_are(
    tmp_path: Path, machine: Machine, layout: Layout, anonymous_registry: RegistryServer
) -> None:
    """Only an index is added: in the registry of the original, and in another place."""
    if shutil.which("skopeo") is None:
        pytest.skip("not installed: skopeo")
    tars = [Layer().add("f", noise(3 * MIB)).tar(), Layer().add("g", b"g" * 100_000).whiteout("h").tar()]
    members = b"".join(gzip.compress(tars[1][at : at + 30_000]) for at in range(0, len(tars[1]), 30_000))
    blobs = [gzipped(tars[0]), Blob(OCI_LAYER + "+gzip", members)]
    original = layout.image(list(zip(tars, blobs, strict=True)), tag="v1")
    name = f"{anonymous_registry.host}/convert/kept"
    push = ["skopeo", "copy", "-q", "--insecure-policy", "--preserve-digests", "--dest-tls-verify=false"]
    subprocess.run([*push, f"oci:{layout.path}:v1", f"docker://{name}:v1"], check=True)
    report = machine.json("convert", f"{name}:v1", f"{name}:v1-ref", "--no-copy")
    assert (report["blobs_uploaded"], report["blobs_skipped"]) == (0, 2)
    assert isinstance(report["bytes_uploaded"], int)
    assert report["bytes_uploaded"] < 200_000, "the windows twice: for hosts and for other tools"
    inspected = machine.json("inspect", f"{name}:v1-ref")["blobs"]
    assert isinstance(inspected, list)
    assert [f"sha256:{blob['id']}" for blob in inspected] == [blob.digest for blob in blobs]
    other = f"{anonymous_registry.host}/convert/elsewhere:v1"
    assert machine.json("convert", f"{name}:v1", other, "--no-copy")["blobs_mounted"] == 2
    copied = f"oci:{machine.directory}/copied:v1"
    machine.nydus("copy", other, copied)
    for reference in (f"{name}:v1-ref", other, copied):
        machine.nydus("check", "--deep", reference)
        machine.nydus("unpack", reference, tmp_path / "out")
        assert (tmp_path / "out/f").read_bytes() == noise(3 * MIB)
        assert (tmp_path / "out/g").read_bytes() == b"g" * 100_000
        shutil.rmtree(tmp_path / "out")
    raw = ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{name}:v1"]
    assert subprocess.run(raw, check=True, capture_output=True).stdout == original.data


@pytest.mark.parametrize("options", [(), ("--no-copy",)])
def test_what_layers_unpack_to_is_what_the_config_says(
    machine: Machine, layout: Layout, options: tuple[str, ...]
) -> None:
    """Also of a layer that was converted for an image that tells the truth, here or by the build cache."""
    tar = Layer().add("f", noise(MIB)).tar()
    layout.image([tar], tag="sound")
    layout.image([(tar + bytes(512), gzipped(tar))], tag="lying")
    cache = ("--build-cache", f"oci:{machine.directory}/cache-image:v1", *options)
    machine.json("convert", f"oci:{layout.path}:sound", f"oci:{machine.directory}/out:v1", *cache)
    for host in (machine, Machine(machine.directory / "other"), Machine(machine.directory / "third")):
        more = cache if host.directory.name != "third" else options
        target = f"oci:{host.directory}/lying:v1"
        code, line = host.failure("convert", f"oci:{layout.path}:lying", target, *more)
        assert (code, gzipped(tar).digest in line) == (62, True), line
        assert Blob(OCI_LAYER, tar).digest in line
        assert not (host.directory / "lying/index.json").exists()


def test_layers_that_cannot_be_kept(machine: Machine, layout: Layout) -> None:
    tar = Layer().add("f", b"f").tar()
    layout.image([(tar, Blob(OCI_LAYER, tar))], tag="v1")
    code, line = machine.failure(
        "convert", f"oci:{layout.path}:v1", f"oci:{machine.directory}/out:v1", "--no-copy"
    )
    assert code == 66
    assert line.startswith("nydus-py: layer "), "it says which one"
    assert "only gzip layers can stay as they are" in line


def test_every_kind_of_layer(machine: Machine, layout: Layout) -> None:
    tars = [Layer().add(f"f{number}", noise(100_000, number)).tar() for number in range(5)]
    members = b"".join(gzip.compress(tars[3][at : at + 30_000]) for at in range(0, len(tars[3]), 30_000))
    frames = b"".join(zstandard.compress(tars[4][at : at + 30_000]) for at in range(0, len(tars[4]), 30_000))
    docker = "application/vnd.docker.image.rootfs.diff.tar.gzip"
    blobs = [
        Blob(OCI_LAYER, tars[0]),
        Blob(docker, gzip.compress(tars[1])),
        Blob(OCI_LAYER + "+zstd", zstandard.compress(tars[2])),
        Blob(OCI_LAYER + "+gzip", members),
        Blob(OCI_LAYER + "+zstd", frames),
    ]
    layout.image(list(zip(tars, blobs, strict=True)), tag="v1")
    target = f"oci:{machine.directory}/out:v1"
    machine.nydus("convert", f"oci:{layout.path}:v1", target)
    for number in range(5):
        command = machine.command("cat", target, f"/f{number}")
        content = subprocess.run(command, env=machine.environment, capture_output=True, check=True).stdout
        assert content == noise(100_000, number)


def test_chunks_of_lower_layers_are_not_stored_twice(machine: Machine, layout: Layout) -> None:
    layout.image([Layer().add("f", noise(2 * MIB)), Layer().add("copy", noise(2 * MIB)).add("g", b"g")])
    layout.image([Layer().add("f", noise(2 * MIB)), Layer().add("f", noise(2 * MIB), mode=0o600)], tag="v1")
    target = f"oci:{machine.directory}/out:v1"
    machine.nydus("convert", f"oci:{layout.path}:v1", target)
    blobs = machine.json("inspect", target)["blobs"]
    assert isinstance(blobs, list)
    assert len(blobs) == 1, "of the second layer's blob nothing is used"


def test_config_and_history_follow_the_layers(machine: Machine, layout: Layout) -> None:
    layout.image(
        [Layer().add("f", b"f"), Layer().whiteout("f"), Layer().add("g", b"g")],
        tag="v1",
        config={"Cmd": ["/bin/app"], "Labels": {"a": "b"}, "User": "nobody"},
    )
    out = machine.directory / "out"
    report = machine.json("convert", f"oci:{layout.path}:v1", f"oci:{out}:v1")
    manifest = manifest_of(out, str(report["digest"]))
    config = manifest_of(out, manifest["config"]["digest"])
    assert config["config"] == {"Cmd": ["/bin/app"], "Labels": {"a": "b"}, "User": "nobody"}
    assert len(config["rootfs"]["diff_ids"]) == len(manifest["layers"])
    filled = [entry["created_by"] for entry in config["history"] if not entry.get("empty_layer")]
    assert filled == ["layer 2", "nydus-py convert"]
    assert len(config["history"]) == 4


def test_both_variants_under_one_name(
    tmp_path: Path, machine: Machine, layout: Layout, anonymous_registry: RegistryServer
) -> None:
    """Everybody who knows nothing of Nydus gets the image as it was."""
    if shutil.which("skopeo") is None:
        pytest.skip("not installed: skopeo")
    original = layout.image([Layer().add("f", b"f" * 5000)], tag="v1")
    name = f"{anonymous_registry.host}/convert/both:v1"
    push = ["skopeo", "copy", "-q", "--insecure-policy"]
    subprocess.run(
        [*push, "--dest-tls-verify=false", f"oci:{layout.path}:v1", f"docker://{name}"], check=True
    )
    machine.nydus("convert", name, name, "--both")
    again = machine.json("convert", name, name, "--both")
    raw = subprocess.run(
        ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{name}"],
        check=True,
        capture_output=True,
    ).stdout
    entries = json.loads(raw)["manifests"]
    assert [entry.get("artifactType") for entry in entries] == [
        None,
        "application/vnd.nydus.image.manifest.v1+json",
    ]
    assert entries[0]["digest"] == original.digest
    assert again["bytes_uploaded"] == 0
    pull = [*push, "--src-tls-verify=false", f"docker://{name}", f"oci:{tmp_path}/pulled:v1"]
    subprocess.run(pull, check=True)
    assert (tmp_path / "pulled/blobs/sha256" / original.digest.removeprefix("sha256:")).exists()
    machine.nydus("check", "--deep", name)


def test_all_platforms_or_one(machine: Machine, layout: Layout) -> None:
    images = {
        name: layout.image([Layer().add("arch", name.encode())], architecture=name)
        for name in ("amd64", "arm64")
    }
    entries = [
        image.descriptor(platform={"os": "linux", "architecture": name}) for name, image in images.items()
    ]
    signature = images["amd64"].descriptor(platform={"os": "unknown", "architecture": "unknown"})
    index = {"schemaVersion": 2, "manifests": [*entries, signature], "annotations": {"who": "kept"}}
    layout.tag(layout.put_json("application/vnd.oci.image.index.v1+json", index), "v1")
    source, out = f"oci:{layout.path}:v1", machine.directory / "out"
    report = machine.json("convert", source, f"oci:{out}:all", "--all-platforms")
    assert report["platforms"] == ["linux/amd64", "linux/arm64"]
    made = manifest_of(out, str(report["digest"]))["manifests"]
    assert [entry["platform"]["architecture"] for entry in made] == ["amd64", "arm64"]
    one = machine.json("convert", source, f"oci:{out}:arm", "--platform=linux/arm64")
    assert one["digest"] == made[1]["digest"]
    both = machine.json("convert", source, f"oci:{out}:both", "--all-platforms", "--both")
    made_both = manifest_of(out, str(both["digest"]))
    assert len(made_both["manifests"]) == 4
    assert made_both["annotations"] == {"who": "kept"}
    code, line = machine.failure("convert", source, f"oci:{out}:x", "--platform=linux/riscv64")
    assert (code, "linux/riscv64" in line) == (112, True)


def test_a_killed_conversion_goes_on_and_publishes_nothing_before(machine: Machine, layout: Layout) -> None:
    layers = [Layer().add("small", noise(MIB)), Layer().add("large", noise(160 * MIB, 1))]
    layout.image(layers, tag="v1")
    out = machine.directory / "out"
    command = machine.command("convert", f"oci:{layout.path}:v1", f"oci:{out}:v1", "--compressor", "zstd")
    process = subprocess.Popen(command, env=machine.environment, start_new_session=True)
    deadline = time.monotonic() + 60
    blobs = out / "blobs/sha256"
    while not (blobs.exists() and list(blobs.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "index.json").exists()
    report = machine.json("convert", f"oci:{layout.path}:v1", f"oci:{out}:v1", "--compressor", "zstd")
    assert report["layers_converted"] == 1, "the first one was finished"
    machine.nydus("check", "--deep", f"oci:{out}:v1")
    other = Machine(machine.directory / "other")
    fresh = other.json(
        "convert", f"oci:{layout.path}:v1", f"oci:{machine.directory}/x:v1", "--compressor", "zstd"
    )
    assert fresh["digest"] == report["digest"]


def _lie_about_digest(layout: Layout) -> None:
    blob = gzipped(Layer().add("f", b"honest").tar())
    layout.image([(b"", blob)], tag="v1")
    path = layout.path / "blobs/sha256" / blob.digest.removeprefix("sha256:")
    path.write_bytes(gzipped(Layer().add("f", b"liar").tar()).data.ljust(len(blob.data), b"\0"))


def _layer_manifest(layout: Layout, **more: Any) -> None:
    blob = layout.put(gzipped(Layer().add("f", b"f").tar()))
    rootfs = {"type": "layers", "diff_ids": ["sha256:" + 64 * "0"]}
    config = layout.put_json(
        "application/vnd.oci.image.config.v1+json",
        {"architecture": "amd64", "os": "linux", "rootfs": rootfs},
    )
    manifest = {
        "schemaVersion": 2,
        "config": config.descriptor(),
        "layers": [blob.descriptor(**more)] * int(more.pop("count", 1)),
    }
    layout.tag(layout.put_json("application/vnd.oci.image.manifest.v1+json", manifest), "v1")


def _lie_about_size(layout: Layout) -> None:
    _layer_manifest(layout, size=10)


def _foreign(layout: Layout) -> None:
    kind = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    _layer_manifest(layout, mediaType=kind, urls=["https://example.com/layer"])


def _unknown(layout: Layout) -> None:
    _layer_manifest(layout, mediaType="application/vnd.example.squashfs")


def _very_many(layout: Layout) -> None:
    _layer_manifest(layout, count=10_000)


def _one_more_layer(layout: Layout) -> None:
    _layer_manifest(layout, count=2)


def _lie_about_content(layout: Layout) -> None:
    layout.image(
        [Layer().add("g", b"g"), (b"something else", gzipped(Layer().add("f", b"f").tar()))], tag="v1"
    )


def _zeros_behind_the_end(layout: Layout) -> None:
    tar = Layer().add("f", b"f").tar() + bytes(65 * MIB)
    layout.image([(tar, Blob(OCI_LAYER + "+zstd", zstandard.compress(tar)))], tag="v1")


def _no_tar(layout: Layout) -> None:
    layout.image([(b"", Blob(OCI_LAYER, b"this is no tar" * 1000))], tag="v1")


def _cut_short(layout: Layout) -> None:
    whole = gzipped(Layer().add("f", noise(100_000)).tar())
    layout.image([(b"", Blob(whole.media_type, whole.data[:50_000]))], tag="v1")


def _climbs_out(layout: Layout) -> None:
    layout.image([Layer().add("../../f", b"x")], tag="v1")


def _bomb(layout: Layout) -> None:
    """Far more than any honest layer becomes, out of 2 MB."""
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    member = tarfile.TarInfo("zeros")
    member.size = 1 << 40
    head = member.tobuf(tarfile.GNU_FORMAT)
    parts = [compressor.compress(head)]
    parts += [compressor.compress(bytes(64 * MIB)) for _ in range(256)]
    layout.image([(b"", Blob(OCI_LAYER + "+zstd", b"".join([*parts, compressor.flush()])))], tag="v1")


@pytest.mark.parametrize(
    ("lie", "code", "why"),
    [
        (_lie_about_digest, 40, "the content is sha256:"),
        (_lie_about_size, 40, "the content is sha256:"),
        (_foreign, 124, "is a foreign one"),
        (_unknown, 124, "is of type 'application/vnd.example.squashfs', which is no tar layer"),
        (_very_many, 47, "10001 entries, more than 1024"),
        (_one_more_layer, 47, "2 layers, and 1 diff IDs in the config"),
        (_lie_about_content, 62, "and the config of the image says sha256:"),
        (_no_tar, 55, "not a readable tar archive"),
        (_cut_short, 55, "layer "),
        (_zeros_behind_the_end, 55, "bytes behind its end mark"),
        (_climbs_out, 55, "leads out of the tree"),
        (_bomb, 61, "a decompression bomb"),
    ],
)
def test_bad_images_are_refused_and_nothing_is_published(
    machine: Machine, layout: Layout, lie: Any, code: int, why: str
) -> None:
    lie(layout)
    out = machine.directory / "out"
    got, line = machine.failure("convert", f"oci:{layout.path}:v1", f"oci:{out}:v1")
    assert (got, why in line) == (code, True), line
    assert not (out / "index.json").exists()


def test_a_nydus_image_is_not_converted_again(machine: Machine, layout: Layout) -> None:
    layout.image([Layer().add("f", b"f")], tag="v1")
    out = f"oci:{machine.directory}/out"
    machine.nydus("convert", f"oci:{layout.path}:v1", f"{out}:v1")
    code, line = machine.failure("convert", f"{out}:v1", f"{out}:v2")
    assert (code, "already a Nydus image" in line) == (124, True)


@pytest.mark.needs_root
@pytest.mark.parametrize("options", [(), ("--no-copy",)])
@pytest.mark.slow
def test_a_full_disk_is_said_and_leaves_no_image(
    machine: Machine, layout: Layout, options: tuple[str, ...]
) -> None:
    """Of the work directory: with more room the same command succeeds."""
    layer = Layer()
    for number in range(12_000):
        layer.add(f"d/{number:0100}", b"%d" % number)
    layout.image([Layer().add("f", noise(12 * MIB)), layer], tag="v1")
    cache, out = machine.directory / "cache", machine.directory / "out"
    cache.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(cache)], check=True)
    try:
        code, line = machine.failure("convert", f"oci:{layout.path}:v1", f"oci:{out}:v1", *options)
        assert (code, "No space left on device" in line) == (45, True), line
        assert not (out / "index.json").exists()
        subprocess.run(["mount", "-o", "remount,size=200m", str(cache)], check=True)
        machine.nydus("convert", f"oci:{layout.path}:v1", f"oci:{out}:v1", *options)
        machine.nydus("check", "--deep", f"oci:{out}:v1")
    finally:
        subprocess.run(["umount", "-l", str(cache)], check=True)


def test_a_registry_that_goes_away_is_said(machine: Machine, layout: Layout) -> None:
    """Nobody listens there: an error within the budget of retries, and no tag."""
    layout.image([Layer().add("f", noise(MIB))], tag="v1")
    code, line = machine.failure("convert", f"oci:{layout.path}:v1", "127.0.0.1:9/app:v1")
    assert (code, "cannot connect" in line) == (33, True), line
