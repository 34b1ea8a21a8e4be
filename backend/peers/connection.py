"""One connection of the upload server: request after request, each answered before the next is looked at."""

import logging

import trio

from backend.metrics import CONTENT_TYPE, METRICS_TARGET
from backend.peers.blob_answer import answer_blob
from backend.peers.http_heads import Asked, Header, Heads
from backend.peers.identity import CertificateRefused, addresses_of
from backend.peers.refusal import Dropped, Refusal, Refused
from backend.peers.server_metrics import server_metrics
from backend.peers.site import Site
from backend.peers.targets import HEALTHY, REGISTRY_PROBES, blob_request
from backend.peers.transport import Transport

log = logging.getLogger(__name__)

POLITE = (Refusal.IDLE, Refusal.HEAD_TIMEOUT)
"""Refusals after which nothing of an answer is missing, so the connection need not be reset."""


async def serve_connection(transport: Transport, site: Site) -> None:
    """Serves `transport` and ends it. A fault of ours is logged and costs this connection alone."""
    options = site.options
    heads = Heads(options.head_max_bytes, options.head_timeout_s, options.idle_timeout_s)
    try:
        while (asked := await heads.next_request(transport)) is not None:
            site.counters.requests += 1
            await _exchange(asked, transport, heads, site)
            if not heads.reusable:
                break
            if heads.pipelined:
                await trio.lowlevel.checkpoint()
        await transport.close()
    except Dropped as dropped:
        site.counters.refuse(dropped.refusal)
        await _end(dropped, transport, heads)
    except Exception:
        site.counters.refuse(Refusal.FAULT)
        log.exception("fault while serving %s", transport.peer)
    finally:
        transport.abort()


async def _exchange(asked: Asked, transport: Transport, heads: Heads, site: Site) -> None:
    try:
        if asked.method not in ("GET", "HEAD"):
            raise Refused(405, Refusal.METHOD, "only GET and HEAD", ((b"allow", b"GET, HEAD"),))
        if asked.path == HEALTHY:
            await _send_short(asked, 200, "ok", (), transport, heads)
        elif asked.path == METRICS_TARGET:
            _authorize(transport, site)
            await _send_short(asked, 200, server_metrics(site.counters), (), transport, heads)
        elif asked.path in REGISTRY_PROBES:
            version = (b"docker-distribution-api-version", b"registry/2.0")
            await _send_short(asked, 200, "{}", (version,), transport, heads)
        else:
            addresses = addresses_of(transport.certificate) if transport.certificate else ()
            request = blob_request(asked.path, asked.query, asked.headers, transport.peer, addresses)
            _authorize(transport, site)
            await answer_blob(asked, request, transport, heads, site)
    except Refused as refused:
        site.counters.refuse(refused.refusal)
        await _send_short(asked, refused.status, refused.text, refused.headers, transport, heads)


def _authorize(transport: Transport, site: Site) -> None:
    """For each request: certificates end, and scopes change, while a connection lasts."""
    try:
        site.authorize(transport.certificate)
    except CertificateRefused as error:
        raise Refused(403, Refusal.CERTIFICATE, str(error)) from error


async def _send_short(
    asked: Asked | None,
    status: int,
    text: str,
    headers: tuple[Header, ...],
    transport: Transport,
    heads: Heads,
) -> None:
    body = text.encode("utf-8", "replace").removesuffix(b"\n") + b"\n"
    kind = b"application/json" if body.startswith(b"{") else CONTENT_TYPE.encode()
    shown = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *headers]
    if asked is not None and asked.method == "HEAD":
        body = b""
    await transport.send(heads.answer(status, shown) + body)


async def _end(dropped: Dropped, transport: Transport, heads: Heads) -> None:
    answer = dropped.answer
    if answer is not None:
        try:
            await _send_short(None, answer.status, answer.text, answer.headers, transport, heads)
        except Dropped:
            return
        await transport.close(listen=True)
    elif dropped.refusal in POLITE:
        await transport.close()
