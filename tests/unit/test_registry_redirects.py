"""Redirects and the choice of a scheme: where credentials may go."""

from collections.abc import Callable

import pytest
import trio
import trio.testing

from backend.address import display_url
from backend.contract import BackendError
from backend.http import ConnectionFailed, RegistryProtocolError, TlsFailed
from backend.ocidigest import digest_of
from backend.origin import PlainHttpRefused, api_host, api_repository, is_loopback, origin_of
from backend.retry import RetryPolicy
from backend.status import Unauthorized
from tests.contract.fault_server import Asked, FaultServer, Reply, fault_server, ranged
from tests.unit.registry_faults import ALICE, BLOB, CONTENT, DIGEST, connected, read, scripted


def basic_then(reply: Callable[[Asked], Reply]) -> Callable[[Asked], Reply]:
    """Wants alice's password first."""

    def answer(asked: Asked) -> Reply:
        if asked.headers.get("authorization") != ALICE.basic():
            return Reply(401, (("WWW-Authenticate", 'Basic realm="x"'),))
        return reply(asked)

    return answer


async def test_a_redirect_keeps_the_range_and_not_the_credentials() -> None:
    async with fault_server(lambda asked: ranged(asked, CONTENT)) as storage:
        location = (("Location", f"{storage.url}/bucket/object?signature=secret"),)
        answer = basic_then(lambda asked: Reply(307, location))
        async with fault_server(answer) as server, connected(server, ALICE) as client:
            reader = client.open_blob(DIGEST, len(CONTENT))
            for offset in (0, 10, 20):
                assert await reader.read_range(offset, 5) == CONTENT[offset : offset + 5]
        assert len(server.asked) == 2  # the challenge and the redirect: then the address was remembered
        assert [asked.range for asked in storage.asked] == [(0, 4), (10, 14), (20, 24)]
        for asked in storage.asked:
            assert "authorization" not in asked.headers
            assert "cookie" not in asked.headers


@pytest.mark.parametrize("expired", [Reply(403), Reply(404), Reply(400)])
async def test_an_expired_address_is_asked_for_again(expired: Reply) -> None:
    answers: list[Reply] = []
    async with fault_server(lambda asked: answers.pop() if answers else ranged(asked, CONTENT)) as storage:
        location = (("Location", f"{storage.url}/object?signature=secret"),)
        async with fault_server(lambda asked: Reply(307, location)) as server, connected(server) as client:
            reader = client.open_blob(DIGEST, len(CONTENT))
            await reader.read_range(0, 5)
            answers.append(expired)
            assert await reader.read_range(0, 5) == CONTENT[:5]
            answers += [expired, expired]  # a fresh address that does not work either
            with pytest.raises(BackendError) as caught:
                await reader.read_range(0, 5)
            assert "secret" not in str(caught.value)
        assert len(server.asked) == 3


async def test_a_challenge_from_elsewhere_gets_no_credentials() -> None:
    challenge = Reply(401, (("WWW-Authenticate", 'Basic realm="x"'),))
    async with fault_server(lambda asked: challenge) as storage:
        location = (("Location", f"{storage.url}/object"),)
        answer = basic_then(lambda asked: Reply(302, location))
        async with fault_server(answer) as server, connected(server, ALICE) as client:
            with pytest.raises(Unauthorized):
                await read(client)
        assert [asked.headers.get("authorization") for asked in storage.asked] == [None]


async def test_a_redirect_loop() -> None:
    redirect = Reply(307, (("Location", BLOB),))
    async with fault_server(lambda asked: redirect) as server, connected(server) as client:
        with pytest.raises(RegistryProtocolError, match="more than 5 times"):
            await read(client)
        assert len(server.asked) == 6


@pytest.mark.parametrize(
    ("location", "error"),
    [
        ("file:///etc/passwd", RegistryProtocolError),
        ("http://storage.example/x", PlainHttpRefused),
        ("http://127.0.0.1:bad/x", RegistryProtocolError),
        ("//", RegistryProtocolError),
        ("http://[::1/", RegistryProtocolError),
        ("http://[bad]/", RegistryProtocolError),
        ("//[", RegistryProtocolError),
        ("http://127.0.0.1:99999/", RegistryProtocolError),
    ],
)
async def test_a_redirect_to_nowhere(location: str, error: type[BackendError]) -> None:
    redirect = Reply(307, (("Location", location),))
    async with fault_server(lambda asked: redirect) as server, connected(server, plain_http=None) as client:
        with pytest.raises(error):
            await read(client)


async def test_plain_http_is_found_on_loopback_once() -> None:
    async with fault_server(scripted(Reply())) as server, connected(server, plain_http=None) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, client)
            nursery.start_soon(read, client)
        assert server.requests() == ["GET /v2/", f"GET {BLOB}", f"GET {BLOB}"]


async def test_plain_http_is_found_where_a_handshake_gets_no_answer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    autojump_clock.autojump_threshold = 0.05

    async def serve(stream: trio.SocketStream) -> None:
        while data := await stream.receive_some():
            if data.startswith((b"GET", b"HEAD")):  # else it waits for the end of a line, as some servers do
                await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n")
                await stream.send_all(b"" if data.startswith(b"HEAD") else b"content")

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        port = listeners[0].socket.getsockname()[1]
        async with connected(FaultServer(f"127.0.0.1:{port}"), plain_http=None) as client:
            assert await client.fetch_blob(digest_of(b"content"), 7) == b"content"
        nursery.cancel_scope.cancel()


async def test_plain_http_is_not_used_when_tls_is_demanded() -> None:
    retry = RetryPolicy(attempts=1)
    async with fault_server(scripted()) as server:
        async with connected(server, plain_http=False, retry=retry) as client:
            with pytest.raises((TlsFailed, ConnectionFailed)):
                await read(client)
        assert not server.asked


@pytest.mark.parametrize("url", ["https://[bad", "https://[bad]/x", "//[", "http://h:port/?secret"])
def test_what_is_no_address_is_shown_without_its_text(url: str) -> None:
    assert display_url(url) == "an address that cannot be read"
    with pytest.raises(RegistryProtocolError, match="cannot be read") as caught:
        origin_of(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost:5000", True),
        ("127.0.0.1", True),
        ("127.9.9.9:1", True),
        ("[::1]:5000", True),
        ("localhost.example.com", False),
        ("127.0.0.1.example.com", False),
        ("10.0.0.1:5000", False),
        ("0.0.0.0", False),
        ("[:::]:5000", False),
        ("[", False),
    ],
)
def test_what_is_this_machine(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("host", "repository", "expected"),
    [
        ("docker.io", "alpine", ("registry-1.docker.io", "library/alpine")),
        ("index.docker.io", "a/b", ("registry-1.docker.io", "a/b")),
        ("r.example.com", "alpine", ("r.example.com", "alpine")),
    ],
)
def test_docker_hub_is_somewhere_else(host: str, repository: str, expected: tuple[str, str]) -> None:
    assert (api_host(host), api_repository(host, repository)) == expected
