"""`nydus-py convert --reverse`: the ordinary image again, which runs anywhere."""

import gzip
import hashlib
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from rafs.bootstrap import Bootstrap
from tests.builder_support import put
from tests.integration.cli_machine import Machine
from tests.integration.registry_server import RegistryServer
from tests.integration.test_layers_against_umoci import busy_layers
from tests.integration.test_mount_pyfuse3 import noise
from tests.oci_images import OCI_CONFIG, OCI_INDEX, Layer, Layout
from tests.tree_compare import describe_tree

BUSYBOX = Path("/bin/busybox")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


def need(*tools: str) -> None:
    """Skips where a program is not installed."""
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"not installed: {tool}")


def there_and_back(machine: Machine, layout: Layout) -> Path:
    """The layout of the image `v1`, converted and converted back."""
    nydus, back = machine.directory / "nydus", machine.directory / "back"
    machine.nydus("convert", f"oci:{layout.path}:v1", f"oci:{nydus}:v1")
    machine.nydus("convert", "--reverse", f"oci:{nydus}:v1", f"oci:{back}:v1")
    return back


def unpacked(layout: Path, bundle: Path) -> Path:
    """The tree of an image, by umoci."""
    subprocess.run(["umoci", "unpack", "--image", f"{layout}:v1", str(bundle)], check=True)
    return bundle / "rootfs"


@pytest.mark.needs_root
def test_the_merged_tree_is_identical(tmp_path: Path, machine: Machine) -> None:
    need("umoci")
    layout = Layout(tmp_path / "source")
    layout.image(busy_layers(), tag="v1")
    back = there_and_back(machine, layout)
    wanted = describe_tree(unpacked(layout.path, tmp_path / "before"))
    found = describe_tree(unpacked(back, tmp_path / "after"))
    for tree in (wanted, found):
        del tree["/"]
        for facts in tree.values():
            if facts["mode"].startswith("0o4"):  # of those that no layer describes it is umoci's own
                del facts["mtime"]
    assert found == wanted


@pytest.mark.slow
def test_the_same_digest_each_time_and_the_config_stays(tmp_path: Path, machine: Machine) -> None:
    layout = Layout(tmp_path / "source")
    config = {"Cmd": ["/app"], "Env": ["A=b"], "User": "1000", "Labels": {"x": "y"}}
    layout.image([Layer().add("f", noise(3_000_000)), Layer().add("g", b"g")], tag="v1", config=config)
    back = there_and_back(machine, layout)
    other = there_and_back(Machine(tmp_path / "other"), layout)
    index = json.loads((back / "index.json").read_bytes())
    assert index == json.loads((other / "index.json").read_bytes())
    manifest = _document(back, index["manifests"][0]["digest"])
    made = _document(back, manifest["config"]["digest"])
    assert made["config"] == config
    filled = [entry for entry in made["history"] if not entry.get("empty_layer")]
    assert len(filled) == len(manifest["layers"]) == len(made["rootfs"]["diff_ids"]) == 1


def _document(layout: Path, digest: str) -> dict[str, Any]:
    found = json.loads((layout / "blobs/sha256" / digest.removeprefix("sha256:")).read_bytes())
    assert isinstance(found, dict)
    return found


