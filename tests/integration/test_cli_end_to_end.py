"""The whole way with a real registry and a real mount: build, mount, compare, status, check, umount."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.integration.cli_machine import Machine
from tests.integration.registry_server import RegistryServer, free_port

pytestmark = [pytest.mark.needs_registry, pytest.mark.needs_fuse]

BIG_BYTES = 64 << 20


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real tree (Python libraries of this machine) and a large file that does not compress."""
    root = tmp_path_factory.mktemp("source")
    shutil.copytree(Path(os.__file__).parent / "json", root / "json")
    shutil.copytree(Path(os.__file__).parent / "email", root / "email")
    (root / "model.bin").write_bytes(os.urandom(BIG_BYTES))
    (root / "link").symlink_to("json/__init__.py")
    (root / "empty").mkdir()
    return root


@pytest.fixture(scope="module")
def image(source: Path, anonymous_registry: RegistryServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tree as an image in a registry."""
    reference = f"{anonymous_registry.host}/cli/end-to-end:v1"
    builder = Machine(tmp_path_factory.mktemp("builder"))
    assert builder.json("build", source, reference)["blobs_uploaded"] == 1
    return reference


def test_the_main_job(machine: Machine, source: Path, image: str, mountpoint: Path) -> None:
    machine.nydus("mount", image, mountpoint)

    # Only the chunks under a small file travel.
    assert (mountpoint / "json" / "decoder.py").read_bytes() == (source / "json" / "decoder.py").read_bytes()
    (status,) = machine.statuses(mountpoint)
    assert status["state"] == "mounted"
    assert status["reference"] == image
    assert isinstance(status["fetched_bytes"], int)
    assert isinstance(status["image_size_bytes"], int)
    assert 0 < status["fetched_bytes"] < 4 << 20
    assert status["image_size_bytes"] > BIG_BYTES
    assert str(mountpoint) in machine.nydus("status")

    compared = subprocess.run(
        ["diff", "-r", "--no-dereference", source, mountpoint], capture_output=True, check=False
    )
    assert (compared.returncode, compared.stdout, compared.stderr) == (0, b"", b"")

    assert "no faults" in machine.nydus("check", image)
    machine.nydus("umount", mountpoint)
    assert not os.path.ismount(mountpoint)
    assert list(mountpoint.iterdir()) == []
    assert machine.statuses() == []


def test_a_second_mount_fetches_nothing_again(machine: Machine, image: str, mountpoint: Path) -> None:
    for expected in (True, False):
        machine.nydus("mount", image, mountpoint)
        assert (mountpoint / "link").read_bytes()
        (status,) = machine.statuses(mountpoint)
        assert (status["fetched_bytes"] != 0) == expected
        machine.nydus("umount", mountpoint)


def test_a_foreground_mount_ends_with_sigterm(machine: Machine, image: str, mountpoint: Path) -> None:
    with subprocess.Popen(
        machine.command("mount", "--foreground", image, mountpoint),
        env=machine.environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert "mounted" in process.stderr.readline()
        assert os.path.ismount(mountpoint)
        process.terminate()
        assert process.wait() == 0
    assert not os.path.ismount(mountpoint)
    assert machine.statuses() == []


def test_a_dead_mount_is_seen_and_cleaned(machine: Machine, image: str, mountpoint: Path) -> None:
    machine.nydus("mount", "--driver", "pyfuse3", image, mountpoint)
    (status,) = machine.statuses(mountpoint)
    assert isinstance(status["pid"], int)
    os.kill(status["pid"], 9)
    while machine.statuses(mountpoint)[0]["state"] == "mounted":
        pass  # the signal is on its way
    assert machine.statuses() == []
    machine.nydus("mount", image, mountpoint)
    assert (mountpoint / "link").read_bytes()
    machine.nydus("umount", mountpoint)


class TestFailures:
    """One clear line each, an exit code of its own, and nothing left behind."""

    def test_a_reference_that_does_not_parse(self, machine: Machine, mountpoint: Path) -> None:
        code, line = machine.failure("mount", "no spaces allowed", mountpoint)
        assert code == 43
        assert "is not an image reference" in line

    @pytest.mark.slow
    def test_no_registry_listens(self, machine: Machine, mountpoint: Path) -> None:
        code, line = machine.failure("mount", f"127.0.0.1:{free_port()}/a/b:v1", mountpoint)
        assert code == 33
        assert "connection refused" in line

    def test_no_such_image(
        self, machine: Machine, anonymous_registry: RegistryServer, mountpoint: Path
    ) -> None:
        code, line = machine.failure("mount", f"{anonymous_registry.host}/no/such:image", mountpoint)
        assert code == 31
        assert "no such blob or image" in line

    def test_a_mount_point_that_is_not_empty(self, machine: Machine, image: str, mountpoint: Path) -> None:
        (mountpoint / "mine").touch()
        code, line = machine.failure("mount", image, mountpoint)
        assert 70 <= code < 90
        assert str(mountpoint) in line
        assert (mountpoint / "mine").exists()

    def test_a_mount_point_that_is_missing(self, machine: Machine, image: str, mountpoint: Path) -> None:
        code, line = machine.failure("mount", image, mountpoint / "nope")
        assert 70 <= code < 90
        assert "nope" in line

    def test_a_mount_point_that_is_taken(self, machine: Machine, image: str, mountpoint: Path) -> None:
        machine.nydus("mount", image, mountpoint)
        code, line = machine.failure("mount", image, mountpoint)
        assert 70 <= code < 90
        assert str(mountpoint) in line
        assert machine.statuses(mountpoint)[0]["state"] == "mounted"
        machine.nydus("umount", mountpoint)

    def test_a_missing_source(self, machine: Machine, anonymous_registry: RegistryServer) -> None:
        target = f"{anonymous_registry.host}/cli/none:v1"
        code, line = machine.failure("build", machine.directory / "nope", target)
        assert code == 50
        assert "nope" in line

    def test_nothing_is_mounted_there(self, machine: Machine, mountpoint: Path) -> None:
        code, line = machine.failure("umount", mountpoint)
        assert code != 0
        assert str(mountpoint) in line
