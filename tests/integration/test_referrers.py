"""`nydus-py convert --with-referrer`: the Nydus image beside the original, found from it."""

import json
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from tests.integration.cli_machine import Machine
from tests.integration.registry_server import RegistryServer
from tests.oci_images import OCI_INDEX, OCI_MANIFEST, Layer, Layout

pytestmark = pytest.mark.needs_registry
KIND = "application/vnd.nydus.image.manifest.v1+json"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


def manifest_at(server: RegistryServer, repository: str, key: str) -> dict[str, Any]:
    """What a registry gives for a tag or a digest."""
    request = Request(f"http://{server.host}/v2/{repository}/manifests/{key}")
    request.add_header("Accept", f"{OCI_MANIFEST}, {OCI_INDEX}")
    with urlopen(request, timeout=20) as answer:
        found = json.loads(answer.read())
    assert isinstance(found, dict)
    return found


@pytest.mark.slow
def test_a_registry_without_the_api_keeps_the_list_under_a_tag(
    anonymous_registry: RegistryServer, machine: Machine, tmp_path: Path
) -> None:
    repository = "referrers/app"
    layout = Layout(tmp_path / "source")
    original = layout.image([Layer().add("f", b"1"), Layer().add("g", b"2")], tag="v1")
    source = f"{anonymous_registry.host}/{repository}:v1"
    machine.nydus("copy", f"oci:{layout.path}:v1", source)
    machine.nydus("convert", "--with-referrer", source, f"{anonymous_registry.host}/{repository}:v1-nydus")
    machine.nydus(
        "convert", "--with-referrer", "--chunk-size", "4KiB", "--batch-size", "0", source, f"{source}-small"
    )
    tag = original.digest.replace(":", "-")
    entries = manifest_at(anonymous_registry, repository, tag)["manifests"]
    assert [entry["artifactType"] for entry in entries] == [KIND, KIND]
    for entry, name in zip(entries, ("v1-nydus", "v1-small"), strict=True):
        found = manifest_at(anonymous_registry, repository, entry["digest"])
        assert found == manifest_at(anonymous_registry, repository, name)
        assert found["subject"] == original.descriptor()
    # It is an image like any other, and a copy of it elsewhere is found from there too.
    machine.nydus("check", f"{source}-nydus")
    machine.nydus("copy", f"{source}-nydus", f"{anonymous_registry.host}/referrers/copy:v1")
    copied = manifest_at(anonymous_registry, "referrers/copy", tag)["manifests"]
    assert copied == entries[:1]


def test_each_platform_refers_to_its_own(
    anonymous_registry: RegistryServer, machine: Machine, tmp_path: Path
) -> None:
    repository = "referrers/platforms"
    layout = Layout(tmp_path / "source")
    images = {
        architecture: layout.image([Layer().add(architecture, b"1")], architecture=architecture)
        for architecture in ("amd64", "arm64")
    }
    entries = [
        image.descriptor(platform={"os": "linux", "architecture": name}) for name, image in images.items()
    ]
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    layout.tag(layout.put_json(OCI_INDEX, index), "v1")
    source = f"{anonymous_registry.host}/{repository}:v1"
    machine.nydus("copy", f"oci:{layout.path}:v1", source)
    machine.nydus("convert", "--with-referrer", "--both", "--all-platforms", source, source)
    for image in images.values():
        (entry,) = manifest_at(anonymous_registry, repository, image.digest.replace(":", "-"))["manifests"]
        found = manifest_at(anonymous_registry, repository, entry["digest"])
        assert found["subject"]["digest"] == image.digest