def test_a_damaged_blob_publishes_nothing(tmp_path: Path, machine: Machine) -> None:
    layout = Layout(tmp_path / "source")
    layout.image([Layer().add("f", noise(3_000_000))], tag="v1")
    nydus, back = machine.directory / "nydus", machine.directory / "back"
    machine.nydus("convert", f"oci:{layout.path}:v1", f"oci:{nydus}:v1")
    largest = max((nydus / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[100_000] ^= 1
    largest.chmod(0o644)
    largest.write_bytes(data)
    code, line = machine.failure("convert", "--reverse", f"oci:{nydus}:v1", f"oci:{back}:v1")
    assert code != 0
    assert "chunk" in line
    assert not (back / "index.json").exists()


def unzstd(data: bytes) -> bytes:
    """A zstd stream that does not say how long it is."""
    with zstandard.ZstdDecompressor().stream_reader(data) as reader:
        return reader.read()


UNPACK: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.decompress, "zstd": unzstd, "none": bytes}


@pytest.mark.parametrize(
    ("compression", "suffix"),
    [("gzip", "+gzip"), ("zstd", "+zstd"), ("none", "")],
    ids=("gzip", "zstd", "none"),
)
@pytest.mark.slow
def test_the_layer_is_packed_as_asked(
    tmp_path: Path, machine: Machine, anonymous_registry: RegistryServer, compression: str, suffix: str
) -> None:
    need("skopeo")
    put(tmp_path / "tree", b"large", noise(20_000_000))  # more than is sent in one piece
    put(tmp_path / "tree", b"small", b"zeros" * 3_000_000)
    machine.nydus("build", tmp_path / "tree", f"dir:{tmp_path / 'bare'}")
    reference = f"{anonymous_registry.host}/reverse/{compression}:v1"
    options = ("--reverse", "--layer-compression", compression, f"dir:{tmp_path / 'bare'}")
    report = machine.json("convert", *options, reference)
    again = Machine(tmp_path / "other").json("convert", *options, f"oci:{tmp_path / 'again'}:v1")
    assert again["digest"] == report["digest"]
    layout = tmp_path / "pulled"
    copy = ("skopeo", "copy", "-q", "--preserve-digests", "--src-tls-verify=false")
    subprocess.run([*copy, f"docker://{reference}", f"oci:{layout}:v1"], check=True)
    (entry,) = json.loads((layout / "index.json").read_bytes())["manifests"]
    manifest = _document(layout, entry["digest"])
    (layer,) = manifest["layers"]
    assert layer["mediaType"] == f"application/vnd.oci.image.layer.v1.tar{suffix}"
    config = _document(layout, manifest["config"]["digest"])
    assert (config["os"], config["config"]) == ("linux", {})
    tar = UNPACK[compression](
        (layout / "blobs/sha256" / layer["digest"].removeprefix("sha256:")).read_bytes()
    )
    assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(tar).hexdigest()}"]
    assert len(tar) == report["bytes_in"]
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        member = archive.extractfile("small")
        assert member is not None
        assert member.read() == b"zeros" * 3_000_000
    assert not list((machine.directory / "cache" / "build").iterdir())  # nothing is left of the work


def test_one_platform_of_an_index_with_both_variants(tmp_path: Path, machine: Machine) -> None:
    layout = Layout(tmp_path / "source")
    images = [layout.image([Layer().add(name, b"1")], architecture=name) for name in ("amd64", "arm64")]
    entries = [
        image.descriptor(platform={"os": "linux", "architecture": name})
        for image, name in zip(images, ("amd64", "arm64"), strict=True)
    ]
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    layout.tag(layout.put_json(OCI_INDEX, index), "v1")
    both, back = f"oci:{tmp_path / 'both'}:v1", tmp_path / "back"
    machine.nydus("convert", "--both", "--all-platforms", f"oci:{layout.path}:v1", both)
    machine.nydus("convert", "--reverse", "--platform", "linux/arm64", both, f"oci:{back}:v1")
    (entry,) = json.loads((back / "index.json").read_bytes())["manifests"]
    manifest = _document(back, entry["digest"])
    config = _document(back, manifest["config"]["digest"])
    assert config["architecture"] == "arm64"
    assert manifest["config"]["mediaType"] == OCI_CONFIG
    layer = (back / "blobs/sha256" / manifest["layers"][0]["digest"].removeprefix("sha256:")).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
        assert archive.getnames() == [".", "arm64"]
    code, _ = machine.failure("convert", "--reverse", "--platform", "linux/s390x", both, f"oci:{back}:v2")
    assert code == 112


def test_what_a_layer_cannot_hold(tmp_path: Path, machine: Machine) -> None:
    put(tmp_path / "tree", b"a/.wh.b", b"an ordinary file, here")
    machine.nydus("build", tmp_path / "tree", f"dir:{tmp_path / 'bare'}")
    target = tmp_path / "back"
    code, line = machine.failure("convert", "--reverse", f"dir:{tmp_path / 'bare'}", f"oci:{target}:v1")
    assert (code, "/a/.wh.b" in line) == (56, True)
    assert not (target / "index.json").exists()
    (tmp_path / "tree/a/.wh.b").unlink()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "tree/s"))
        machine.nydus("build", tmp_path / "tree", f"dir:{tmp_path / 'bare'}")
    done = machine.run("convert", "--reverse", "--json", f"dir:{tmp_path / 'bare'}", f"oci:{target}:v1")
    assert json.loads(done.stdout)["sockets_left_out"] == 1


