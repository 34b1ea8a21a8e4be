"""Verbs on real registries: credentials, authorities, and what happens without them."""

import json
from pathlib import Path

import pytest

from tests.integration.cli_machine import Machine
from tests.integration.registry_server import USER, RegistryServer, free_port

pytestmark = pytest.mark.needs_registry


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    root.mkdir()
    (root / "config.json").write_text('{"layers": 3}')
    return root


def test_an_image_travels_between_registry_and_layout(
    machine: Machine, source: Path, anonymous_registry: RegistryServer
) -> None:
    reference = f"{anonymous_registry.host}/cli/travel:v1"
    layout = f"oci:{machine.directory / 'layout'}:v1"
    built = machine.json("build", source, reference)
    assert machine.json("copy", reference, layout)["digest"] == built["digest"]
    assert machine.json("inspect", f"{reference.removesuffix(':v1')}@{built['digest']}")["inodes"] == 2
    assert machine.nydus("cat", layout, "config.json") == '{"layers": 3}'
    assert machine.json("check", reference, "--deep")["faults"] == []


def test_only_new_blobs_travel(machine: Machine, source: Path, anonymous_registry: RegistryServer) -> None:
    reference = f"{anonymous_registry.host}/cli/again:v1"
    machine.nydus("build", source, reference)
    again = machine.json("build", source, reference)
    assert (again["blobs_uploaded"], again["blobs_skipped"], again["bytes_uploaded"]) == (0, 1, 0)


@pytest.mark.slow
def test_no_registry_listens(machine: Machine, source: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    for arguments in (["ls", f"{address}/a/b"], ["build", source, f"{address}/a/b"]):
        code, line = machine.failure(*arguments)
        assert code == 33
        assert address in line
        assert "refused" in line


def test_no_such_image(machine: Machine, anonymous_registry: RegistryServer) -> None:
    for verb in ("ls", "inspect", "check"):
        code, line = machine.failure(verb, f"{anonymous_registry.host}/no/such:image")
        assert code == 31
        assert "no such blob or image" in line


def test_credentials_are_missing(machine: Machine, source: Path, htpasswd_registry: RegistryServer) -> None:
    for arguments in (
        ["ls", f"{htpasswd_registry.host}/a/b"],
        ["build", source, f"{htpasswd_registry.host}/a/b"],
    ):
        code, line = machine.failure(*arguments)
        assert 30 <= code < 50
        assert htpasswd_registry.host in line


def test_credentials_of_docker_are_used(
    machine: Machine,
    source: Path,
    htpasswd_registry: RegistryServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    header = USER.basic().removeprefix("Basic ")
    (tmp_path / "config.json").write_text(json.dumps({"auths": {htpasswd_registry.host: {"auth": header}}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    target = f"{htpasswd_registry.host}/cli/private:v1"
    machine.nydus("build", source, target)
    assert machine.nydus("cat", target, "/config.json") == '{"layers": 3}'


def test_tls_with_an_authority_of_its_own(
    machine: Machine, source: Path, tls_registry: RegistryServer
) -> None:
    target = f"{tls_registry.host}/cli/tls:v1"
    code, line = machine.failure("build", source, target)
    assert code == 35
    assert tls_registry.host in line
    assert tls_registry.ca_file is not None
    machine.nydus("build", source, target, "--ca-file", tls_registry.ca_file)
    machine.nydus("--insecure", "ls", target)
