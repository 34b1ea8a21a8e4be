"""Images that buildah builds and pushes: what is mounted of them is what buildah itself shows."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.cli_machine import Machine
from tests.integration.registry_server import RegistryServer
from tests.integration.test_mount_pyfuse3 import noise
from tests.tree_compare import describe_tree

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_registry]

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Buildah:
    """buildah with a storage of its own: no overlay, no user namespace, nothing of the host's images."""

    directory: Path

    def __call__(self, *arguments: str | Path) -> str:
        """Standard output of a command that succeeds, without the end of its line."""
        done = self._run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.rstrip("\n")

    def reason_to_skip(self) -> str | None:
        """Why it cannot make containers here; None where it can."""
        if shutil.which("buildah") is None:
            return "not installed: buildah"
        done = self._run("from", "scratch")
        return None if done.returncode == 0 else f"buildah does not run here: {done.stderr.strip()[-200:]}"

    def _run(self, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        storage = ["--root", self.directory / "root", "--runroot", self.directory / "run"]
        command = ["buildah", *map(str, storage), "--storage-driver", "vfs", *map(str, arguments)]
        home = os.environ | {"HOME": str(self.directory), "BUILDAH_ISOLATION": "chroot"}
        return subprocess.run(command, env=home, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def buildah(tmp_path: Path) -> Iterator[Buildah]:
    buildah = Buildah(tmp_path / "buildah")
    buildah.directory.mkdir()
    if reason := buildah.reason_to_skip():
        pytest.skip(reason)
    yield buildah
    buildah("umount", "--all")
    buildah("rm", "--all")


def fill(tree: Path) -> None:
    """What the first layer has."""
    for folder in ("bin", "etc/old", "usr/lib", "var/empty"):
        (tree / folder).mkdir(parents=True)
    (tree / "bin/tool").write_bytes(noise(3 * MIB))
    (tree / "bin/tool").chmod(0o4755)
    os.link(tree / "bin/tool", tree / "usr/lib/tool-again")
    (tree / "lib").symlink_to("usr/lib")
    for number in range(300):
        (tree / "etc" / f"conf-{number}").write_text(f"value {number}\n" * number)
    (tree / "etc/old/gone").write_text("with its directory")
    (tree / "var/name with ü and \\").write_text("odd")
    os.mkfifo(tree / "var/pipe")
    os.mknod(tree / "var/null", 0o20666, os.makedev(1, 3))
    os.chown(tree / "var/empty", 1000, 70_000)
    os.setxattr(tree / "bin/tool", "user.note", b"kept\0whole")
    os.setxattr(tree / "bin/tool", "security.capability", bytes.fromhex("0100000200040000" + "00" * 12))


def change(tree: Path) -> None:
    """What the second layer does to it: every kind of whiteout, and a change of a mode alone."""
    shutil.rmtree(tree / "etc/old")
    (tree / "etc/old").mkdir()
    (tree / "etc/old/new").write_text("in a directory of the same name")
    (tree / "etc/conf-7").unlink()
    (tree / "usr/lib/tool-again").unlink()
    shutil.rmtree(tree / "var/empty")
    (tree / "var/empty").write_text("a file now")
    (tree / "etc/conf-8").chmod(0o600)


def described(tree: Path) -> dict[str, dict[str, Any]]:
    """All that a layer keeps: storage sets the times of directories itself, and gives the root none."""
    found = describe_tree(tree)
    del found["/"]
    for facts in found.values():
        if facts["mode"].startswith("0o4"):
            del facts["mtime"]
        else:
            facts["mtime"] //= 1_000_000_000
    return found


@pytest.mark.needs_fuse
@pytest.mark.parametrize("image_format", ["oci", "docker"])
@pytest.mark.slow
def test_an_image_of_buildah_is_mounted_as_buildah_has_it(
    tmp_path: Path, buildah: Buildah, anonymous_registry: RegistryServer, mountpoint: Path, image_format: str
) -> None:
    """Two layers, the second with whiteouts, pushed in both formats; the config is carried over."""
    fill(tmp_path / "tree")
    base = buildah("from", "scratch")
    buildah("copy", base, tmp_path / "tree", "/")
    buildah("config", "--cmd", "/bin/tool", "--env", "KEY=value", "--label", "made-by=buildah", base)
    built = buildah("from", buildah("commit", "-q", "--format", image_format, base))
    change(Path(buildah("mount", built)))
    image = buildah("commit", "-q", "--format", image_format, built)
    name = f"{anonymous_registry.host}/buildah/{image_format}"
    buildah("push", "-q", "--tls-verify=false", image, f"docker://{name}:v1")

    machine = Machine(tmp_path / "machine")
    report = machine.json("convert", f"{name}:v1", f"{name}:v1-nydus")
    assert (report["layers"], report["blobs_uploaded"]) == (2, 2)
    machine.nydus("check", "--deep", f"{name}:v1-nydus")
    wanted = described(Path(buildah("mount", buildah("from", image))))
    assert "/etc/conf-7" not in wanted
    assert "content" in wanted["/var/empty"]
    machine.nydus("mount", "--driver", "fuse", f"{name}:v1-nydus", mountpoint)
    assert described(mountpoint) == wanted
    machine.nydus("umount", mountpoint)
    machine.nydus("convert", "--reverse", f"{name}:v1-nydus", f"oci:{tmp_path}/back:v1")
    back = buildah("from", f"oci:{tmp_path}/back:v1")
    assert described(Path(buildah("mount", back))) == wanted
    inspected = buildah("inspect", "--format", "{{.OCIv1.Config.Cmd}} {{.OCIv1.Config.Labels}}", back)
    assert inspected.startswith("[/bin/tool] ")
    assert "made-by:buildah" in inspected
