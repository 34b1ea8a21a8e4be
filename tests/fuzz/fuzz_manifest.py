"""Fuzzes manifests and indexes: whatever the bytes, a typed error or a value comes out."""

import sys
from contextlib import suppress

import atheris

with atheris.instrument_imports(include=["backend.manifest"]):
    from backend.contract import BackendError
    from backend.manifest import ImageManifest, Platform, choose_manifests, nydus_layers, parse_document


def fuzz(data: bytes) -> None:
    """One input."""
    with suppress(BackendError):
        document = parse_document(data, "fuzz")
        if isinstance(document, ImageManifest):
            nydus_layers(document, "fuzz")
        else:
            choose_manifests(document, Platform("amd64", "linux"), "fuzz")


if __name__ == "__main__":
    atheris.Setup(sys.argv, fuzz)
    atheris.Fuzz()
