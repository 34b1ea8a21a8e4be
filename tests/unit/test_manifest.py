"""Manifests of Nydus images: what is written, and what is made of what others wrote."""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.manifest import (
    MANIFEST_SIZE_MAX_BYTES,
    OCI_CONFIG,
    Descriptor,
    ImageIndex,
    ImageManifest,
    ManifestBroken,
    NoSuchPlatform,
    NotNydusImage,
    UnsupportedImage,
    blob_descriptor,
    bootstrap_descriptor,
    build_config,
    build_manifest,
    choose_manifests,
    nydus_layers,
    parse_document,
)
from backend.platforms import Platform

WHERE = "registry.example.com/a/b:v1"
A, B, C = "a" * 64, "b" * 64, "c" * 64
AMD64 = Platform("amd64", "linux")
ARM64 = Platform("arm64", "linux")


def manifest_bytes(reference_ids: tuple[str, ...] = ()) -> bytes:
    config = Descriptor(OCI_CONFIG, f"sha256:{C}", 100)
    return build_manifest(
        config, [blob_descriptor(A, 5)], bootstrap_descriptor(f"sha256:{B}", 7, reference_ids)
    )


def parsed(document: object) -> ImageManifest | ImageIndex:
    return parse_document(json.dumps(document).encode(), WHERE)


def changed(**changes: object) -> Any:
    return json.loads(manifest_bytes()) | changes


def index_of(*entries: Mapping[str, object]) -> ImageIndex:
    base = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": f"sha256:{A}", "size": 1}
    document = parsed({"schemaVersion": 2, "manifests": [base | dict(entry) for entry in entries]})
    assert isinstance(document, ImageIndex)
    return document


def test_manifest_is_what_nydus_tools_look_for() -> None:
    assert json.loads(manifest_bytes((A,))) == {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "artifactType": "application/vnd.nydus.image.manifest.v1+json",
        "config": {"mediaType": OCI_CONFIG, "digest": f"sha256:{C}", "size": 100},
        "layers": [
            {
                "mediaType": "application/vnd.oci.image.layer.nydus.blob.v1",
                "digest": f"sha256:{A}",
                "size": 5,
                "annotations": {"containerd.io/snapshot/nydus-blob": "true"},
            },
            {
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": f"sha256:{B}",
                "size": 7,
                "annotations": {
                    "containerd.io/snapshot/nydus-bootstrap": "true",
                    "containerd.io/snapshot/nydus-fs-version": "6",
                    "containerd.io/snapshot/nydus-reference-blob-ids": f'["{A}"]',
                },
            },
        ],
    }


def test_config_is_an_ordinary_one_without_a_date() -> None:
    config = json.loads(build_config(AMD64, [blob_descriptor(A, 5)], f"sha256:{B}"))
    assert config["rootfs"] == {"type": "layers", "diff_ids": [f"sha256:{A}", f"sha256:{B}"]}
    assert [entry["comment"] for entry in config["history"]] == ["Nydus Blob Layer", "Nydus Bootstrap Layer"]
    assert (
        {entry["created"] for entry in config["history"]} == {config["created"]} == {"1970-01-01T00:00:00Z"}
    )
    assert (config["os"], config["architecture"], config["config"]) == ("linux", "amd64", {})


def test_written_manifest_reads_back() -> None:
    document = parse_document(manifest_bytes(), WHERE)
    assert isinstance(document, ImageManifest)
    layers = nydus_layers(document, WHERE)
    assert [blob.hex for blob in layers.blobs] == [A]
    assert layers.bootstrap.digest == f"sha256:{B}"
    assert msgspec.json.encode(document) == manifest_bytes()


def test_unknown_fields_are_ignored() -> None:
    assert isinstance(parsed(changed(future={"deep": [1]})), ImageManifest)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"schemaVersion": 1}, "schema version 1"),
        ({"layers": "none"}, "Expected `array`"),
        ({"manifests": []}, "both manifests and layers"),
        ({"layers": [{"mediaType": "x", "digest": "sha256:../../etc", "size": 1}]}, "not a sha256 digest"),
        ({"layers": [{"mediaType": "x", "digest": f"sha512:{A}{A}", "size": 1}]}, "not a sha256 digest"),
        ({"layers": [{"mediaType": "x", "digest": f"sha256:{A}", "size": -1}]}, ">= 0"),
        ({"layers": [{"mediaType": "x", "digest": f"sha256:{A}", "size": 1 << 70}]}, "size"),
        (
            {"layers": [{"mediaType": "x", "digest": f"sha256:{A}", "size": 1}] * 1024},
            "entries, more than 1024",
        ),
    ],
)
def test_manifest_that_cannot_be_true(changes: dict[str, object], why: str) -> None:
    with pytest.raises(ManifestBroken, match=why) as caught:
        parsed(changed(**changes))
    assert str(caught.value).startswith(f"{WHERE}: broken manifest: ")


