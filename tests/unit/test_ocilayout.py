"""Images in OCI layouts on disk."""

import json
import os
from pathlib import Path

import pytest
import trio

from backend.contract import BackendError, BlobNotFound
from backend.layout_index import LayoutBroken, NoSuchTag
from backend.manifest import NotNydusImage
from backend.ocidigest import DigestMismatch, digest_of
from backend.publishing import STAGING_PREFIX, DiskFull
from backend.reference import LayoutReference
from backend.store import BlobFile, ImageFiles, ImageMetadata, NoProgress, PublishResult, open_store
from tests.sample_image import make_blob, make_image, write_image


async def publish(image: ImageFiles, directory: Path, tag: str | None = "v1") -> PublishResult:
    async with open_store(LayoutReference(directory, tag)) as store:
        return await store.publish(image, NoProgress())


async def fetch(directory: Path, images_dir: Path, tag: str | None = "v1") -> ImageMetadata:
    async with open_store(LayoutReference(directory, tag)) as store:
        return await store.fetch_metadata(images_dir)


def blob_path(directory: Path, digest: str) -> Path:
    return directory / "blobs" / "sha256" / digest.removeprefix("sha256:")


async def test_published_image_comes_back(tmp_path: Path) -> None:
    image = make_image(tmp_path / "build")
    result = await publish(image, tmp_path / "layout")
    metadata = await fetch(tmp_path / "layout", tmp_path / "images")
    assert metadata.digest == result.digest
    assert metadata.bootstrap_path.read_bytes() == image.bootstrap.read_bytes()
    for blob in image.blobs:
        assert metadata.blob_meta_path(blob.blob_id).read_bytes() == blob.meta.read_bytes()
    manifest = (metadata.directory / "manifest.json").read_bytes()
    assert digest_of(manifest) == result.digest
    assert result.blobs_uploaded == 2
    assert not list((tmp_path / "layout").rglob(f"{STAGING_PREFIX}*"))


