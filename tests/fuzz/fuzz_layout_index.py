"""Reads `index.json` of an OCI layout, and adds an image to it."""

import json
import tempfile
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import trio

from backend.layout_index import INDEX_NAME, MARKER_NAME
from backend.manifest import OCI_INDEX, OCI_MANIFEST, REF_NAME_ANNOTATION
from backend.ocidigest import digest_of
from backend.ocilayout import LayoutStore
from backend.reference import LayoutReference
from backend.store import ImageStore
from tests.hostile import value_or_error

_MANIFEST = b'{"schemaVersion":2,"layers":[]}'
_DIGEST = digest_of(_MANIFEST)


def _index(*tags: str) -> bytes:
    entries = [
        {
            "mediaType": OCI_MANIFEST,
            "digest": _DIGEST,
            "size": len(_MANIFEST),
            "annotations": {REF_NAME_ANNOTATION: tag},
            "platform": {"architecture": "amd64", "os": "linux"},
        }
        for tag in tags
    ]
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()


SEEDS = (_index(), _index("v1"), _index("v2", "v1"))


def _no_other_image(text: str) -> AbstractAsyncContextManager[ImageStore]:
    raise AssertionError(f"nobody asked for {text}")


async def _read_and_add(directory: Path) -> None:
    for tag in ("v1", None):
        store = LayoutStore(LayoutReference(directory, tag), _no_other_image)
        with value_or_error():
            assert (await store.get_manifest()).data == _MANIFEST
        with value_or_error():
            await store.put_manifest(OCI_MANIFEST, _MANIFEST, as_reference=True)
            if tag is not None:
                assert (await store.get_manifest()).digest == _DIGEST


def exercise(data: bytes) -> None:
    """Only errors of this project may come up; an image that could be added is found."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        blobs = directory / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        (blobs / _DIGEST.removeprefix("sha256:")).write_bytes(_MANIFEST)
        (directory / MARKER_NAME).write_bytes(b'{"imageLayoutVersion":"1.0.0"}')
        (directory / INDEX_NAME).write_bytes(data)
        trio.run(_read_and_add, directory)


if __name__ == "__main__":
    from tests.fuzz.driver import run

    run("fuzz_layout_index")
