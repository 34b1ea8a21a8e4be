"""What a registry says becomes of an image: variants that are found, and claims that are not believed."""

import json
from pathlib import Path
from typing import Any

import pytest

from backend.manifest import (
    NYDUS_ARTIFACT,
    OCI_INDEX,
    OCI_MANIFEST,
    ManifestBroken,
)
from backend.ocidigest import digest_of
from backend.reference import RegistryReference, parse_reference
from backend.registry import RegistryClient, RegistryOptions
from backend.registry_store import RegistryStore
from fuse.snapshotter.layer_labels import PulledImage
from fuse.snapshotter.pull_plan import LayersMismatch, PullPlanner, chain_ids
from fuse.snapshotter.variants import VariantPlaces
from tests.integration.pod_images import PodImageSet
from tests.oci_images import OCI_CONFIG, Blob

pytestmark = pytest.mark.needs_registry

EVERYWHERE = VariantPlaces.INDEX | VariantPlaces.REFERRERS


def planner(directory: Path, places: VariantPlaces = EVERYWHERE) -> PullPlanner:
    return PullPlanner(RegistryOptions(), directory / "images", places)


def pulled(name: str, digest: str) -> PulledImage:
    reference = parse_reference(name)
    assert isinstance(reference, RegistryReference)
    return PulledImage(reference, digest)


def digest_in(images: PodImageSet, name: str) -> str:
    """The digest of the manifest that containerd takes for a name: the first of an index."""
    repository, _, tag = name.partition("/")[2].rpartition(":")
    document = images.place.get_manifest(repository, tag)
    if "manifests" in document:
        return str(document["manifests"][0]["digest"])
    return images.place.manifest_digest(repository, tag)


async def test_a_variant_is_found_where_it_is_looked_for(pod_images: PodImageSet, tmp_path: Path) -> None:
    index = pulled(pod_images.index, digest_in(pod_images, pod_images.index))
    referrer = pulled(pod_images.referrer, digest_in(pod_images, pod_images.referrer))
    for image, found, not_found in (
        (index, VariantPlaces.INDEX, VariantPlaces.REFERRERS),
        (referrer, VariantPlaces.REFERRERS, VariantPlaces.INDEX),
    ):
        plan = await planner(tmp_path, found).plan(image, is_nydus=False)
        assert plan.image.startswith(f"{image.name.host}/{image.name.repository}@sha256:")
        assert plan.image != str(image.exact)
        assert all(layer.source for layer in plan.layers)
        assert (await planner(tmp_path, not_found).plan(image, is_nydus=False)).image == ""
    plain = pulled(pod_images.plain, digest_in(pod_images, pod_images.plain))
    assert (await planner(tmp_path).plan(plain, is_nydus=False)).image == ""


async def test_nobody_is_asked_when_variants_are_not_wanted(tmp_path: Path) -> None:
    nobody = pulled("127.0.0.1:1/app:v1", "sha256:" + "0" * 64)
    assert (await planner(tmp_path, VariantPlaces.NOWHERE).plan(nobody, is_nydus=False)).layers == ()


async def test_a_nydus_image_is_what_it_says(pod_images: PodImageSet, tmp_path: Path) -> None:
    for name in (pod_images.nydus, pod_images.no_copy):
        image = pulled(name, digest_in(pod_images, name))
        plan = await planner(tmp_path).plan(image, is_nydus=True)
        assert plan.image == str(image.exact)
        assert [layer.chain_id for layer in plan.layers][:1] == [layer.digest for layer in plan.layers][:1]
        assert [bool(layer.blob_id) for layer in plan.layers] == [True] * (len(plan.layers) - 1) + [False]
        # Not local yet: it is fetched to be compared. Then it is.
        await planner(tmp_path).verify_bootstrap(image, plan)
        async with RegistryClient(image.exact) as client:
            store = RegistryStore(image.exact, client, _no_origin)
            await store.fetch_metadata(tmp_path / "images")
        await planner(tmp_path).verify_bootstrap(image, plan)


def _no_origin(text: str) -> Any:
    raise AssertionError(text)


