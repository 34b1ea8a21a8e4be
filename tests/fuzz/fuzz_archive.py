"""Reads an archive file as an OCI layout and as a file of docker save.

The input is read as it is, and with the checksums of its headers put right.
"""

import hashlib
import json
import tarfile
import tempfile
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import trio

from backend.docker_archive import DockerArchiveStore
from backend.manifest import OCI_MANIFEST
from backend.oci_archive import OciArchiveStore
from backend.reference import DockerArchiveReference, OciArchiveReference
from backend.store import ImageStore
from tests.archives import Archive, saved_image
from tests.hostile import value_or_error

_BLOCK = 512
_CHECKSUM = slice(148, 156)
_MANIFEST = b'{"schemaVersion":2,"layers":[]}'


def _layout(format: int) -> bytes:
    hexadecimal = hashlib.sha256(_MANIFEST).hexdigest()
    entry = {"mediaType": OCI_MANIFEST, "digest": f"sha256:{hexadecimal}", "size": len(_MANIFEST)}
    archive = Archive(format).file("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
    archive.document("index.json", {"schemaVersion": 2, "manifests": [entry]}).file("n" * 120, b"")
    return archive.file(f"blobs/sha256/{hexadecimal}", _MANIFEST).data().rstrip(b"\0")


SEEDS = (
    _layout(tarfile.PAX_FORMAT),
    _layout(tarfile.GNU_FORMAT),
    saved_image([b"layer", b"another"], "app:v1").data().rstrip(b"\0"),
)


def _with_checksums(data: bytes) -> bytes:
    """`data` with the checksum of every block right that was one of a header."""
    mended = bytearray(data)
    for at in range(0, len(data) - _BLOCK + 1, _BLOCK):
        block = mended[at : at + _BLOCK]
        if b"ustar" in block:
            block[_CHECKSUM] = b" " * 8
            block[_CHECKSUM] = b"%06o\0 " % sum(block)
            mended[at : at + _BLOCK] = block
    return bytes(mended)


def _no_other_image(text: str) -> AbstractAsyncContextManager[ImageStore]:
    raise AssertionError(f"nobody asked for {text}")


async def _read(path: Path) -> None:
    with value_or_error():
        async with OciArchiveStore.open(OciArchiveReference(path), _no_other_image) as layout:
            stored = await layout.get_manifest()
            assert f"sha256:{hashlib.sha256(stored.data).hexdigest()}" == stored.digest
    with value_or_error():
        async with DockerArchiveStore.open(DockerArchiveReference(path), _no_other_image) as saved:
            made = await saved.get_manifest()
            for layer in json.loads(made.data)["layers"]:
                assert await saved.open_content(layer["digest"], None).size() == layer["size"]


def exercise(data: bytes) -> None:
    """Only errors of this project may come up."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        for version in (data, _with_checksums(data)):
            path.write_bytes(version)
            trio.run(_read, path)


if __name__ == "__main__":
    from tests.fuzz.driver import run

    run("fuzz_archive")