async def test_files_are_those_of_the_specification(tmp_path: Path) -> None:
    result = await publish(make_image(tmp_path / "build"), tmp_path / "layout")
    layout = tmp_path / "layout"
    assert json.loads((layout / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((layout / "index.json").read_bytes())
    assert index == {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [
            {
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": result.digest,
                "size": blob_path(layout, result.digest).stat().st_size,
                "annotations": {"org.opencontainers.image.ref.name": "v1"},
                "artifactType": "application/vnd.nydus.image.manifest.v1+json",
            }
        ],
    }
    for blob in (layout / "blobs" / "sha256").iterdir():
        assert digest_of(blob.read_bytes()) == f"sha256:{blob.name}"


async def test_same_files_give_the_same_digest(tmp_path: Path) -> None:
    image = make_image(tmp_path / "build")
    first = await publish(image, tmp_path / "1")
    assert (await publish(image, tmp_path / "2", "v2")).digest == first.digest


async def test_altered_blobs_and_manifest_in_the_layout_are_replaced(tmp_path: Path) -> None:
    image = make_image(tmp_path / "build")
    result = await publish(image, tmp_path / "layout")
    for path in (tmp_path / "layout" / "blobs" / "sha256").iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    again = await publish(image, tmp_path / "layout")
    assert (again.digest, again.blobs_uploaded) == (result.digest, 2)
    for path in (tmp_path / "layout" / "blobs" / "sha256").iterdir():
        assert digest_of(path.read_bytes()) == f"sha256:{path.name}"


async def test_other_tags_stay_and_keep_what_others_wrote(tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    await publish(make_image(tmp_path / "1"), layout, "v1")
    index = json.loads((layout / "index.json").read_bytes())
    index["manifests"][0]["data"] = "a field of a newer specification"
    (layout / "index.json").write_text(json.dumps(index))
    second = await publish(make_image(tmp_path / "2", seed=2), layout, "v2")
    third = await publish(make_image(tmp_path / "3", seed=3), layout, "v2")
    entries = json.loads((layout / "index.json").read_bytes())["manifests"]
    assert entries[0] == index["manifests"][0]
    assert [entry["digest"] for entry in entries[1:]] == [third.digest] != [second.digest]


async def test_two_that_publish_at_once_both_succeed(tmp_path: Path) -> None:
    image = make_image(tmp_path / "build")
    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(publish, image, tmp_path / "layout", f"v{number}")
    entries = json.loads((tmp_path / "layout" / "index.json").read_bytes())["manifests"]
    assert len(entries) == 8


async def test_without_a_tag_the_only_image_is_meant(tmp_path: Path) -> None:
    image = make_image(tmp_path / "build")
    await publish(image, tmp_path / "layout", "v1")
    assert await fetch(tmp_path / "layout", tmp_path / "images", None)
    await publish(image, tmp_path / "layout", "v2")
    with pytest.raises(NoSuchTag, match="it has v1, v2"):
        await fetch(tmp_path / "layout", tmp_path / "images", None)
    await publish(image, tmp_path / "layout", None)
    assert await fetch(tmp_path / "layout", tmp_path / "images", None)


async def test_blob_of_another_image_and_its_annotation(tmp_path: Path) -> None:
    image = make_image(tmp_path / "build")
    await publish(image, tmp_path / "dictionary")
    source = f"oci:{tmp_path / 'dictionary'}:v1"
    first, second = image.blobs
    shared = BlobFile(first.blob_id, first.size_bytes, None, first.meta, source)
    result = await publish(ImageFiles(image.bootstrap, (shared, second)), tmp_path / "layout")
    assert result.blobs_uploaded == 2
    manifest = json.loads(blob_path(tmp_path / "layout", result.digest).read_bytes())
    ids = manifest["layers"][-1]["annotations"]["containerd.io/snapshot/nydus-reference-blob-ids"]
    assert json.loads(ids) == [first.blob_id]
    assert [layer["digest"] for layer in manifest["layers"][:-1]] == [
        f"sha256:{blob.blob_id}" for blob in image.blobs
    ]


async def test_tables_come_from_the_blobs_where_the_layer_has_none(tmp_path: Path) -> None:
    blobs = [make_blob(10_000, 0, 1), make_blob(20_000, 1, 2)]
    image = write_image(tmp_path / "build", blobs)
    result = await publish(image, tmp_path / "layout")
    without = await publish(ImageFiles(image.bootstrap, ()), tmp_path / "layout", "layer")
    manifest = json.loads(blob_path(tmp_path / "layout", result.digest).read_bytes())
    layer = json.loads(blob_path(tmp_path / "layout", without.digest).read_bytes())["layers"][-1]
    manifest["layers"][-1] = layer
    altered = json.dumps(manifest).encode()
    rewrite_tag(tmp_path / "layout", altered)
    metadata = await fetch(tmp_path / "layout", tmp_path / "images")
    assert metadata.digest == digest_of(altered)
    for blob in blobs:
        assert metadata.blob_meta_path(blob.entry.blob_id).read_bytes() == blob.table


def rewrite_tag(layout: Path, manifest: bytes) -> None:
    """Makes `manifest` the one that the layout's first entry names."""
    blob_path(layout, digest_of(manifest)).write_bytes(manifest)
    index = json.loads((layout / "index.json").read_bytes())
    index["manifests"][0] |= {"digest": digest_of(manifest), "size": len(manifest)}
    (layout / "index.json").write_text(json.dumps(index))


async def test_ordinary_image_in_an_index(tmp_path: Path) -> None:
    await publish(make_image(tmp_path / "build"), tmp_path / "layout")
    layer = {
        "mediaType": "application/vnd.oci.image.layer.v1.tar",
        "digest": "sha256:" + "1" * 64,
        "size": 1,
    }
    config = layer | {"mediaType": "application/vnd.oci.image.config.v1+json"}
    plain = json.dumps({"schemaVersion": 2, "config": config, "layers": [layer]}).encode()
    blob_path(tmp_path / "layout", digest_of(plain)).write_bytes(plain)
    entry = {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": digest_of(plain),
        "size": len(plain),
    }
    rewrite_tag(tmp_path / "layout", json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode())
    with pytest.raises(NotNydusImage, match="an ordinary container image of 1 layers"):
        await fetch(tmp_path / "layout", tmp_path / "images")


async def broken(layout: Path, tmp_path: Path) -> BackendError:
    with pytest.raises(BackendError) as caught:
        await fetch(layout, tmp_path / "images")
    images = tmp_path / "images"
    assert not images.exists() or list(images.iterdir()) == []
    return caught.value


async def test_directory_that_is_missing(tmp_path: Path) -> None:
    assert isinstance(await broken(tmp_path / "missing", tmp_path), BlobNotFound)


async def test_directory_that_is_no_layout(tmp_path: Path) -> None:
    error = await broken(tmp_path, tmp_path)
    assert isinstance(error, LayoutBroken)
    assert str(error) == f"oci:{tmp_path}:v1: not an OCI layout: no oci-layout file in it"


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("oci-layout", b"{", "broken oci-layout file"),
        ("oci-layout", b'{"imageLayoutVersion":"2.0.0"}', "layout version 2.0.0, not 1.x"),
        ("index.json", b"\xff", "broken index.json"),
        ("index.json", b'{"schemaVersion":2,"manifests":[{"mediaType":"x"}]}', "broken index.json"),
        (
            "index.json",
            b'{"schemaVersion":2,"manifests":[{"mediaType":"x","digest":"sha256:../../x","size":1}]}',
            "not a sha256 digest",
        ),
        ("index.json", bytes(5 << 20), "larger than"),
    ],
)
async def test_broken_files(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    await publish(make_image(tmp_path / "build"), tmp_path / "layout")
    (tmp_path / "layout" / name).write_bytes(content)
    error = await broken(tmp_path / "layout", tmp_path)
    assert isinstance(error, LayoutBroken)
    assert why in str(error)


async def test_altered_manifest(tmp_path: Path) -> None:
    result = await publish(make_image(tmp_path / "build"), tmp_path / "layout")
    path = blob_path(tmp_path / "layout", result.digest)
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    assert isinstance(await broken(tmp_path / "layout", tmp_path), DigestMismatch)


async def test_missing_manifest_and_missing_layer(tmp_path: Path) -> None:
    result = await publish(make_image(tmp_path / "build"), tmp_path / "layout")
    path = blob_path(tmp_path / "layout", result.digest)
    manifest = path.read_bytes()
    blob_path(tmp_path / "layout", json.loads(manifest)["layers"][-1]["digest"]).unlink()
    assert isinstance(await broken(tmp_path / "layout", tmp_path), BlobNotFound)
    path.unlink()
    error = await broken(tmp_path / "layout", tmp_path)
    assert isinstance(error, LayoutBroken)
    assert "No such file or directory" in str(error)


async def test_altered_and_truncated_layer(tmp_path: Path) -> None:
    result = await publish(make_image(tmp_path / "build"), tmp_path / "layout")
    manifest = json.loads(blob_path(tmp_path / "layout", result.digest).read_bytes())
    layer = blob_path(tmp_path / "layout", manifest["layers"][-1]["digest"])
    data = layer.read_bytes()
    layer.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    assert isinstance(await broken(tmp_path / "layout", tmp_path), DigestMismatch)
    os.truncate(layer, len(data) - 1)
    assert (await broken(tmp_path / "layout", tmp_path)).exit_code == 32


async def test_layout_is_not_made_over_something_else(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("a page of a site")
    with pytest.raises(LayoutBroken, match=r"has index\.json but no oci-layout"):
        await publish(make_image(tmp_path / "build"), tmp_path)
    assert (tmp_path / "index.json").read_text() == "a page of a site"


async def test_failure_before_the_last_step_shows_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever step the disk fills up at, the tag keeps what it had."""
    old = await publish(make_image(tmp_path / "1"), tmp_path / "layout")
    image = make_image(tmp_path / "2", seed=2)
    replace, steps = os.replace, 0

    def failing_replace(source: str, target: str) -> None:
        nonlocal steps
        if steps == fail_at:
            raise OSError(28, "No space left on device")
        steps += 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing_replace)
    fail_at = 0
    while True:
        steps = 0
        try:
            await publish(image, tmp_path / "layout")
            break
        except DiskFull:
            fail_at += 1
        metadata = await fetch(tmp_path / "layout", tmp_path / "images")
        assert metadata.digest == old.digest
    assert fail_at >= 1
    assert (await fetch(tmp_path / "layout", tmp_path / "images")).digest != old.digest
