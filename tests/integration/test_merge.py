"""`nydus-py merge`: images on top of each other, against what overlayfs makes of the same trees."""

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.builder_support import Tree, make_root_tree, put, read_tree
from tests.integration.cli_machine import Machine
from tests.integration.registry_server import RegistryServer
from tests.oci_images import Layer, Layout

SMALL = ("--chunk-size", "4KiB", "--batch-size", "0")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


def unpacked(machine: Machine, reference: str) -> Tree:
    """The tree of an image. Its blobs are read, each chunk is verified."""
    directory = machine.directory / "unpacked"
    shutil.rmtree(directory, ignore_errors=True)
    machine.nydus("unpack", reference, directory)
    return read_tree(directory)


def image_config(layout: Path) -> dict[str, Any]:
    """The config of the only image in a layout."""
    (entry,) = json.loads((layout / "index.json").read_bytes())["manifests"]
    manifest = _blob(layout, entry["digest"])
    config = _blob(layout, manifest["config"]["digest"])
    assert len(config["rootfs"]["diff_ids"]) == len(config["history"]) == len(manifest["layers"])
    return config


def _blob(layout: Path, digest: str) -> dict[str, Any]:
    found = json.loads((layout / "blobs/sha256" / digest.removeprefix("sha256:")).read_bytes())
    assert isinstance(found, dict)
    return found


