"""`nydus-py convert` on layers that were converted before: what is found again, here and in build caches."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.integration.cli_machine import Machine
from tests.integration.registry_server import RegistryServer
from tests.integration.test_mount_pyfuse3 import noise
from tests.oci_images import Layer, Layout, manifest_of

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "source")


def test_only_the_layer_that_changed_is_converted_and_sent(machine: Machine, layout: Layout) -> None:
    base = [Layer().add("model", noise(2 * MIB)), Layer().add("framework", noise(3 * MIB, 1))]
    layout.image([*base, Layer().add("app", noise(MIB, 2))], tag="v1")
    layout.image([*base, Layer().add("app", noise(MIB, 3))], tag="v2")
    target = f"oci:{machine.directory}/out"
    machine.json("convert", f"oci:{layout.path}:v1", f"{target}:v1")
    report = machine.json("convert", f"oci:{layout.path}:v2", f"{target}:v2")
    assert (report["layers_converted"], report["blobs_uploaded"], report["blobs_skipped"]) == (1, 1, 2)
    assert isinstance(report["bytes_uploaded"], int)
    assert report["bytes_uploaded"] < 1.05 * MIB


@pytest.mark.slow
def test_a_known_layer_goes_to_another_place_without_being_converted(
    machine: Machine, layout: Layout
) -> None:
    layout.image([Layer().add("f", noise(MIB))], tag="v1")
    out = machine.directory / "out"
    machine.json("convert", f"oci:{layout.path}:v1", f"oci:{out}:v1")
    report = machine.json("convert", f"oci:{layout.path}:v1", f"oci:{machine.directory}/elsewhere:v1")
    assert (report["layers_converted"], report["blobs_uploaded"]) == (0, 1)
    shutil.rmtree(machine.directory / "elsewhere")
    shutil.rmtree(out)
    report = machine.json("convert", f"oci:{layout.path}:v1", f"oci:{machine.directory}/third:v1")
    assert report["layers_converted"] == 1, "nobody has its blob any more"
    machine.nydus("check", "--deep", f"oci:{machine.directory}/third:v1")


@pytest.mark.slow
def test_a_build_cache_serves_hosts_that_keep_nothing(
    machine: Machine, layout: Layout, anonymous_registry: RegistryServer
) -> None:
    base = [Layer().add("model", noise(2 * MIB)), Layer().add("framework", noise(20 * MIB, 1))]
    layout.image([*base, Layer().add("app", noise(MIB, 2))], tag="v1")
    layout.image([*base, Layer().add("app", noise(MIB, 3))], tag="v2")
    host = f"{anonymous_registry.host}/cached"
    machine.json("convert", f"oci:{layout.path}:v1", f"{host}/a:v1", "--build-cache", f"{host}/cache:main")
    fresh = Machine(machine.directory / "fresh")
    report = fresh.json(
        "convert", f"oci:{layout.path}:v2", f"{host}/b:v2", "--build-cache", f"{host}/cache:main"
    )
    assert (report["layers_converted"], report["blobs_mounted"], report["blobs_uploaded"]) == (1, 2, 1)
    fresh.nydus("check", "--deep", f"{host}/b:v2")
    third = Machine(machine.directory / "third")
    cache = ("--build-cache", f"{host}/cache:main")
    report = third.json("convert", f"oci:{layout.path}:v1", f"oci:{third.directory}/o:v1", *cache)
    assert report["layers_converted"] == 0
    code, line = third.failure(
        "convert", f"oci:{layout.path}:v1", f"{host}/c:v1", "--build-cache", f"{host}/a:v1"
    )
    assert (code, "something else has this name" in line) == (63, True)


def test_patterns_do_not_change_what_is_found_again(machine: Machine, layout: Layout) -> None:
    """Layers are built without them: with a cache or without one the image is the same."""
    layout.image([Layer().add("a", noise(MIB)).add("z", noise(MIB, 1))], tag="v1")
    source, out = f"oci:{layout.path}:v1", machine.directory / "out"
    machine.nydus("convert", source, f"oci:{out}:plain")
    cached = machine.json("convert", source, f"oci:{out}:cached", "--prefetch", "/z")
    fresh = Machine(machine.directory / "fresh")
    assert fresh.json("convert", source, f"oci:{out}:fresh", "--prefetch", "/z")["digest"] == cached["digest"]


def test_a_damaged_layer_cache_is_made_again(machine: Machine, layout: Layout) -> None:
    layout.image([Layer().add("f", noise(MIB))], tag="v1")
    source, out = f"oci:{layout.path}:v1", machine.directory / "out"
    first = machine.json("convert", source, f"oci:{out}:v1")
    (bootstrap,) = (machine.directory / "cache/layers").glob("*/image.boot")
    data = bytearray(bootstrap.read_bytes())
    data[-100] ^= 1
    bootstrap.write_bytes(data)
    again = machine.json("convert", source, f"oci:{out}:v1")
    assert (again["digest"], again["layers_converted"]) == (first["digest"], 1)


def test_a_build_cache_that_lost_a_package_costs_time_only(machine: Machine, layout: Layout) -> None:
    layout.image([Layer().add("f", noise(MIB))], tag="v1")
    source, out = f"oci:{layout.path}:v1", machine.directory / "out"
    cache = machine.directory / "kept"
    first = machine.json("convert", source, f"oci:{out}:v1", "--build-cache", f"oci:{cache}:c")
    index = json.loads((cache / "index.json").read_bytes())
    manifest = manifest_of(cache, index["manifests"][0]["digest"])
    packages = [layer for layer in manifest["layers"] if "gzip" in layer["mediaType"]]
    for package in packages:
        (cache / "blobs/sha256" / package["digest"].removeprefix("sha256:")).unlink()
    fresh = Machine(machine.directory / "fresh")
    again = fresh.json("convert", source, f"oci:{fresh.directory}/o:v1", "--build-cache", f"oci:{cache}:c")
    assert (again["digest"], again["layers_converted"]) == (first["digest"], 1)
    healed = Machine(machine.directory / "healed")
    third = healed.json("convert", source, f"oci:{healed.directory}/o:v1", "--build-cache", f"oci:{cache}:c")
    assert third["layers_converted"] == 0


def test_a_record_of_a_build_cache_names_no_files(machine: Machine, layout: Layout) -> None:
    layout.image([Layer().add("f", noise(MIB))], tag="v1")
    source, out = f"oci:{layout.path}:v1", machine.directory / "out"
    cache = machine.directory / "kept"
    machine.json("convert", source, f"oci:{out}:v1", "--build-cache", f"oci:{cache}:c")
    index = json.loads((cache / "index.json").read_bytes())
    manifest = manifest_of(cache, index["manifests"][0]["digest"])
    for layer in manifest["layers"]:
        if "nydus-py/layer-record" in layer.get("annotations", {}):
            record = json.loads(layer["annotations"]["nydus-py/layer-record"])
            record["blobs"][0]["blob_id"] = str(machine.directory / "victim")
            layer["annotations"]["nydus-py/layer-record"] = json.dumps(record)
    kept = Layout(cache)
    kept.tag(kept.put_json("application/vnd.oci.image.manifest.v1+json", manifest), "c")
    (machine.directory / "victim").write_bytes(b"stays")
    fresh = Machine(machine.directory / "fresh")
    report = fresh.json("convert", source, f"oci:{fresh.directory}/o:v1", "--build-cache", f"oci:{cache}:c")
    assert report["layers_converted"] == 1
    assert (machine.directory / "victim").read_bytes() == b"stays"


def test_a_broken_record_of_another_layer_is_left_out(machine: Machine, layout: Layout) -> None:
    layout.image([Layer().add("f", noise(MIB))], tag="v1")
    layout.image([Layer().add("g", noise(MIB, 1))], tag="v2")
    cache, out = machine.directory / "kept", machine.directory / "out"
    machine.json("convert", f"oci:{layout.path}:v1", f"oci:{out}:v1", "--build-cache", f"oci:{cache}:c")
    index = json.loads((cache / "index.json").read_bytes())
    manifest = manifest_of(cache, index["manifests"][0]["digest"])
    for layer in manifest["layers"]:
        if "nydus-py/layer-record" in layer.get("annotations", {}):
            layer["annotations"]["nydus-py/layer-record"] = "{"
    kept = Layout(cache)
    kept.tag(kept.put_json("application/vnd.oci.image.manifest.v1+json", manifest), "c")
    report = machine.json(
        "convert", f"oci:{layout.path}:v2", f"oci:{out}:v2", "--build-cache", f"oci:{cache}:c"
    )
    assert report["layers_converted"] == 1


def test_a_build_cache_beside_an_archive(machine: Machine, layout: Layout) -> None:
    """Nothing is in an archive before it has its name: the blobs come from this host."""
    layout.image([Layer().add("f", noise(MIB))], tag="v1")
    source, cache = f"oci:{layout.path}:v1", f"oci:{machine.directory}/kept:c"
    first = machine.json(
        "convert", source, f"oci-archive:{machine.directory}/a.tar:v1", "--build-cache", cache
    )
    fresh = Machine(machine.directory / "fresh")
    again = fresh.json("convert", source, f"oci:{fresh.directory}/o:v1", "--build-cache", cache)
    assert (again["digest"], again["layers_converted"]) == (first["digest"], 0)
    fresh.nydus("check", "--deep", f"oci:{fresh.directory}/o:v1")


def test_a_lost_chunk_table_is_made_again(machine: Machine, layout: Layout) -> None:
    layout.image([Layer().add("f", noise(MIB))], tag="v1")
    source, out = f"oci:{layout.path}:v1", machine.directory / "out"
    machine.json("convert", source, f"oci:{out}:v1")
    (table,) = (machine.directory / "cache/layers").glob("*/*.blob.meta")
    table.unlink()
    (table.parent / "files.json").write_text('{"files": []}')
    assert machine.json("convert", source, f"oci:{out}:v1")["layers_converted"] == 1


@pytest.mark.slow
def test_two_conversions_of_one_layer_at_once(machine: Machine, layout: Layout) -> None:
    layout.image([Layer().add("large", noise(64 * MIB, 1))], tag="v1")
    commands = [
        machine.command("convert", f"oci:{layout.path}:v1", f"oci:{machine.directory}/{name}:v1", "--json")
        for name in ("one", "two")
    ]
    processes = [
        subprocess.Popen(command, env=machine.environment, stdout=subprocess.PIPE) for command in commands
    ]
    reports = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert sorted(report["layers_converted"] for report in reports) == [0, 1]
    assert reports[0]["digest"] == reports[1]["digest"]
