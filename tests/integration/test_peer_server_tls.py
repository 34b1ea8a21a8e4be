"""The upload server with mutual TLS: who may talk to it, under which name, and that bodies are the same."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trustme

from backend.peers.server_options import ServerOptions
from tests.peer_host import (
    DECODED,
    Client,
    FillingFile,
    Serving,
    client_of,
    random_file,
    request,
    serving,
)

SIZE = (2 << 20) + 777
PEER = "host-7.peers.test"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def server_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


@pytest.fixture
def whole(tmp_path: Path) -> tuple[FillingFile, bytes]:
    return random_file(tmp_path / "blob", SIZE)


def client_context(
    authority: trustme.CA, issuer: trustme.CA | None = None, *, newest: ssl.TLSVersion | None = None
) -> ssl.SSLContext:
    """A client that trusts `authority`, with a certificate of `issuer`."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    if newest is not None:
        context.maximum_version = newest
    if issuer is not None:
        issuer.issue_cert(PEER).configure_cert(context)
    return context


@asynccontextmanager
async def tls_client(server: Serving, context: ssl.SSLContext) -> AsyncIterator[Client]:
    plain = await trio.open_tcp_stream("127.0.0.1", server.port)
    async with trio.SSLStream(plain, context, server_hostname="127.0.0.1") as stream:
        yield Client(stream)
        await trio.aclose_forcefully(stream)


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_bodies_are_the_same_and_the_peer_has_a_name(
    authority: trustme.CA,
    server_context: ssl.SSLContext,
    whole: tuple[FillingFile, bytes],
    newest: ssl.TLSVersion,
) -> None:
    file, content = whole
    context = client_context(authority, authority, newest=newest)
    async with serving(file, ssl_context=server_context) as server, tls_client(server, context) as client:
        assert (await client.get(DECODED)).body == content
        assert (await client.get(DECODED, "Range: bytes=5-99999")).body == content[5:100000]
        parts = await client.get(DECODED, "Range: bytes=0-9,20-29,100000-300000")
        for first, end in [(0, 10), (20, 30), (100000, 300001)]:
            assert b"\r\n\r\n" + content[first:end] + b"\r\n--" in parts.body
        await client.send(request(DECODED, "Range: bytes=0-0") * 3)
        assert [(await client.reply()).body for _ in range(3)] == [content[:1]] * 3
        assert {asked.peer for asked in server.shelf.asked} == {PEER}


async def test_curl_with_a_certificate(
    authority: trustme.CA, server_context: ssl.SSLContext, whole: tuple[FillingFile, bytes], tmp_path: Path
) -> None:
    file, content = whole
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert(PEER).private_key_and_cert_chain_pem.write_to_path(tmp_path / "own.pem")
    trust = ["--cacert", str(tmp_path / "ca.pem"), "--cert", str(tmp_path / "own.pem")]
    async with serving(file, ssl_context=server_context) as server:
        command = ["curl", "-sS", *trust, server.url(DECODED, "https")]
        done = await trio.run_process(command, capture_stdout=True)
        assert done.stdout == content
        assert server.refused == {}


@pytest.mark.parametrize("stranger", [None, trustme.CA()])
async def test_strangers_are_refused(
    authority: trustme.CA,
    server_context: ssl.SSLContext,
    whole: tuple[FillingFile, bytes],
    stranger: trustme.CA | None,
) -> None:
    file, _ = whole
    async with serving(file, ssl_context=server_context) as server:
        context = client_context(authority, stranger)
        with pytest.raises(trio.BrokenResourceError):
            await _get(server, context)
        assert server.refused == {"TLS handshake failed": 1}
        assert (server.counters.requests, server.shelf.asked) == (0, [])


async def _get(server: Serving, context: ssl.SSLContext) -> None:
    async with tls_client(server, context) as client:
        await client.get(DECODED)


@pytest.mark.parametrize("said", [b"", request(DECODED), b"\x16\x03\x01"])
async def test_what_is_no_handshake_has_a_deadline(
    server_context: ssl.SSLContext, whole: tuple[FillingFile, bytes], said: bytes
) -> None:
    file, _ = whole
    options = ServerOptions(head_timeout_s=0.1)
    async with (
        serving(file, ssl_context=server_context, options=options) as server,
        client_of(server) as client,
    ):
        await client.send(said)
        with trio.fail_after(5):
            while "TLS handshake failed" not in server.refused:
                await trio.lowlevel.checkpoint()


async def test_a_torn_body_has_no_goodbye(
    authority: trustme.CA, server_context: ssl.SSLContext, tmp_path: Path
) -> None:
    file, content = random_file(tmp_path / "blob", SIZE, whole=False)
    file.land(0, 100000)
    context = client_context(authority, authority)
    async with serving(file, ssl_context=server_context) as server, tls_client(server, context) as client:
        await client.send(request(DECODED, "Nydus-Fetch: 1"))
        assert (await client.head())[0] == 200
        assert await client.take(100000) == content[:100000]
        file.die()
        with pytest.raises(trio.BrokenResourceError):
            await client.rest()


async def test_a_clean_end_says_goodbye(
    authority: trustme.CA, server_context: ssl.SSLContext, whole: tuple[FillingFile, bytes]
) -> None:
    file, content = whole
    context = client_context(authority, authority)
    async with serving(file, ssl_context=server_context) as server, tls_client(server, context) as client:
        await client.send(request(DECODED, "Connection: close"))
        assert (await client.rest()).endswith(content)


async def test_a_client_that_stops_reading_is_dropped(
    authority: trustme.CA, server_context: ssl.SSLContext, tmp_path: Path
) -> None:
    file, _ = random_file(tmp_path / "blob", 16 << 20)
    options = ServerOptions(slice_timeout_s=0.15)
    context = client_context(authority, authority)
    async with (
        serving(file, ssl_context=server_context, options=options, send_buffer_bytes=65536) as server,
        tls_client(server, context) as client,
    ):
        await client.send(request(DECODED))
        assert (await client.head())[0] == 200
        with trio.fail_after(5):
            while "client stopped reading" not in server.refused:
                await trio.lowlevel.checkpoint()
