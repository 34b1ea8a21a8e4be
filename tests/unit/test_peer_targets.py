"""What a request to the upload server asks for, and for whom."""

import pytest

from backend.peers.refusal import Refusal, Refused
from backend.peers.served import BlobRequest
from backend.peers.targets import blob_request
from backend.priority import FetchClass

ID = "0123456789abcdef" * 4
DECODED = f"/v1/blobs/{ID}/decoded"
ENCODED = f"/v2/library/app/blobs/sha256:{ID}"


def test_decoded_bytes_by_default_for_prefetch() -> None:
    assert blob_request(DECODED, "", {}, "10.0.0.1") == BlobRequest(
        "decoded", ID, "", None, False, FetchClass.PREFETCH, "10.0.0.1"
    )


def test_encoded_bytes_with_all_that_a_peer_may_say() -> None:
    headers = {b"nydus-image": b"registry.test/app:v1", b"nydus-fetch": b"1", b"nydus-class": b"0"}
    assert blob_request(ENCODED, "ns=docker.io", headers, "host-7") == BlobRequest(
        "encoded",
        ID,
        "library/app",
        "registry.test/app:v1",
        True,
        FetchClass.ON_DEMAND,
        "host-7",
        "docker.io",
    )


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1/blobs/",
        f"/v1/blobs/{ID}",
        f"/v1/blobs/{ID[:-1]}/decoded",
        f"/v1/blobs/{ID.upper()}/decoded",
        f"/v1/blobs/{ID}/decoded/",
        f"/v1/blobs/{ID}/decoded\n",
        f"http://host{DECODED}",
        f"/v2/blobs/sha256:{ID}",
        f"/v2/../blobs/sha256:{ID}",
        f"/v2/a/../b/blobs/sha256:{ID}",
        f"/v2/App/blobs/sha256:{ID}",
        f"/v2/{'a' * 256}/blobs/sha256:{ID}",
        f"/v2/app/blobs/sha512:{ID}",
        "/v2/app/manifests/latest",
    ],
)
def test_other_targets_are_unknown(path: str) -> None:
    with pytest.raises(Refused) as refused:
        blob_request(path, "", {}, "10.0.0.1")
    assert (refused.value.status, refused.value.refusal) == (404, Refusal.TARGET)


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("", {b"nydus-class": b"4"}),
        ("", {b"nydus-class": b"01"}),
        ("", {b"nydus-class": b""}),
        ("", {b"nydus-class": b"-1"}),
        ("", {b"nydus-image": b"a" * 1025}),
        ("", {b"nydus-image": b"a\xff"}),
        ("", {b"nydus-image": b"a\tb"}),
        ("ns=" + "a" * 256, {}),
        ("ns=%0d%0aSet-Cookie", {}),
        ("&".join(["ns=a"] * 9), {}),
    ],
)
def test_malformed_headers_are_refused(query: str, headers: dict[bytes, bytes]) -> None:
    with pytest.raises(Refused) as refused:
        blob_request(ENCODED, query, headers, "10.0.0.1")
    assert (refused.value.status, refused.value.refusal) == (400, Refusal.HEADER)
