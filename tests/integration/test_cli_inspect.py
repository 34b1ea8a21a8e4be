"""What `nydus-py inspect` says of images that share blobs with others, or an index."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from backend.manifest import OCI_INDEX, OCI_MANIFEST, ImageManifest, parse_document
from tests.integration.cli_machine import Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_dictionary_blob_is_used_in_part(tmp_path: Path, machine: Machine) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    shared = os.urandom(8192)
    (first / "shared").write_bytes(shared)
    (first / "other").write_bytes(os.urandom(3 * 8192))
    (second / "shared").write_bytes(shared)
    (second / "own").write_bytes(b"own")
    base, image = f"oci:{tmp_path / 'layout'}:base", f"oci:{tmp_path / 'layout'}:image"
    machine.nydus("build", first, base, "--chunk-size", "8KiB")
    machine.nydus("build", second, image, "--chunk-size", "8KiB", "--chunk-dict", base)
    report = json.loads(machine.nydus("inspect", "--json", image))
    dictionary = next(blob for blob in report["blobs"] if blob["is_reference"])
    own = next(blob for blob in report["blobs"] if not blob["is_reference"])
    assert (dictionary["chunks"], dictionary["used_chunks"]) == (4, 1)
    assert (dictionary["used_decoded_bytes"], dictionary["used_ratio"]) == (8192, 0.25)
    assert (own["used_chunks"], own["used_decoded_bytes"], own["used_ratio"]) == (1, 3, 1.0)
    assert own["source_layer"] is None
    text = machine.nydus("inspect", image)
    assert "    used: 1 chunks, 8.0 KiB (25.0%)\n    from a chunk dictionary\n" in text


def test_the_ordinary_image_beside_it(tmp_path: Path, machine: Machine) -> None:
    tree, layout = tmp_path / "tree", tmp_path / "layout"
    tree.mkdir()
    (tree / "file").write_bytes(b"file")
    built = machine.json("build", tree, f"oci:{layout}:v1")
    alone = machine.json("inspect", f"oci:{layout}:v1")
    assert alone["companion"] is None
    digest = str(built["digest"])
    data = (layout / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes()
    assert isinstance(parse_document(data, "test"), ImageManifest)
    ordinary = "sha256:" + 64 * "a"
    platform = {"os": "linux", "architecture": os.uname().machine.replace("x86_64", "amd64")}
    entries = [
        {"mediaType": OCI_MANIFEST, "digest": ordinary, "size": 1, "platform": platform},
        {
            "mediaType": OCI_MANIFEST,
            "digest": digest,
            "size": len(data),
            "platform": platform,
            "artifactType": "application/vnd.nydus.image.manifest.v1+json",
        },
    ]
    _name_index(layout, "both", {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries})
    report = machine.json("inspect", f"oci:{layout}:both")
    assert (report["digest"], report["companion"]) == (digest, ordinary)
    assert f"index      of this image and the ordinary one, {ordinary}" in machine.nydus(
        "inspect", f"oci:{layout}:both"
    )


def _name_index(layout: Path, tag: str, index: dict[str, object]) -> None:
    """Adds an index to a layout under a tag."""
    data = json.dumps(index).encode()
    digest = hashlib.sha256(data).hexdigest()
    (layout / "blobs" / "sha256" / digest).write_bytes(data)
    top = json.loads((layout / "index.json").read_text())
    top["manifests"].append(
        {
            "mediaType": OCI_INDEX,
            "digest": f"sha256:{digest}",
            "size": len(data),
            "annotations": {"org.opencontainers.image.ref.name": tag},
        }
    )
    (layout / "index.json").write_text(json.dumps(top))
