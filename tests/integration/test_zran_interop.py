"""Gzip layers that stay as they are, in the form that `nydusify convert --oci-ref` gives them."""

import gzip
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rafs.blob_table import BlobEntry
from rafs.bootstrap import Bootstrap
from tests.integration.cli_machine import Machine
from tests.integration.registry_server import RegistryServer
from tests.integration.test_mount_pyfuse3 import noise
from tests.oci_images import OCI_LAYER, OCI_MANIFEST, Blob, Layer, Layout, gzipped

MIB = 1 << 20
REF = "containerd.io/snapshot/nydus-ref"
MARKS = {"containerd.io/snapshot/nydus-blob": "true"}
NYDUS_BLOB = "application/vnd.oci.image.layer.nydus.blob.v1"

Rename = Callable[[str], str | None]
"""The name of a member of a bootstrap layer as another tool gives it; None leaves it out."""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


@pytest.fixture
def layers() -> list[Blob]:
    tars = [Layer().add("f", noise(2 * MIB)).tar(), Layer().add("g", b"g" * 100_000).add("empty").tar()]
    return [gzipped(tar) for tar in tars]


@pytest.fixture
def layout(tmp_path: Path, machine: Machine, layers: list[Blob]) -> Layout:
    """A layout with an image, `v1`, and what `--no-copy` makes of it, `ref`."""
    layout = Layout(tmp_path / "layout")
    layout.image([(gzip.decompress(blob.data), blob) for blob in layers], tag="v1")
    machine.nydus("convert", f"oci:{layout.path}:v1", f"oci:{layout.path}:ref", "--no-copy")
    return layout


def document(layout: Layout, digest: str) -> Any:
    return json.loads(layout.read(digest))


def manifest_of(layout: Layout, tag: str) -> Any:
    index = json.loads((layout.path / "index.json").read_bytes())
    (entry,) = [
        entry
        for entry in index["manifests"]
        if entry["annotations"]["org.opencontainers.image.ref.name"] == tag
    ]
    return document(layout, entry["digest"])


def blob_table(layout: Layout, manifest: Any) -> tuple[BlobEntry, ...]:
    with tarfile.open(fileobj=io.BytesIO(layout.read(manifest["layers"][-1]["digest"]))) as archive:
        file = archive.extractfile("image/image.boot")
        assert file is not None
        return Bootstrap(file.read()).blobs


def as_nydusify_has_it(layout: Layout, rename: Rename) -> str:
    """The image `ref` with only chunk tables and the bootstrap in its manifest; the reference of it."""
    manifest = manifest_of(layout, "ref")
    tables = [layer for layer in manifest["layers"] if REF in layer.get("annotations", {})]
    made = io.BytesIO()
    bootstrap = manifest["layers"][-1]
    with (
        tarfile.open(fileobj=io.BytesIO(layout.read(bootstrap["digest"]))) as source,
        tarfile.open(fileobj=made, mode="w") as target,
    ):
        for member in source:
            name = rename(member.name)
            if name is not None:
                member.name, file = name, source.extractfile(member)
                target.addfile(member, file)
    packed = layout.put(gzipped(made.getvalue()))
    config = document(layout, manifest["config"]["digest"])
    plain = Blob(OCI_LAYER, made.getvalue())
    config["rootfs"]["diff_ids"] = [*(table["digest"] for table in tables), plain.digest]
    put = layout.put_json(manifest["config"]["mediaType"], config)
    manifest["config"] = put.descriptor()
    manifest["layers"] = [*tables, packed.descriptor(annotations=bootstrap["annotations"])]
    layout.tag(layout.put_json(OCI_MANIFEST, manifest), "foreign")
    return f"oci:{layout.path}:foreign"


def expect_content(machine: Machine, reference: str, tmp_path: Path) -> None:
    report = machine.json("check", "--deep", reference)
    assert (report["faults"], report["blobs_unread"]) == ([], 0)
    out = tmp_path / "out"
    machine.nydus("unpack", reference, out)
    assert (out / "f").read_bytes() == noise(2 * MIB)
    assert (out / "g").read_bytes() == b"g" * 100_000
    shutil.rmtree(out)


