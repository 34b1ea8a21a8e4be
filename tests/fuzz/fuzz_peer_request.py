"""Reads what another host asks for, one thing to a line: target, Range, and the headers that are ours."""

import contextlib

from backend.peers.ranges import RangesRefused, merge_ranges, multipart_body, parse_ranges, slices
from backend.peers.refusal import Refused
from backend.peers.targets import CLASS_HEADER, FETCH_HEADER, IMAGE_HEADER, blob_request

SIZE = 1 << 20
RANGES_MAX = 8
SLICE_MAX = 1 << 16
_ID = b"0123456789abcdef" * 4
SEEDS = (
    b"/v1/blobs/" + _ID + b"/decoded\nbytes=0-4095,8192-12287,-5\nregistry.test/app:v1\n1\n0",
    b"/v2/library/app/blobs/sha256:" + _ID + b"?ns=docker.io\nbytes=4096-\n\n0\n3",
    b"/v2/a/manifests/sha256:" + _ID + b"\n\n\n0\n",
    b"/v2/a/blobs/sha256:" + _ID + b"\nbytes=1048575-1048575,0-0\nx\n1\n2",
)


def exercise(data: bytes) -> None:
    """A request is refused, or it is for a blob and for bytes within it."""
    target, ranges, *others = [*data.split(b"\n"), b"", b""][:5]
    path, _, query = target.decode("latin-1").partition("?")
    headers = dict(zip((IMAGE_HEADER, FETCH_HEADER, CLASS_HEADER), others, strict=False))
    with contextlib.suppress(Refused):
        request = blob_request(path, query, headers, "10.0.0.1")
        assert len(request.blob_id) == 64
        assert (request.kind == "decoded") == (request.repository == "")
    _exercise_ranges(ranges)


def _exercise_ranges(header: bytes) -> None:
    try:
        found = parse_ranges(header, SIZE, RANGES_MAX)
    except RangesRefused:
        return
    if found is None:
        return
    merged = merge_ranges(found)
    assert len(merged) <= len(found) <= RANGES_MAX
    body = multipart_body(merged, SIZE, b"of-a-test")
    batches = list(slices(body.spans, SLICE_MAX, 4096))
    total = sum(span.end - span.offset + len(span.lead) for batch in batches for span in batch)
    assert total + len(body.tail) == body.length
    assert all(0 <= span.offset < span.end <= SIZE for batch in batches for span in batch)


if __name__ == "__main__":
    from tests.fuzz.driver import run

    run("fuzz_peer_request")