@contextmanager
def overlay(where: Path, *directories: Path) -> Iterator[Path]:
    """What the kernel makes of directories, the highest first; a skip where it cannot."""
    where.mkdir()
    lower = ":".join(map(str, directories))
    mounted = subprocess.run(
        ["mount", "-t", "overlay", "overlay", "-o", f"ro,index=off,lowerdir={lower}", where],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no overlayfs here: {mounted.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


@pytest.mark.needs_root
def test_the_tree_is_that_of_overlayfs(machine: Machine, tmp_path: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    make_root_tree(base)
    os.removexattr(base / "a", "trusted.overlay.opaque")
    put(top, b"new/file", b"of the upper one")
    put(top, b"many/chunks", b"replaced; its other names keep what was there")
    put(top, b"a/b/only", b"hides c and other-name")
    os.setxattr(top / "a" / "b", "trusted.overlay.opaque", b"y")
    put(top, b"random/now-a-directory", b"x")
    os.mknod(top / "zeros", stat.S_IFCHR, 0)
    os.mknod(top / "small", stat.S_IFCHR, 0)
    os.chmod(top / "a", 0o711)
    machine.nydus("build", base, f"oci:{tmp_path / 'l'}:v1", *SMALL)
    machine.nydus("build", top, f"dir:{tmp_path / 'bare'}", *SMALL)
    target = f"oci:{tmp_path / 'merged'}:v1"
    report = machine.json("merge", target, f"oci:{tmp_path / 'l'}:v1", f"dir:{tmp_path / 'bare'}")
    assert (report["layers"], report["blobs"], report["blobs_uploaded"]) == (2, 2, 2)
    with overlay(tmp_path / "overlay", top, base) as merged:
        assert unpacked(machine, target) == read_tree(merged)
    machine.nydus("check", "--deep", target)


@pytest.mark.slow
def test_images_of_one_registry_are_merged_without_moving_a_blob(
    machine: Machine, tmp_path: Path, anonymous_registry: RegistryServer
) -> None:
    host = anonymous_registry.host
    layout = Layout(tmp_path / "source")
    config = {"Cmd": ["/serve"], "Env": ["A=b"], "Labels": {"l": "1"}}
    layout.image([Layer().add("app/a", b"a" * 9000), Layer().add("app/b", b"b")], tag="v1", config=config)
    machine.nydus("convert", f"oci:{layout.path}:v1", f"{host}/merge/base:v1")
    put(tmp_path / "model", b"weights", os.urandom(3_000_000))
    put(tmp_path / "model", b"copy-of-a", b"a" * 9000)  # found in the lower image's blob
    machine.nydus("build", tmp_path / "model", f"{host}/merge/model:v1")
    sources = (f"{host}/merge/base:v1", f"{host}/merge/model:v1")
    report = machine.json("merge", f"{host}/merge/all:v1", *sources, "--prefetch", "/weights")
    assert (report["blobs"], report["blobs_mounted"], report["blobs_uploaded"]) == (3, 3, 0)
    again = machine.json("merge", f"{host}/merge/all:v2", *sources, "--prefetch", "/weights")
    assert (again["digest"], again["blobs_skipped"]) == (report["digest"], 3)
    machine.nydus("check", "--deep", f"{host}/merge/all:v1")
    tree = unpacked(machine, f"{host}/merge/all:v1")
    assert {b"/weights", b"/copy-of-a", b"/app/a", b"/app/b"} <= tree.keys()
    machine.nydus("copy", f"{host}/merge/all:v1", f"oci:{tmp_path / 'copy'}:v1")
    # The model says nothing of what is to run: the image below it does.
    assert image_config(tmp_path / "copy")["config"] == config


def test_into_a_directory(machine: Machine, tmp_path: Path) -> None:
    for name in ("one", "two"):
        put(tmp_path / name, name.encode(), name.encode() * 5000)
        machine.nydus("build", tmp_path / name, f"dir:{tmp_path / name}.image")
    layers = [f"dir:{tmp_path / name}.image" for name in ("one", "two")]
    machine.nydus("merge", f"dir:{tmp_path / 'bare'}", *layers)
    tree = unpacked(machine, f"dir:{tmp_path / 'bare'}")
    assert {b"/one", b"/two"} <= tree.keys()
    machine.nydus("merge", f"oci:{tmp_path / 'layout'}:v1", *layers)
    assert unpacked(machine, f"oci:{tmp_path / 'layout'}:v1") == tree
    assert image_config(tmp_path / "layout")["config"] == {}


@pytest.mark.parametrize("other", [("--chunk-size", "64KiB"), ("--digester", "sha256")])
def test_images_that_do_not_fit(machine: Machine, tmp_path: Path, other: tuple[str, str]) -> None:
    put(tmp_path / "one", b"f", b"1" * 5000)
    machine.nydus("build", tmp_path / "one", f"dir:{tmp_path / 'a'}")
    machine.nydus("build", tmp_path / "one", f"dir:{tmp_path / 'b'}", *other)
    target = tmp_path / "target"
    code, line = machine.failure(
        "merge", f"oci:{target}:v1", f"dir:{tmp_path / 'a'}", f"dir:{tmp_path / 'b'}"
    )
    assert (code, "layer 2" in line) == (59, True)
    assert not target.exists()


def test_a_broken_or_missing_layer_leaves_no_target(machine: Machine, tmp_path: Path) -> None:
    put(tmp_path / "one", b"f", os.urandom(5000))
    put(tmp_path / "two", b"g", os.urandom(5000))
    for name in ("one", "two"):
        machine.nydus("build", tmp_path / name, f"dir:{tmp_path / name}.image")
    good, bad = tmp_path / "one.image", tmp_path / "two.image"
    target = tmp_path / "target"
    whole = (bad / "image.boot").read_bytes()
    for damaged in (whole[:4096], whole[:1100] + b"\xff" * 40 + whole[1140:], b"x" * 10):
        (bad / "image.boot").write_bytes(damaged)
        code, line = machine.failure("merge", f"oci:{target}:v1", f"dir:{good}", f"dir:{bad}")
        assert code not in (0, 1), line
        assert not target.exists()
    (bad / "image.boot").write_bytes(whole)
    (blob,) = (bad / "blobs").iterdir()
    data = blob.read_bytes()
    blob.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    code, line = machine.failure("merge", f"oci:{target}:v1", f"dir:{good}", f"dir:{bad}")
    assert code == 40, line
    assert not (target / "index.json").exists()
    code, line = machine.failure("merge", f"oci:{target}:v1", f"dir:{good}", f"dir:{tmp_path / 'none'}")
    assert code == 116, line


def test_a_mark_of_a_link_without_one_at_the_root_is_refused(tmp_path: Path, machine: Machine) -> None:
    tar = tmp_path / "layer.tar"
    tar.write_bytes(Layer().add("f", b"f", xattrs={"trusted.nydus-py.link": b"g"}).tar())
    image = f"dir:{machine.directory}/image"
    machine.nydus("build", tar, image)
    code, line = machine.failure("merge", f"dir:{machine.directory}/merged", image)
    assert (code, "is marked as a link" in line) == (59, True), line
