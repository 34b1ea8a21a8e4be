"""Reads a manifest or an index, and chooses what is in it."""

import json

from backend.manifest import (
    DOCKER_MANIFEST,
    OCI_INDEX,
    Descriptor,
    ImageManifest,
    blob_descriptor,
    bootstrap_descriptor,
    build_manifest,
    choose_manifests,
    nydus_layers,
    parse_document,
)
from backend.platforms import Platform
from tests.hostile import value_or_error

_HEX = "0123456789abcdef" * 4
_CONFIG = Descriptor("application/vnd.oci.image.config.v1+json", f"sha256:{_HEX}", 100)
_ENTRY = {
    "mediaType": DOCKER_MANIFEST,
    "digest": f"sha256:{_HEX}",
    "size": 7,
    "platform": {"architecture": "amd64", "os": "linux", "os.features": ["nydus.remoteimage.v1"]},
}
SEEDS = (
    build_manifest(_CONFIG, [blob_descriptor(_HEX, 9)], bootstrap_descriptor(f"sha256:{_HEX}", 5, [_HEX])),
    json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [_ENTRY, _ENTRY]}).encode(),
)


def exercise(data: bytes) -> None:
    """Only errors of this project may come up."""
    with value_or_error():
        document = parse_document(data, "fuzz")
        if isinstance(document, ImageManifest):
            assert nydus_layers(document, "fuzz").bootstrap in document.layers
        else:
            assert choose_manifests(document, Platform("amd64", "linux"), "fuzz")


if __name__ == "__main__":
    from tests.fuzz.driver import run

    run("fuzz_manifest")
