"""What can be asked of an upload server: the targets of requests, and the headers that say for whom."""

import re
from collections.abc import Collection, Mapping
from typing import Literal
from urllib.parse import parse_qs, urlsplit

from backend.peers.refusal import Refusal, Refused
from backend.peers.served import BlobRequest
from backend.priority import FetchClass
from backend.reference import is_repository

HEALTHY = "/healthy"
REGISTRY_PROBES = ("/v2/", "/v2")
"""How clients find out that this is a registry: OCI distribution spec, "Determining support"."""

IMAGE_HEADER = b"nydus-image"
FETCH_HEADER = b"nydus-fetch"
PEER_HEADER = b"nydus-peer"
CLASS_HEADER = b"nydus-class"
REFERENCE_MAX = 1024
URL_MAX = 255
NAMESPACE_MAX = 255

_DECODED = re.compile(r"/v1/blobs/([0-9a-f]{64})/decoded")
_ENCODED = re.compile(r"/v2/(.{1,255})/(blobs|manifests)/sha256:([0-9a-f]{64})")


def blob_request(
    path: str,
    query: str,
    headers: Mapping[bytes, bytes],
    peer: str,
    addresses: Collection[str] = (),
) -> BlobRequest:
    """What a request asks for. Raises `Refused` for targets and headers that are none of ours.

    `addresses` are those in the certificate of `peer`, without one `peer` is its address.
    """
    reference = _text(headers.get(IMAGE_HEADER), REFERENCE_MAX) or None
    may_fetch = headers.get(FETCH_HEADER) == b"1"
    fetch_class = _fetch_class(headers.get(CLASS_HEADER))
    url = _own_url(headers.get(PEER_HEADER), addresses or (peer,))
    if match := _DECODED.fullmatch(path):
        return BlobRequest("decoded", match[1], "", reference, may_fetch, fetch_class, peer, "", url)
    match = _ENCODED.fullmatch(path)
    if match is None or not is_repository(match[1]):
        raise Refused(404, Refusal.TARGET, "no such resource")
    namespace = _namespace(query)
    kind: Literal["encoded", "manifest"] = "encoded" if match[2] == "blobs" else "manifest"
    return BlobRequest(kind, match[3], match[1], reference, may_fetch, fetch_class, peer, namespace, url)


def _own_url(value: bytes | None, addresses: Collection[str]) -> str:
    """Others may be sent there: so it has to be the address that the client has itself."""
    url = _text(value, URL_MAX)
    if not url:
        return ""
    try:
        parts = urlsplit(url)
        is_own = (
            parts.scheme in ("http", "https")
            and (parts.hostname or "") in addresses
            and parts.port is not None
        )
    except ValueError:
        is_own = False
    return url if is_own and not parts.path.strip("/") and not parts.query else ""


def _fetch_class(value: bytes | None) -> FetchClass:
    if value is None:
        return FetchClass.PREFETCH
    if len(value) != 1 or value not in b"0123":
        raise Refused(400, Refusal.HEADER, "Nydus-Class is a digit from 0 to 3")
    return FetchClass(int(value))


def _namespace(query: str) -> str:
    if not query:
        return ""
    try:
        name = parse_qs(query, max_num_fields=8).get("ns", [""])[0]
    except ValueError:
        raise Refused(400, Refusal.HEADER, "too many fields in the query") from None
    return _text(name.encode(), NAMESPACE_MAX)


def _text(value: bytes | None, characters_max: int) -> str:
    if value is None:
        return ""
    if len(value) > characters_max or not value.isascii() or not value.decode().isprintable():
        raise Refused(400, Refusal.HEADER, f"not printable ASCII, or longer than {characters_max}")
    return value.decode()
