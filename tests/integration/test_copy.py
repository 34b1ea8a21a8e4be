"""Copies of images between registries, layouts, archives and directories."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from backend.copy import copy_image
from backend.credentials import NoCredentials
from backend.manifest import OCI_INDEX, OCI_MANIFEST
from backend.ocidigest import digest_of
from backend.publishing import STAGING_PREFIX
from backend.reference import (
    DirReference,
    LayoutReference,
    OciArchiveReference,
    Reference,
    RegistryReference,
)
from backend.registry import RegistryOptions
from backend.store import BlobOutcome, ImageMetadata, NoProgress, PublishResult, open_store
from tests.integration.registry_server import RegistryServer, registry_server
from tests.sample_image import make_image

pytestmark = pytest.mark.needs_registry

OPTIONS = RegistryOptions(credentials=NoCredentials())
MakeReference = Callable[[RegistryServer, Path], Reference]
PLACES: dict[str, MakeReference] = {
    "registry": lambda server, directory: RegistryReference(server.host, f"copy/{directory.name}", "v1"),
    "layout": lambda server, directory: LayoutReference(directory, "v1"),
    "archive": lambda server, directory: OciArchiveReference(directory.with_suffix(".tar"), "v1"),
    "dir": lambda server, directory: DirReference(directory),
}


async def copy(source: Reference, target: Reference) -> PublishResult:
    async with open_store(source, OPTIONS) as origin, open_store(target, OPTIONS) as store:
        return await copy_image(origin, store, NoProgress())


async def fetch(reference: Reference, images_dir: Path) -> ImageMetadata:
    async with open_store(reference, OPTIONS) as store:
        return await store.fetch_metadata(images_dir)


@pytest.mark.parametrize("target", PLACES)
@pytest.mark.parametrize("source", PLACES)
async def test_every_way(
    anonymous_registry: RegistryServer, tmp_path: Path, source: str, target: str
) -> None:
    # Names of their own, since all the ways share one registry: nothing may be there already.
    seed = 100 + len(PLACES) * list(PLACES).index(source) + list(PLACES).index(target)
    image = make_image(tmp_path / "build", seed=seed)
    origin = PLACES[source](anonymous_registry, tmp_path / f"from-{source}-{target}")
    copied = PLACES[target](anonymous_registry, tmp_path / f"to-{source}-{target}")
    async with open_store(origin, OPTIONS) as store:
        await store.publish(image, NoProgress())
    result = await copy(origin, copied)
    metadata = await fetch(copied, tmp_path / "images")
    assert metadata.digest == result.digest
    assert metadata.bootstrap_path.read_bytes() == image.bootstrap.read_bytes()
    for blob in image.blobs:
        assert metadata.blob_meta_path(blob.blob_id).read_bytes() == blob.meta.read_bytes()
    if "dir" not in (source, target):
        assert result.digest == (await fetch(origin, tmp_path / "images")).digest
    mounted = 2 if source == target == "registry" else 0
    assert (result.blobs_uploaded, result.blobs_mounted) == (2 - mounted, mounted)
    again = await copy(origin, copied)
    if target == "archive":  # the file is made anew
        assert (again.blobs_skipped, again.bytes_uploaded) == (0, result.bytes_uploaded)
    else:
        assert (again.blobs_skipped, again.bytes_uploaded) == (2, 0)
    assert not list(tmp_path.rglob(f"{STAGING_PREFIX}*"))


async def test_to_another_registry(anonymous_registry: RegistryServer, tmp_path: Path) -> None:
    image = make_image(tmp_path / "build", blob_sizes=(1000, 17 << 20), seed=40)
    origin = RegistryReference(anonymous_registry.host, "copy/out", "v1")
    async with open_store(origin, OPTIONS) as store:
        published = await store.publish(image, NoProgress())
    with registry_server(tmp_path / "other") as other:
        target = RegistryReference(other.host, "in/here", "v2")
        result = await copy(origin, target)
        assert result.digest == published.digest
        assert (result.blobs_uploaded, result.blobs_mounted) == (2, 0)
        assert result.bytes_uploaded > sum(blob.size_bytes for blob in image.blobs)
        assert (await fetch(target, tmp_path / "images")).digest == published.digest


async def test_index_is_copied_whole(anonymous_registry: RegistryServer, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    entries, contents = [], []
    for number, architecture in enumerate(("amd64", "arm64")):
        reference = LayoutReference(layout, architecture)
        async with open_store(reference) as store:
            image = make_image(tmp_path / architecture, seed=50 + number)
            digest = (await store.publish(image, NoProgress())).digest
        contents.append(digest)
        size_bytes = (layout / "blobs/sha256" / digest.removeprefix("sha256:")).stat().st_size
        platform = {"os": "linux", "architecture": architecture}
        entries.append(
            {"mediaType": OCI_MANIFEST, "digest": digest, "size": size_bytes, "platform": platform}
        )
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    index = json.dumps(document).encode()
    (layout / "blobs/sha256" / digest_of(index).removeprefix("sha256:")).write_bytes(index)
    listing = json.loads((layout / "index.json").read_bytes())
    listing["manifests"].append(
        {
            "mediaType": OCI_INDEX,
            "digest": digest_of(index),
            "size": len(index),
            "annotations": {"org.opencontainers.image.ref.name": "both"},
        }
    )
    (layout / "index.json").write_text(json.dumps(listing))
    target = RegistryReference(anonymous_registry.host, "copy/index", "v1")
    result = await copy(LayoutReference(layout, "both"), target)
    assert (result.digest, result.blobs_uploaded) == (digest_of(index), 4)
    archive = OciArchiveReference(tmp_path / "both.tar", "both")
    assert (await copy(target, archive)).digest == digest_of(index)
    back = await copy(archive, LayoutReference(tmp_path / "back", "both"))
    assert back.digest == digest_of(index)
    for digest in contents:
        assert (tmp_path / "back/blobs/sha256" / digest.removeprefix("sha256:")).exists()


class Heard:
    """Progress that is remembered."""

    def __init__(self) -> None:
        self.events: list[tuple[str, object]] = []

    def blob_started(self, digest: str, size_bytes: int) -> None:
        self.events.append(("started", size_bytes))

    def bytes_sent(self, count: int) -> None:
        self.events.append(("sent", count))

    def blob_finished(self, digest: str, outcome: BlobOutcome) -> None:
        self.events.append(("finished", outcome))


@pytest.mark.parametrize("target", ["registry", "layout", "archive"])
@pytest.mark.parametrize("source", ["layout", "archive"])
@pytest.mark.slow
async def test_memory_does_not_grow_with_the_blob(
    anonymous_registry: RegistryServer, tmp_path: Path, source: str, target: str
) -> None:
    size_bytes = 96 << 20
    image = make_image(tmp_path / "build", blob_sizes=(size_bytes,), seed=60 + (source == "layout"))
    async with open_store(PLACES[source](anonymous_registry, tmp_path / "origin")) as origin:
        await origin.publish(image, NoProgress())
        heard = Heard()
        reference = PLACES[target](anonymous_registry, tmp_path / f"memory-{source}-{target}")
        async with open_store(reference, OPTIONS) as store:
            tracemalloc.start()
            try:
                await copy_image(origin, store, heard)
                _, peak_bytes = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
    assert peak_bytes < 48 << 20
    sent = [count for kind, count in heard.events if kind == "sent" and isinstance(count, int)]
    assert sum(sent) > size_bytes
    assert max(sent) <= 8 << 20
    assert heard.events[0] == ("started", image.blobs[0].size_bytes)