def test_a_hostile_bootstrap_publishes_nothing(tmp_path: Path, machine: Machine) -> None:
    put(tmp_path / "tree", b"a/b/file", noise(50_000))
    machine.nydus("build", tmp_path / "tree", f"dir:{tmp_path / 'bare'}", "--chunk-size", "4KiB")
    boot = tmp_path / "bare" / "image.boot"
    whole = boot.read_bytes()
    for number, damaged in enumerate(hostile_bootstraps(whole)):
        boot.write_bytes(damaged)
        target = tmp_path / f"back-{number}"
        code, line = machine.failure("convert", "--reverse", f"dir:{tmp_path / 'bare'}", f"oci:{target}:v1")
        assert code not in (0, 1), line
        assert not (target / "index.json").exists()
        merged = tmp_path / f"merged-{number}"
        code, line = machine.failure("merge", f"oci:{merged}:v1", f"dir:{tmp_path / 'bare'}")
        assert code not in (0, 1), line
        assert not (merged / "index.json").exists()


def hostile_bootstraps(whole: bytes) -> list[bytes]:
    """A directory that holds itself, and a file of absurd size."""
    image = Bootstrap(whole)
    entries = dict(image.walk())
    loop = bytearray(whole)
    outer, inner = entries[b"/a"], entries[b"/a/b"]
    name = next(entry for entry in image.readdir(outer) if entry.name == b"b")
    assert name.nid == inner.nid
    at = whole.index(struct.pack("<Q", inner.nid), next(image.data_blocks(outer))[1])
    struct.pack_into("<Q", loop, at, outer.nid)
    huge = bytearray(whole)
    struct.pack_into("<Q", huge, entries[b"/a/b/file"].offset_bytes + 8, 1 << 50)
    return [bytes(loop), bytes(huge)]


def test_options_that_make_no_sense_together(tmp_path: Path, machine: Machine) -> None:
    code, line = machine.failure("convert", "--reverse", "--both", "oci:a:v1", "oci:b:v1")
    assert (code, line.startswith("nydus-py: --reverse")) == (2, True)


@pytest.mark.needs_root
def test_runc_runs_it(tmp_path: Path, machine: Machine) -> None:
    need("umoci", "runc")
    if not BUSYBOX.exists():
        pytest.skip("not installed: a static busybox")
    layout = Layout(tmp_path / "source")
    lower = Layer().directory("bin").add("bin/busybox", BUSYBOX.read_bytes(), mode=0o755)
    for folder in ("proc", "dev", "sys", "tmp"):
        lower.directory(folder)
    upper = Layer().symlink("bin/sh", "busybox").add("greeting", b"hello from the other side\n")
    config = {"Cmd": ["/bin/busybox", "cat", "/greeting"], "Env": ["PATH=/bin"]}
    layout.image([lower, upper], tag="v1", config=config)
    bundle = tmp_path / "bundle"
    unpacked(there_and_back(machine, layout), bundle)
    spec = json.loads((bundle / "config.json").read_bytes())
    assert spec["process"]["args"] == config["Cmd"]
    spec["process"]["terminal"] = False
    kept = ("pid", "ipc", "uts", "mount")  # the network and the groups of the machine are not needed
    spec["linux"]["namespaces"] = [space for space in spec["linux"]["namespaces"] if space["type"] in kept]
    spec["linux"].pop("resources", None)
    spec["mounts"] = [mount for mount in spec["mounts"] if mount["type"] in ("proc", "tmpfs")]
    (bundle / "config.json").write_text(json.dumps(spec))
    name = f"nydus-py-{os.getpid()}"
    done = subprocess.run(
        ["runc", "--root", tmp_path / "runc", "run", "--no-pivot", "--bundle", bundle, name],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if done.returncode and "cgroup" in done.stderr:
        pytest.skip(f"runc cannot make groups here: {done.stderr.strip()[-200:]}")
    assert (done.returncode, done.stdout) == (0, "hello from the other side\n"), done.stderr
