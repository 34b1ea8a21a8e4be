"""Images in Debian's docker-registry, published and fetched, and looked at with skopeo."""

import json
from pathlib import Path

import pytest
import trio

from backend.contract import BackendError, BlobNotFound
from backend.credentials import FixedCredential, NoCredentials
from backend.manifest import (
    OCI_INDEX,
    NoSuchPlatform,
    NotNydusImage,
)
from backend.ocidigest import DigestMismatch, digest_of
from backend.platforms import this_platform
from backend.reference import LayoutReference, RegistryReference
from backend.registry import RegistryClient, RegistryOptions
from backend.status import Unauthorized
from backend.store import (
    BlobFile,
    CannotPublish,
    ImageFiles,
    ImageMetadata,
    NoProgress,
    PublishResult,
    open_store,
)
from tests.integration.registry_server import USER, RegistryServer
from tests.sample_image import make_image

pytestmark = pytest.mark.needs_registry

ANONYMOUS = RegistryOptions(credentials=NoCredentials())
PLAIN_TYPE = "application/vnd.oci.image.manifest.v1+json"


def named(server: RegistryServer, repository: str, tag: str = "v1") -> RegistryReference:
    return RegistryReference(server.host, repository, tag)


async def publish(
    image: ImageFiles, reference: RegistryReference, options: RegistryOptions = ANONYMOUS
) -> PublishResult:
    async with open_store(reference, options) as store:
        return await store.publish(image, NoProgress())


async def fetch(
    reference: RegistryReference, images_dir: Path, options: RegistryOptions = ANONYMOUS
) -> ImageMetadata:
    async with open_store(reference, options) as store:
        return await store.fetch_metadata(images_dir)


async def push_manifest(reference: RegistryReference, media_type: str, document: object) -> str:
    async with RegistryClient(reference, ANONYMOUS) as client:
        data = json.dumps(document).encode()
        return await client.push_manifest(reference.tag or digest_of(data), media_type, data)


def assert_same_files(metadata: ImageMetadata, image: ImageFiles) -> None:
    assert metadata.bootstrap_path.read_bytes() == image.bootstrap.read_bytes()
    for blob in image.blobs:
        assert metadata.blob_meta_path(blob.blob_id).read_bytes() == blob.meta.read_bytes()


def stored_file(server: RegistryServer, digest: str) -> Path:
    name = digest.removeprefix("sha256:")
    return server.root / "data/docker/registry/v2/blobs/sha256" / name[:2] / name / "data"


async def test_published_image_comes_back(anonymous_registry: RegistryServer, tmp_path: Path) -> None:
    image = make_image(tmp_path / "build", blob_sizes=(10_000, 20 << 20))
    reference = named(anonymous_registry, "store/round-trip")
    result = await publish(image, reference)
    async with open_store(reference, ANONYMOUS) as store:
        metadata = await store.fetch_metadata(tmp_path / "images")
        assert metadata.digest == result.digest
        assert_same_files(metadata, image)
        blob = image.blobs[1]
        assert blob.path is not None
        reader = store.open_blob(blob.blob_id, blob.size_bytes)
        assert await reader.read_range(12_345_678, 4096) == blob.path.read_bytes()[12_345_678:][:4096]
        await reader.aclose()
    assert not anonymous_registry.begun_uploads("store/round-trip")


async def test_only_what_is_missing_travels(anonymous_registry: RegistryServer, tmp_path: Path) -> None:
    image = make_image(tmp_path / "build", seed=1)
    reference = named(anonymous_registry, "store/again")
    first = await publish(image, reference)
    again = await publish(image, reference)
    assert again == PublishResult(first.digest, 0, 2, 0)


async def test_tag_is_looked_up_and_files_are_used_again(
    anonymous_registry: RegistryServer, tmp_path: Path
) -> None:
    reference = named(anonymous_registry, "store/moving")
    await publish(make_image(tmp_path / "1", seed=2), reference)
    first = await fetch(reference, tmp_path / "images")
    assert await fetch(reference, tmp_path / "images") == first
    moved = await publish(make_image(tmp_path / "2", seed=3), reference)
    assert (await fetch(reference, tmp_path / "images")).digest == moved.digest
    pinned = RegistryReference("127.0.0.1:1", reference.repository, None, first.digest)
    assert await fetch(pinned, tmp_path / "images") == first  # nobody listens there


