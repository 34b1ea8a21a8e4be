"""`nydus-py compact`: the same tree out of fewer bytes."""

import os
from pathlib import Path

import pytest

from tests.integration.cli_machine import Machine
from tests.integration.test_mount_pyfuse3 import noise
from tests.oci_images import Layer, Layout
from tests.tree_compare import describe_tree

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


def converted(machine: Machine, layers: list[Layer], *options: str) -> str:
    """An image of layers, in a layout."""
    layout = Layout(machine.directory / "source")
    layout.image(layers, tag="v1", config={"Cmd": ["/app"], "Env": ["A=b"]})
    target = f"oci:{machine.directory}/nydus:v1"
    machine.nydus("convert", f"oci:{layout.path}:v1", target, *options)
    return target


def tree_of(machine: Machine, reference: str, name: str) -> dict[str, dict[str, object]]:
    """The tree of an image, unpacked and described."""
    machine.nydus("unpack", reference, machine.directory / name)
    return describe_tree(machine.directory / name)


def test_chunks_that_no_file_uses_go_and_the_tree_stays(machine: Machine) -> None:
    """Of the first layer's blob most is hidden; the second is used whole and stays as it is."""
    waste = Layer()
    for number in range(20):
        waste.add(f"d/f{number}", noise(MIB // 2, number), mtime=1_700_000_000.25)
    waste.add("big", noise(3 * MIB, 99))
    whole = Layer().add("whole", noise(12 * MIB, 100)).hardlink("link", "whole").symlink("s", "whole")
    for number in range(1, 20):
        whole.whiteout(f"d/f{number}")
    source = converted(machine, [waste, whole], "--prefetch", "/whole")
    target = f"oci:{machine.directory}/compact:v1"
    report = machine.json("compact", source, target)
    assert (report["blobs_before"], report["blobs_after"]) == (2, 2)
    assert isinstance(report["bytes_before"], int)
    assert isinstance(report["bytes_after"], int)
    assert report["bytes_after"] < report["bytes_before"] - 8 * MIB
    machine.nydus("check", "--deep", target)
    assert tree_of(machine, target, "after") == tree_of(machine, source, "before")
    old, new = machine.json("inspect", source), machine.json("inspect", target)
    assert new["prefetch_files"] == old["prefetch_files"] == 1
    ids = [{blob["id"] for blob in image["blobs"]} for image in (old, new)]  # type: ignore[attr-defined]
    assert len(ids[0] & ids[1]) == 1, "the blob of the second layer"
    again = machine.json("compact", source, f"oci:{machine.directory}/again:v1", "--threads=1")
    assert again["digest"] == report["digest"]
    assert machine.json("diff", source, target)["summary"]["added"] == 0  # type: ignore[index]


@pytest.mark.slow
def test_small_blobs_are_put_together(machine: Machine) -> None:
    layers = [Layer().add(f"f{number}", os.urandom(10_000)).directory(f"d{number}") for number in range(12)]
    source = converted(machine, layers)
    target = f"dir:{machine.directory}/compact"
    report = machine.json("compact", source, target)
    assert (report["blobs_before"], report["blobs_after"]) == (12, 1)
    machine.nydus("check", "--deep", target)
    assert tree_of(machine, target, "after") == tree_of(machine, source, "before")


@pytest.mark.needs_root
@pytest.mark.slow
def test_what_looks_like_a_mark_is_a_file_of_the_image(tmp_path: Path, machine: Machine) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    os.mknod(tree / "null", 0o020600, os.makedev(0, 0))
    (tree / "dir").mkdir()
    os.setxattr(tree / "dir", "trusted.overlay.opaque", b"y")
    (tree / "f").write_bytes(noise(MIB))
    source, target = f"dir:{machine.directory}/image", f"dir:{machine.directory}/compact"
    machine.nydus("build", tree, source)
    machine.nydus("compact", source, target)
    assert tree_of(machine, target, "after") == tree_of(machine, source, "before")


@pytest.mark.slow
def test_chunks_of_replaced_members_of_a_tar_go(tmp_path: Path, machine: Machine) -> None:
    """A build keeps their rows in its chunk table."""
    tar = tmp_path / "twice.tar"
    tar.write_bytes(Layer().add("f", noise(5 * MIB)).add("f", noise(2 * MIB, 1)).tar())
    machine.nydus("build", tar, f"dir:{machine.directory}/image")
    target = f"dir:{machine.directory}/compact"
    report = machine.json("compact", f"dir:{machine.directory}/image", target)
    assert isinstance(report["bytes_after"], int)
    assert report["bytes_after"] < 2.1 * MIB
    machine.nydus("check", "--deep", target)


def test_a_ratio_that_is_none(machine: Machine) -> None:
    code, line = machine.failure("compact", "dir:a", "dir:b", "--min-used-ratio", "101")
    assert (code, "from 0 to 100" in line) == (2, True)
