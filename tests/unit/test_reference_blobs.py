"""Which blobs a bootstrap layer says came from chunk dictionaries."""

import pytest

from backend.manifest import (
    REFERENCE_BLOBS_ANNOTATION,
    Descriptor,
    ManifestBroken,
    bootstrap_descriptor,
    reference_blob_ids_of,
)

DIGEST = "sha256:" + 64 * "a"


@pytest.mark.parametrize("ids", [(), ("b" * 64,), ("b" * 64, "c" * 64)])
def test_what_was_written_is_read(ids: tuple[str, ...]) -> None:
    assert reference_blob_ids_of(bootstrap_descriptor(DIGEST, 1, ids), "here") == ids


@pytest.mark.parametrize("text", ["", "[", "{}", "[1]", "null", "[" * 100_000, "\ud800"])
def test_anything_else_is_refused(text: str) -> None:
    layer = Descriptor("layer", DIGEST, 1, {REFERENCE_BLOBS_ANNOTATION: text})
    with pytest.raises(ManifestBroken, match="nydus-reference-blob-ids"):
        reference_blob_ids_of(layer, "here")