def test_manifest_too_large() -> None:
    with pytest.raises(ManifestBroken, match="more than 4194304"):
        parse_document(b" " * (MANIFEST_SIZE_MAX_BYTES + 1), WHERE)


def test_deep_nesting_is_an_error_and_no_crash() -> None:
    with pytest.raises(ManifestBroken):
        parse_document(b'{"layers":[],"x":' + b"[" * 1_000_000, WHERE)


@given(at=st.integers(0, len(manifest_bytes()) - 1), bit=st.integers(0, 7))
def test_flipped_bits_and_truncation_give_typed_errors(at: int, bit: int) -> None:
    data = bytearray(manifest_bytes())
    data[at] ^= 1 << bit
    for altered in (bytes(data), manifest_bytes()[:at]):
        with suppress(ManifestBroken, NotNydusImage, UnsupportedImage):
            document = parse_document(altered, WHERE)
            if isinstance(document, ImageManifest):
                nydus_layers(document, WHERE)


def test_ordinary_image_is_named_with_the_way_out() -> None:
    layer = {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": f"sha256:{A}", "size": 1}
    document = parsed(changed(layers=[layer, layer], artifactType=""))
    assert isinstance(document, ImageManifest)
    with pytest.raises(NotNydusImage, match=r"an ordinary container image of 2 layers.*nydus-py build"):
        nydus_layers(document, WHERE)


def test_other_artifact_is_named() -> None:
    document = parsed(changed(layers=[], artifactType="application/vnd.cncf.helm.chart"))
    assert isinstance(document, ImageManifest)
    with pytest.raises(NotNydusImage, match=r"an artifact of type application/vnd\.cncf\.helm\.chart"):
        nydus_layers(document, WHERE)


def with_bootstrap(**changes: object) -> ImageManifest:
    document = changed()
    document["layers"][-1] |= changes
    manifest = parsed(document)
    assert isinstance(manifest, ImageManifest)
    return manifest


def test_old_rafs_version_is_refused() -> None:
    annotations = {
        "containerd.io/snapshot/nydus-bootstrap": "true",
        "containerd.io/snapshot/nydus-fs-version": "5",
    }
    with pytest.raises(UnsupportedImage, match="RAFS version 5"):
        nydus_layers(with_bootstrap(annotations=annotations), WHERE)


def test_docker_layer_type_of_older_nydusify_is_read() -> None:
    manifest = with_bootstrap(mediaType="application/vnd.docker.image.rootfs.diff.tar.gzip")
    assert nydus_layers(manifest, WHERE).bootstrap.hex == B


def test_unknown_compression_of_the_bootstrap_is_refused() -> None:
    with pytest.raises(UnsupportedImage, match=r"tar\+zstd"):
        nydus_layers(with_bootstrap(mediaType="application/vnd.oci.image.layer.v1.tar+zstd"), WHERE)


def test_text_of_others_does_not_reach_the_terminal_as_it_is() -> None:
    manifest = with_bootstrap(mediaType="\x1b[2Jspoof\nline")
    with pytest.raises(UnsupportedImage) as caught:
        nydus_layers(manifest, WHERE)
    assert str(caught.value).isprintable()


def test_index_gives_the_labelled_image_of_the_platform() -> None:
    plain = {"digest": f"sha256:{A}", "platform": {"os": "linux", "architecture": "amd64"}}
    nydus = {
        "digest": f"sha256:{B}",
        "platform": {"os": "linux", "architecture": "amd64", "os.features": ["nydus.remoteimage.v1"]},
    }
    other = {
        "digest": f"sha256:{C}",
        "platform": {"os": "linux", "architecture": "arm64"},
        "artifactType": "application/vnd.nydus.image.manifest.v1+json",
    }
    index = index_of(plain, nydus, other)
    assert [entry.hex for entry in choose_manifests(index, AMD64, WHERE)] == [B]
    assert [entry.hex for entry in choose_manifests(index, ARM64, WHERE)] == [C]
    assert [entry.hex for entry in choose_manifests(index_of(plain), AMD64, WHERE)] == [A]


def test_index_gives_the_best_variant_first_and_those_that_only_mount_last() -> None:
    arm = [
        {
            "digest": f"sha256:{digest}",
            "platform": {"os": "linux", "architecture": "arm", "variant": variant},
        }
        for digest, variant in ((A, "v8"), (B, "v6"), (C, "v7"))
    ]
    wanted = Platform("arm", "linux", "v7")
    assert [entry.hex for entry in choose_manifests(index_of(*arm), wanted, WHERE)] == [C, B, A]


def test_index_without_the_platform_says_what_it_has() -> None:
    index = index_of({"platform": {"os": "linux", "architecture": "arm64", "variant": "v8"}})
    with pytest.raises(NoSuchPlatform, match="for linux/amd64 in this index; it has linux/arm64/v8"):
        choose_manifests(index, AMD64, WHERE)