def forged(images: PodImageSet, tag: str, change: Any) -> PulledImage:
    """The Nydus image with another config, or other layers."""
    document = images.place.get_manifest("pods/plain", "nydus")
    config = json.loads(images.place.get_blob("pods/plain", document["config"]["digest"]))
    change(document, config)
    blob = Blob(OCI_CONFIG, json.dumps(config).encode())
    images.place.put_blob("pods/plain", blob.digest, blob.data)
    document["config"] = blob.descriptor()
    data = json.dumps(document).encode()
    images.place.put_manifest("pods/plain", tag, OCI_MANIFEST, data)
    return pulled(images.place.name("pods/plain", tag), digest_of(data))


async def test_layers_that_are_not_what_the_config_says_are_refused(
    pod_images: PodImageSet, tmp_path: Path
) -> None:
    def lie_about_blob(document: Any, config: Any) -> None:
        config["rootfs"]["diff_ids"][0] = "sha256:" + "5" * 64

    def lie_about_bootstrap(document: Any, config: Any) -> None:
        config["rootfs"]["diff_ids"][-1] = "sha256:" + "5" * 64

    def forget_a_layer(document: Any, config: Any) -> None:
        del config["rootfs"]["diff_ids"][0]

    def mix_up_layers(document: Any, config: Any) -> None:
        document["layers"].reverse()
        config["rootfs"]["diff_ids"].reverse()

    with pytest.raises(LayersMismatch, match="says that layer"):
        await planner(tmp_path).plan(forged(pod_images, "lie1", lie_about_blob), is_nydus=True)
    with pytest.raises(ManifestBroken, match="diff IDs"):
        await planner(tmp_path).plan(forged(pod_images, "lie2", forget_a_layer), is_nydus=True)
    with pytest.raises(LayersMismatch, match="not the last"):
        await planner(tmp_path).plan(forged(pod_images, "lie3", mix_up_layers), is_nydus=True)
    image = forged(pod_images, "lie4", lie_about_bootstrap)
    plan = await planner(tmp_path).plan(image, is_nydus=True)
    with pytest.raises(LayersMismatch, match="bootstrap layer unpacks to"):
        await planner(tmp_path).verify_bootstrap(image, plan)


async def test_what_only_claims_to_be_a_variant_is_none(pod_images: PodImageSet, tmp_path: Path) -> None:
    place, repository = pod_images.place, "pods/plain"
    plain = digest_in(pod_images, pod_images.plain)
    size = len(place.get_raw_manifest(repository, plain))
    platform = {"architecture": "amd64", "os": "linux"}
    entries = [
        {"mediaType": OCI_MANIFEST, "digest": plain, "size": size, "platform": platform},
        # For another platform, and one that has no bootstrap.
        {
            "mediaType": OCI_MANIFEST,
            "digest": place.manifest_digest(repository, "nydus"),
            "size": len(place.get_raw_manifest(repository, "nydus")),
            "artifactType": NYDUS_ARTIFACT,
            "platform": {"architecture": "riscv64", "os": "linux"},
        },
        {
            "mediaType": OCI_MANIFEST,
            "digest": plain,
            "size": size,
            "artifactType": NYDUS_ARTIFACT,
            "platform": platform,
        },
    ]
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    place.put_manifest(repository, "mixed", OCI_INDEX, json.dumps(index).encode())
    image = pulled(place.name(repository, "mixed"), plain)
    assert (await planner(tmp_path).plan(image, is_nydus=False)).image == ""
    # A list of referrers that names one which refers to something else.
    other = dict(entries[1], digest=place.manifest_digest(repository, "nydus"))
    listed = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [other]}
    place.put_manifest(repository, plain.replace(":", "-"), OCI_INDEX, json.dumps(listed).encode())
    assert (await planner(tmp_path).plan(image, is_nydus=False)).image == ""


def test_chain_ids_are_those_of_the_specification() -> None:
    first, second = "sha256:" + "1" * 64, "sha256:" + "2" * 64
    assert chain_ids((first, second)) == [first, digest_of(f"{first} {second}".encode())]