async def test_many_that_fetch_at_once(anonymous_registry: RegistryServer, tmp_path: Path) -> None:
    reference = named(anonymous_registry, "store/crowd")
    await publish(make_image(tmp_path / "build", seed=4), reference)
    results = set()

    async def fetch_one() -> None:
        results.add(await fetch(reference, tmp_path / "images"))

    async with trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(fetch_one)
    assert len(results) == 1
    assert len(list((tmp_path / "images").iterdir())) == 1


async def test_with_password_and_without(htpasswd_registry: RegistryServer, tmp_path: Path) -> None:
    image, reference = make_image(tmp_path / "build"), named(htpasswd_registry, "store/private")
    options = RegistryOptions(credentials=FixedCredential(htpasswd_registry.host, USER))
    await publish(image, reference, options)
    assert_same_files(await fetch(reference, tmp_path / "images", options), image)
    with pytest.raises(Unauthorized):
        await fetch(reference, tmp_path / "others")


async def test_over_tls(tls_registry: RegistryServer, tmp_path: Path) -> None:
    image, reference = make_image(tmp_path / "build"), named(tls_registry, "store/tls")
    options = RegistryOptions(credentials=NoCredentials(), ca_file=tls_registry.ca_file)
    await publish(image, reference, options)
    assert_same_files(await fetch(reference, tmp_path / "images", options), image)


async def test_blob_of_an_image_in_the_same_registry_is_mounted(
    anonymous_registry: RegistryServer, tmp_path: Path
) -> None:
    image = make_image(tmp_path / "build", seed=5)
    dictionary = named(anonymous_registry, "store/dictionary")
    await publish(image, dictionary)
    first, second = image.blobs
    shared = BlobFile(first.blob_id, first.size_bytes, None, first.meta, str(dictionary))
    reference = named(anonymous_registry, "store/user")
    result = await publish(ImageFiles(image.bootstrap, (shared, second)), reference)
    assert (result.blobs_uploaded, result.blobs_mounted) == (1, 1)
    assert_same_files(await fetch(reference, tmp_path / "images"), image)


async def test_blob_of_an_image_elsewhere_is_streamed(
    anonymous_registry: RegistryServer, tmp_path: Path
) -> None:
    image = make_image(tmp_path / "build", blob_sizes=(20 << 20,), seed=6)
    async with open_store(LayoutReference(tmp_path / "layout", "v1")) as layout:
        await layout.publish(image, NoProgress())
    blob = image.blobs[0]
    shared = BlobFile(blob.blob_id, blob.size_bytes, None, blob.meta, f"oci:{tmp_path / 'layout'}:v1")
    reference = named(anonymous_registry, "store/streamed")
    result = await publish(ImageFiles(image.bootstrap, (shared,)), reference)
    assert (result.blobs_uploaded, result.blobs_mounted) == (1, 0)
    assert digest_of(stored_file(anonymous_registry, f"sha256:{blob.blob_id}").read_bytes()) == (
        f"sha256:{blob.blob_id}"
    )


async def test_failure_shows_no_image(anonymous_registry: RegistryServer, tmp_path: Path) -> None:
    image = make_image(tmp_path / "build", seed=7)
    reference = named(anonymous_registry, "store/broken")
    blob = image.blobs[1]
    assert blob.path is not None
    blob.path.unlink()
    with pytest.raises(BackendError):
        await publish(image, reference)
    with pytest.raises(BlobNotFound):
        await fetch(reference, tmp_path / "images")


async def test_digest_is_no_name_to_publish_under(anonymous_registry: RegistryServer, tmp_path: Path) -> None:
    reference = RegistryReference(anonymous_registry.host, "store/pinned", None, "sha256:" + "0" * 64)
    with pytest.raises(CannotPublish, match="name the image by a tag"):
        await publish(make_image(tmp_path / "build"), reference)