def test_the_manifest_names_layers_and_their_tables(
    machine: Machine, layout: Layout, layers: list[Blob], tmp_path: Path
) -> None:
    """A table is a small blob of its own with the layer's digest at it, and the bootstrap names both."""
    manifest = manifest_of(layout, "ref")
    *blobs, bootstrap = manifest["layers"]
    assert bootstrap["annotations"]["containerd.io/snapshot/nydus-bootstrap"] == "true"
    data, tables = blobs[:2], blobs[2:]
    assert {blob["mediaType"] for blob in blobs} == {NYDUS_BLOB}
    assert [(blob["digest"], blob["annotations"]) for blob in data] == [
        (layer.digest, MARKS) for layer in layers
    ]
    assert [table["annotations"] for table in tables] == [MARKS | {REF: layer.digest} for layer in layers]
    diff_ids = document(layout, manifest["config"]["digest"])["rootfs"]["diff_ids"]
    assert diff_ids[:-1] == [blob["digest"] for blob in blobs]
    entries = blob_table(layout, manifest)
    for entry, table in zip(entries, tables, strict=True):
        assert table["digest"] == f"sha256:{entry.meta_digest.hex()}"
        assert (table["size"], len(layout.read(table["digest"]))) == (entry.meta_size, entry.meta_size)
    expect_content(machine, f"oci:{layout.path}:ref", tmp_path)
    inspected = machine.json("inspect", f"oci:{layout.path}:ref")["blobs"]
    assert isinstance(inspected, list)
    assert [blob["source_layer"] for blob in inspected] == [layer.digest for layer in layers]


@pytest.mark.parametrize("names", ["table in the registry only", "table named by its blob"])
@pytest.mark.slow
def test_images_of_nydusify_are_read_and_copied(
    machine: Machine, layout: Layout, layers: list[Blob], tmp_path: Path, names: str
) -> None:
    """Their manifests do not name the layers, and name a chunk table in the bootstrap layer otherwise."""
    entries = blob_table(layout, manifest_of(layout, "ref"))
    by_table = {entry.blob_id: entry.meta_digest.hex() for entry in entries}

    def rename(name: str) -> str | None:
        blob_id = name.removeprefix("image/").removesuffix(".blob.meta")
        if blob_id not in by_table:
            return name
        return f"image/{by_table[blob_id]}.blob.meta" if names == "table named by its blob" else None

    foreign = as_nydusify_has_it(layout, rename)
    expect_content(machine, foreign, tmp_path)
    for target in (f"oci:{tmp_path}/copy:v1", f"dir:{tmp_path}/bare"):
        assert machine.json("copy", foreign, target)["blobs_uploaded"] == 2
        expect_content(Machine(tmp_path / "another"), target, tmp_path)
    machine.nydus("merge", f"oci:{tmp_path}/merged:v1", foreign)
    expect_content(machine, f"oci:{tmp_path}/merged:v1", tmp_path)


def test_images_without_tables_in_the_registry_are_read(
    machine: Machine, layout: Layout, tmp_path: Path
) -> None:
    """As `--no-copy` made them first: the tables are in the bootstrap layer only."""
    manifest = manifest_of(layout, "ref")
    config = document(layout, manifest["config"]["digest"])
    del manifest["layers"][2:4], config["rootfs"]["diff_ids"][2:4]
    manifest["config"] = layout.put_json(manifest["config"]["mediaType"], config).descriptor()
    layout.tag(layout.put_json(OCI_MANIFEST, manifest), "older")
    expect_content(machine, f"oci:{layout.path}:older", tmp_path)


def test_a_table_that_is_not_what_it_was_is_a_fault(machine: Machine, layout: Layout) -> None:
    table = manifest_of(layout, "ref")["layers"][2]["digest"]
    path = layout.path / "blobs/sha256" / table.removeprefix("sha256:")
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    done = machine.run("check", f"oci:{layout.path}:ref")
    assert done.returncode != 0
    assert "chunk table at the end of blob" in done.stdout
    path.unlink()
    done = machine.run("check", f"oci:{layout.path}:ref")
    assert done.returncode != 0
    assert "chunk table at the end of blob" in done.stdout


@pytest.mark.needs_registry
@pytest.mark.slow
def test_tables_travel_with_their_layers(
    machine: Machine, layout: Layout, tmp_path: Path, anonymous_registry: RegistryServer
) -> None:
    """From a registry to a bare directory and back, and by skopeo, to which all of them are layers."""
    if shutil.which("skopeo") is None:
        pytest.skip("not installed: skopeo")
    name = f"{anonymous_registry.host}/zran-interop/image"
    push = ["skopeo", "copy", "-q", "--insecure-policy", "--preserve-digests", "--dest-tls-verify=false"]
    subprocess.run([*push, f"oci:{layout.path}:ref", f"docker://{name}:ref"], check=True)
    expect_content(Machine(tmp_path / "second"), f"{name}:ref", tmp_path)
    bare = f"dir:{tmp_path}/bare"
    machine.nydus("copy", f"{name}:ref", bare)
    expect_content(machine, bare, tmp_path)
    machine.nydus("copy", bare, f"{name}:again")
    shutil.rmtree(tmp_path / "bare")
    expect_content(Machine(tmp_path / "third"), f"{name}:again", tmp_path)
    machine.nydus("compact", f"{name}:ref", f"{name}:compact")
    expect_content(Machine(tmp_path / "fourth"), f"{name}:compact", tmp_path)
