"""Answers a request for a blob: which bytes, whether this host serves them, and then the body."""

import math
import secrets
from collections.abc import Sequence

import trio

from backend.peers.arrival import all_asked_for, wait_for_bytes
from backend.peers.body import BodySender
from backend.peers.http_heads import Asked, Header, Heads
from backend.peers.ranges import (
    Body,
    RangesRefused,
    content_range,
    merge_ranges,
    multipart_body,
    parse_ranges,
    single_body,
)
from backend.peers.refusal import Refusal, Refused
from backend.peers.served import Admit, BlobRequest, Busy, Paused, Redirect, ServedFile
from backend.peers.site import Site
from backend.peers.transport import Transport
from rafs.errors import NydusError

RETRY_AFTER_S = 1
PAUSED_RETRY_S = 5
PAUSED = b"nydus-paused"
"""It is no fault and no matter of a moment: somebody has switched sending off."""
RETRY_AFTER_MS = b"nydus-retry-after-ms"
"""For those who know it: a second, the least that Retry-After can tell, is long."""


async def answer_blob(
    asked: Asked, request: BlobRequest, transport: Transport, heads: Heads, site: Site
) -> None:
    """Answers `asked`, of which `request` is a part.

    Raises `Refused` while nothing was sent, `Dropped` when the connection cannot be used any more.
    """
    file = await _open(request, site)
    etag = b'"sha256:%s"' % request.blob_id.encode()
    if _matches(asked.headers.get(b"if-none-match"), etag):
        await transport.send(heads.answer(304, [(b"etag", etag)]))
        return
    ranges = _wanted(asked, file.size_bytes, etag, site.options.ranges_max)
    status, headers, body = _plan(ranges, file)
    headers += [
        (b"content-length", b"%d" % body.length),
        (b"accept-ranges", b"bytes"),
        (b"etag", etag),
    ]
    if request.kind != "decoded":
        headers.append((b"docker-content-digest", b"sha256:%s" % request.blob_id.encode()))
    _check_presence(file, request, body)
    if request.kind != "decoded" and body.spans:
        # A registry's client believes a head: it must not hear of a blob that will not be whole.
        await _wait_for_first_byte(file, request, body, transport, site)
    if asked.method == "HEAD" or not body.spans:
        await transport.send(heads.answer(status, headers))
        return
    offset, end = body.spans[0].offset, body.spans[-1].end
    _ask_admission(request, offset, end, site)
    sender = BodySender(file, request, transport, site)
    try:
        with all_asked_for(file, body.spans, site.nursery):
            await _wait_for_first_byte(file, request, body, transport, site)
            await sender.send(heads.answer(status, headers), body)
    finally:
        site.admission.done(request, offset, end, sender.sent_bytes)


async def _open(request: BlobRequest, site: Site) -> ServedFile:
    try:
        with trio.fail_after(site.options.first_byte_timeout_s):
            file = await site.shelf.open(request)
    except (NydusError, trio.TooSlowError) as error:
        raise _unavailable(str(error) or "not found in time") from error
    if file is None:
        raise Refused(404, Refusal.NOT_HERE, "no such blob here")
    return file


def _matches(header: bytes | None, etag: bytes) -> bool:
    if header is None:
        return False
    tags = [tag.strip().removeprefix(b"W/") for tag in header.split(b",")]
    return etag in tags or tags == [b"*"]


def _wanted(asked: Asked, size_bytes: int, etag: bytes, ranges_max: int) -> list[tuple[int, int]] | None:
    """The ranges to send, merged; None for all of the file."""
    header = asked.headers.get(b"range")
    if header is None or asked.headers.get(b"if-range", etag) != etag:
        return None
    try:
        ranges = parse_ranges(header, size_bytes, ranges_max)
    except RangesRefused as error:
        bounds = (b"content-range", b"bytes */%d" % size_bytes)
        raise Refused(416, Refusal.RANGE, str(error), (bounds,)) from error
    return merge_ranges(ranges) if ranges else None


def _plan(ranges: Sequence[tuple[int, int]] | None, file: ServedFile) -> tuple[int, list[Header], Body]:
    size_bytes = file.size_bytes
    if ranges is None:
        return 200, [(b"content-type", file.media_type)], single_body(0, size_bytes)
    if len(ranges) == 1:
        offset, end = ranges[0]
        bounds = (b"content-range", content_range(offset, end, size_bytes))
        return 206, [(b"content-type", file.media_type), bounds], single_body(offset, end)
    boundary = secrets.token_hex(16).encode()
    kind = (b"content-type", b"multipart/byteranges; boundary=%s" % boundary)
    return 206, [kind], multipart_body(ranges, size_bytes, boundary)


def _check_presence(file: ServedFile, request: BlobRequest, body: Body) -> None:
    """Refuses what is neither here nor on its way here, unless the client says that we are to fetch it.

    A registry's client goes to its next mirror after a 404. A peer learns with 409 that the blob is here and
    the range is not.
    """
    if request.may_fetch:
        return
    for span in body.spans:
        ready = file.ready_until(span.offset, span.end)
        if ready < span.end and not file.is_arriving(ready, span.end):
            raise _absent(request, f"bytes from {ready} are not here")


def _ask_admission(request: BlobRequest, offset: int, end: int, site: Site) -> None:
    match site.admission.admit(request, offset, end):
        case Admit():
            return
        case Redirect(url):
            location = (b"location", url.encode("ascii", "strict"))
            raise Refused(307, Refusal.REDIRECTED, "another host has it", (location,))
        case Paused():
            headers = ((b"retry-after", b"%d" % PAUSED_RETRY_S), (PAUSED, b"1"))
            raise Refused(503, Refusal.PAUSED, "this host sends nothing at the moment", headers)
        case Busy(seconds):
            retry = (b"retry-after", b"%d" % max(1, math.ceil(seconds)))
            soon = (RETRY_AFTER_MS, b"%d" % max(1, math.ceil(1000 * seconds)))
            raise Refused(429, Refusal.BUSY, "busy", (retry, soon))


def _absent(request: BlobRequest, text: str) -> Refused:
    return Refused(409 if request.kind == "decoded" else 404, Refusal.NOT_HERE, text)


async def _wait_for_first_byte(
    file: ServedFile, request: BlobRequest, body: Body, transport: Transport, site: Site
) -> None:
    """While there is no head yet, a client can be told that the bytes will not come."""
    first = body.spans[0]
    ready = file.ready_until(first.offset, first.end)
    # What is here decoded may not be here encoded, and then it is not on its way either: better known now.
    if ready == first.end or (request.kind == "decoded" and ready > first.offset):
        return
    timeout_s = site.options.first_byte_timeout_s
    if await wait_for_bytes(file, ready, first.end, transport, timeout_s) == ready:
        if not request.may_fetch:
            raise _absent(request, "it is not here, or not whole")
        raise _unavailable("the bytes will not come here")


def _unavailable(text: str) -> Refused:
    retry = (b"retry-after", b"%d" % RETRY_AFTER_S)
    return Refused(503, Refusal.UNAVAILABLE, text, (retry,))