async def test_missing_image(anonymous_registry: RegistryServer, tmp_path: Path) -> None:
    with pytest.raises(BlobNotFound):
        await fetch(named(anonymous_registry, "store/nothing"), tmp_path / "images")


async def test_altered_layer_and_truncated_layer(anonymous_registry: RegistryServer, tmp_path: Path) -> None:
    reference = named(anonymous_registry, "store/altered")
    await publish(make_image(tmp_path / "build", seed=8), reference)
    metadata = await fetch(reference, tmp_path / "good")
    manifest = json.loads((metadata.directory / "manifest.json").read_bytes())
    layer = stored_file(anonymous_registry, manifest["layers"][-1]["digest"])
    data = layer.read_bytes()
    layer.write_bytes(data[:60] + bytes([data[60] ^ 1]) + data[61:])
    with pytest.raises(DigestMismatch) as caught:
        await fetch(reference, tmp_path / "images")
    assert caught.value.exit_code == 40
    assert list((tmp_path / "images").iterdir()) == []


async def test_index_with_an_ordinary_image_beside(
    anonymous_registry: RegistryServer, tmp_path: Path
) -> None:
    reference = named(anonymous_registry, "store/index")
    result = await publish(make_image(tmp_path / "build", seed=9), reference)
    metadata = await fetch(reference, tmp_path / "images")
    manifest = json.loads((metadata.directory / "manifest.json").read_bytes())
    config = manifest["config"]
    document = {
        "schemaVersion": 2,
        "mediaType": PLAIN_TYPE,
        "config": config,
        "layers": manifest["layers"][:1],
    }
    plain = await push_manifest(named(anonymous_registry, "store/index", "plain"), PLAIN_TYPE, document)
    with pytest.raises(NotNydusImage, match="nydus-py build"):
        await fetch(named(anonymous_registry, "store/index", "plain"), tmp_path / "images")
    here = this_platform()
    platform = {"os": here.os, "architecture": here.architecture}
    entries = [
        {"mediaType": PLAIN_TYPE, "digest": plain, "size": len(json.dumps(document)), "platform": platform},
        {
            "mediaType": PLAIN_TYPE,
            "digest": result.digest,
            "size": (metadata.directory / "manifest.json").stat().st_size,
            "platform": platform,
        },
    ]
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    both = named(anonymous_registry, "store/index", "both")
    await push_manifest(both, OCI_INDEX, index)
    assert await fetch(both, tmp_path / "images") == metadata
    for entry in entries:
        entry["platform"] = {"os": "plan9", "architecture": "mips"}
    await push_manifest(both, OCI_INDEX, index)
    with pytest.raises(NoSuchPlatform, match="it has plan9/mips"):
        await fetch(both, tmp_path / "images")


@pytest.mark.needs_skopeo
async def test_skopeo_copies_the_image_there_and_back(
    anonymous_registry: RegistryServer, tmp_path: Path
) -> None:
    image = make_image(tmp_path / "build", seed=10)
    reference = named(anonymous_registry, "store/skopeo")
    result = await publish(image, reference)
    layout = tmp_path / "layout"
    await skopeo("--src-tls-verify=false", f"docker://{reference}", f"oci:{layout}:v1")
    async with open_store(LayoutReference(layout, "v1")) as store:
        metadata = await store.fetch_metadata(tmp_path / "images")
    assert metadata.digest == result.digest
    assert_same_files(metadata, image)
    back = named(anonymous_registry, "store/skopeo-back")
    async with open_store(LayoutReference(tmp_path / "ours", "v2")) as store:
        ours = await store.publish(image, NoProgress())
    await skopeo("--dest-tls-verify=false", f"oci:{tmp_path / 'ours'}:v2", f"docker://{back}")
    assert (await fetch(back, tmp_path / "images")).digest == ours.digest == result.digest


async def skopeo(*arguments: str) -> None:
    await trio.run_process(["skopeo", "copy", "--insecure-policy", *arguments], capture_stdout=True)
