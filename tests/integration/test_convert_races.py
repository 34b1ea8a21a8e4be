"""Conversions beside which somebody else publishes: what has come meanwhile is not lost."""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.cli_machine import HANGS_AFTER_S, Machine
from tests.integration.test_mount_pyfuse3 import noise
from tests.oci_images import OCI_INDEX, Blob, Layer, Layout

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "source")


@dataclass(slots=True)
class Outcome:
    """How a command ended, once it has."""

    code: int = 0
    message: str = ""


@contextmanager
def interrupted(machine: Machine, *arguments: str) -> Iterator[Outcome]:
    """A conversion that has read what it is to convert, and waits while the block runs."""
    outcome = Outcome()
    command = machine.command("convert", *arguments)
    with subprocess.Popen(
        command, env=machine.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + HANGS_AFTER_S
        while not list((machine.directory / "cache/layers").glob("*.work")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        try:
            yield outcome
        finally:
            process.send_signal(signal.SIGCONT)
            outcome.message = process.communicate(timeout=HANGS_AFTER_S)[1]
            outcome.code = process.returncode


def name_index(layout: Layout, *entries: dict[str, Any]) -> Blob:
    """Makes an index of these what `v1` names, in place of what it named."""
    index = layout.put_json(OCI_INDEX, {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries})
    names = {"org.opencontainers.image.ref.name": "v1"}
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [index.descriptor(annotations=names)],
    }
    (layout.path / "index.json").write_text(json.dumps(document))
    return index


def named(layout: Layout) -> str:
    (entry,) = json.loads((layout.path / "index.json").read_bytes())["manifests"]
    return str(entry["digest"])


def image(layout: Layout, name: str, architecture: str) -> dict[str, Any]:
    platform = {"os": "linux", "architecture": architecture}
    made = layout.image([Layer().add(name, noise(30 * MIB))], architecture=architecture)
    return made.descriptor(platform=platform)


@pytest.mark.parametrize("both", [("--both",), ()])
@pytest.mark.slow
def test_a_tag_that_has_moved_is_left_alone(machine: Machine, layout: Layout, both: tuple[str, ...]) -> None:
    name_index(layout, image(layout, "old", "amd64"))
    place = f"oci:{layout.path}:v1"
    with interrupted(machine, place, place, "--platform=linux/amd64", *both) as outcome:
        moved = name_index(layout, image(layout, "new", "amd64"))
    assert outcome.code == 64, outcome.message
    assert f"and now {moved.digest}" in outcome.message
    assert named(layout) == moved.digest
    machine.nydus("convert", place, place, "--platform=linux/amd64", *both)


def test_an_image_that_was_added_meanwhile_stays_in_the_index(machine: Machine, layout: Layout) -> None:
    """As when the jobs of a pipeline convert one platform each."""
    amd, arm = image(layout, "f", "amd64"), image(layout, "g", "arm64")
    name_index(layout, amd)
    place = f"oci:{layout.path}:v1"
    with interrupted(machine, place, place, "--platform=linux/amd64", "--both") as outcome:
        name_index(layout, amd, arm)
    assert outcome.code == 0, outcome.message
    entries = json.loads(layout.read(named(layout)))["manifests"]
    assert [entry["digest"] for entry in entries[:2]] == [amd["digest"], arm["digest"]]
    assert [entry["artifactType"] for entry in entries[2:]] == [
        "application/vnd.nydus.image.manifest.v1+json"
    ]


@pytest.mark.slow
def test_two_conversions_share_a_build_cache(machine: Machine, layout: Layout, tmp_path: Path) -> None:
    """The one that was there first and ends last keeps what the other has put in."""
    layout.image([Layer().add("f", noise(30 * MIB))], tag="f")
    layout.image([Layer().add("g", noise(MIB, 1))], tag="g")
    cache = ("--build-cache", f"oci:{tmp_path}/cache:v1")

    def target(host: Machine, name: str) -> str:
        return f"oci:{host.directory}/{name}:v1"

    other, third = Machine(tmp_path / "other"), Machine(tmp_path / "third")
    with interrupted(machine, f"oci:{layout.path}:f", target(machine, "f"), *cache) as outcome:
        other.nydus("convert", f"oci:{layout.path}:g", target(other, "g"), *cache)
    assert outcome.code == 0, outcome.message
    for name in ("f", "g"):
        report = third.json("convert", f"oci:{layout.path}:{name}", target(third, name), *cache)
        assert report["layers_converted"] == 0, name
