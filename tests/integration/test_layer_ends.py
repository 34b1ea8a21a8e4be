"""Layers that end early, or do not end where they say: taken and refused as umoci takes and refuses them."""

import subprocess
from pathlib import Path

import pytest

from tests.integration.cli_machine import Machine
from tests.integration.test_mount_pyfuse3 import noise
from tests.oci_images import Layer, Layout

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_umoci]

FIRST = 512 + 10_240
"""Bytes of the first member: its header and content on blocks."""


def layer() -> bytes:
    """Three members: 10,000 bytes, 600 bytes, nothing; the second has an extended header."""
    made = Layer().add("first", noise(10_000))
    return made.add("second", noise(600, 1), xattrs={"user.a": b"b"}).add("third").tar()


TAR = layer()
SECOND = FIRST + 1024 + 512 + 1024
CUTS = {
    "behind no member": 0,
    "behind the first": FIRST,
    "behind the second": SECOND,
    "behind the last": SECOND + 512,
    "behind half of the mark": SECOND + 1024,
}
BROKEN = {
    "in the first header": TAR[:100],
    "in the content of the first": TAR[:5_000],
    "in a later header": TAR[: FIRST + 1024 + 200],
    "in the content of the second": TAR[: SECOND - 1024 + 300],
    "a lone block of zeros": TAR[:FIRST] + bytes(512) + TAR[FIRST:],
}


def umoci_takes(layout: Layout, folder: Path) -> bool:
    command = ["umoci", "unpack", "--image", f"{layout.path}:v1", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("options", [(), ("--no-copy",)])
@pytest.mark.parametrize("end", CUTS)
def test_a_layer_may_end_behind_any_member(tmp_path: Path, end: str, options: tuple[str, ...]) -> None:
    machine, layout = Machine(tmp_path / "machine"), Layout(tmp_path / "layout")
    layout.image([Layer().add("below"), TAR[: CUTS[end]]], tag="v1")
    assert umoci_takes(layout, tmp_path / "bundle")
    machine.nydus("convert", f"oci:{layout.path}:v1", f"oci:{tmp_path}/out:v1", *options)
    machine.nydus("unpack", f"oci:{tmp_path}/out:v1", tmp_path / "tree")
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "bundle/rootfs").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "tree").iterdir()} == wanted


@pytest.mark.parametrize("options", [(), ("--no-copy",)])
@pytest.mark.parametrize("what", BROKEN)
def test_a_layer_may_not_end_anywhere_else(tmp_path: Path, what: str, options: tuple[str, ...]) -> None:
    machine, layout = Machine(tmp_path / "machine"), Layout(tmp_path / "layout")
    layout.image([Layer().add("below"), BROKEN[what]], tag="v1")
    assert not umoci_takes(layout, tmp_path / "bundle")
    code, line = machine.failure("convert", f"oci:{layout.path}:v1", f"oci:{tmp_path}/out:v1", *options)
    assert (code, "layer " in line) == (55, True), line
    assert not (tmp_path / "out/index.json").exists()
