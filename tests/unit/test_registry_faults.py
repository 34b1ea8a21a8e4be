"""The registry client against a server that fails in every way, on a clock that jumps."""

import base64
import json
import logging
from dataclasses import replace
from itertools import pairwise

import pytest
import trio
import trio.testing

from backend.contract import BackendError, BlobNotFound, ShortRead
from backend.http import ConnectionFailed, RegistryProtocolError, Stalled
from backend.ocidigest import DigestMismatch
from backend.retry import RetryPolicy
from backend.status import Forbidden, ServerFailed, TooManyRequests, Unauthorized, parse_retry_after
from tests.contract.fault_server import Asked, FaultServer, Reply, fault_server, ranged
from tests.unit.registry_faults import ALICE, CONTENT, DIGEST, PART, connected, read, scripted


@pytest.fixture
def clock() -> trio.testing.MockClock:
    """Virtual time. The threshold is real: bytes on their way through loopback are no reason to jump."""
    return trio.testing.MockClock(autojump_threshold=0.05)


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        (Reply(401), RegistryProtocolError, "challenge"),
        (Reply(401, (("WWW-Authenticate", 'Basic realm="x"'),)), Unauthorized, "log in with"),
        (Reply(403), Forbidden, "rights"),
        (Reply(404), BlobNotFound, "no such blob"),
        (Reply(418), RegistryProtocolError, "unexpected status 418"),
        (Reply(206, (), CONTENT[1000:51_000]), RegistryProtocolError, "without saying which"),
        (
            Reply(206, (("Content-Range", f"bytes 0-49999/{len(CONTENT)}"),), CONTENT[:50_000]),
            RegistryProtocolError,
            "asked for bytes 1000-50999, got 0-49999",
        ),
        (
            Reply(206, (("Content-Range", "bytes 1000-50999/51000"),), CONTENT[1000:51_000]),
            RegistryProtocolError,
            "the blob has 51000 bytes, not 102400",
        ),
        (Reply(200, (("Content-Encoding", "gzip"),), CONTENT), RegistryProtocolError, "encoding"),
    ],
)
async def test_what_is_not_tried_again(reply: Reply, error: type[BackendError], words: str) -> None:
    async with fault_server(lambda asked: reply) as server, connected(server) as client:
        with pytest.raises(error, match=words) as caught:
            await read(client)
        assert type(caught.value) is error
        assert server.host in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (Reply(429), TooManyRequests),
        (Reply(500), ServerFailed),
        (Reply(503, (("Retry-After", "1"),)), ServerFailed),
        (Reply(then="close", length=10), ConnectionFailed),
        (Reply(206, (("Content-Range", f"bytes 1000-50999/{len(CONTENT)}"),), then="stall"), Stalled),
        (Reply(then="drop"), ConnectionFailed),
    ],
)
async def test_what_is_tried_until_the_budget_is_spent(
    clock: trio.testing.MockClock, reply: Reply, error: type[BackendError]
) -> None:
    lasting = replace(reply, length=50_000) if reply.then == "stall" else reply
    retry = RetryPolicy(attempts=3, total_s=1000)
    async with fault_server(lambda asked: lasting) as server, connected(server, retry=retry) as client:
        with pytest.raises(error):
            await read(client)
        assert len(server.asked) == 3


@pytest.mark.parametrize(
    "reply",
    [
        Reply(500),
        Reply(502, body=b"<html>no JSON</html>"),
        Reply(429, (("Retry-After", "7"),)),
        Reply(206, PART, CONTENT[1000:9000], length=50_000, then="reset"),
        Reply(206, PART, CONTENT[1000:9000], length=50_000, then="close"),
        Reply(206, PART, CONTENT[1000:9000], length=50_000, then="stall"),
        Reply(206, PART, b"", length=50_000, then="stall"),
        Reply(206, (("Content-Range", f"bytes 1000-8999/{len(CONTENT)}"),), CONTENT[1000:9000]),
        Reply(before=trio.sleep_forever),
    ],
    ids=["500", "502", "429", "reset", "truncated", "stall", "stall at once", "part", "silence"],
)
async def test_what_works_the_second_time(clock: trio.testing.MockClock, reply: Reply) -> None:
    async with fault_server(scripted(reply, Reply(500))) as server, connected(server) as client:
        assert await read(client) == CONTENT[1000:51_000]
        assert len(server.asked) == 3
        resumed_at = 9000 if reply.body.startswith(CONTENT[1000:9000]) else 1000
        assert server.asked[-1].range == (resumed_at, 50_999)


async def test_pauses_double_and_obey_retry_after(clock: trio.testing.MockClock) -> None:
    times: list[float] = []

    def answer(asked: Asked) -> Reply:
        times.append(trio.current_time())
        wait = (("Retry-After", "5"),) if len(times) == 3 else ()
        return Reply(503, wait) if len(times) < 5 else ranged(asked, CONTENT)

    async with fault_server(answer) as server, connected(server) as client:
        await read(client)
    pauses = [round(later - sooner, 1) for sooner, later in pairwise(times)]
    assert pauses == [0.2, 0.4, 5.0, 1.6]


async def test_a_pause_longer_than_the_budget_is_not_begun(clock: trio.testing.MockClock) -> None:
    began = trio.current_time()
    async with fault_server(lambda asked: Reply(429, (("Retry-After", "600"),))) as server:
        async with connected(server) as client:
            with pytest.raises(TooManyRequests):
                await read(client)
        assert len(server.asked) == 1
    assert trio.current_time() - began < 60


async def test_retry_after_as_a_date(clock: trio.testing.MockClock) -> None:
    headers = (
        ("Date", "Wed, 21 Oct 2026 07:28:00 GMT"),
        ("Retry-After", "Wed, 21 Oct 2026 07:28:09 GMT"),
    )
    async with fault_server(scripted(Reply(503, headers))) as server, connected(server) as client:
        began = trio.current_time()
        await read(client)
    assert trio.current_time() - began >= 9


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (" 7 ", 7.0),
        ("999999999", 3600.0),
        ("Wed, 21 Oct 2026 07:27:00 GMT", 0.0),
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", None),
        ("Mon, 01 Jan 2026 00:00:00 +99999999999999999999", None),
        ("Mon, 01 Jan 2026 00:00:00", None),
        ("soon", None),
        ("", None),
    ],
)
def test_odd_pauses(value: str, expected: float | None) -> None:
    assert parse_retry_after(value, "Wed, 21 Oct 2026 07:28:00 GMT") == expected


async def test_nobody_listens(clock: trio.testing.MockClock) -> None:
    async with fault_server(scripted()) as server:
        host = server.host
    for plain_http in (True, False, None):
        async with connected(FaultServer(host), plain_http=plain_http) as client:
            with pytest.raises(ConnectionFailed, match="connection refused"):
                await client.fetch_manifest("v1")


async def test_a_name_that_does_not_resolve() -> None:
    server = FaultServer("registry.invalid")
    async with connected(server, plain_http=False, retry=RetryPolicy(attempts=1)) as client:
        with pytest.raises(ConnectionFailed, match=r"registry\.invalid.*does not resolve"):
            await client.fetch_manifest("v1")


async def test_a_refused_range_is_not_read() -> None:
    reply = Reply(416, (("Content-Range", f"bytes */{len(CONTENT)}"),), b"short", length=len(CONTENT))
    async with fault_server(lambda asked: reply) as server, connected(server) as client:
        with pytest.raises(ShortRead):
            await read(client)
        assert len(server.asked) == 1


async def test_a_server_without_ranges_is_not_downloaded_for_each_read() -> None:
    size_bytes = 1 << 40
    whole = Reply(length=size_bytes, then="stall")
    async with fault_server(lambda asked: whole) as server, connected(server) as client:
        with pytest.raises(RegistryProtocolError, match="ignores ranges"):
            await client.open_blob(DIGEST, size_bytes).read_range(1 << 30, 10)


@pytest.mark.parametrize("declared", [None, 200_000], ids=["true length", "lying length"])
async def test_content_with_another_digest(declared: int | None, clock: trio.testing.MockClock) -> None:
    reply = Reply(body=CONTENT + b"!", length=declared, then="keep" if declared is None else "close")
    async with fault_server(lambda asked: reply) as server, connected(server) as client:
        with pytest.raises(DigestMismatch if declared is None else ConnectionFailed):
            await client.fetch_blob(DIGEST, 1 << 20)
        with pytest.raises(DigestMismatch if declared is None else ConnectionFailed):
            await client.fetch_manifest(DIGEST)


async def test_a_manifest_that_is_not_what_its_own_header_says() -> None:
    reply = Reply(headers=(("Docker-Content-Digest", DIGEST),), body=b"{}")
    async with fault_server(lambda asked: reply) as server, connected(server) as client:
        with pytest.raises(DigestMismatch, match="manifest"):
            await client.fetch_manifest("v1")


async def test_more_than_the_limit() -> None:
    async with fault_server(lambda asked: Reply(body=CONTENT)) as server, connected(server) as client:
        with pytest.raises(RegistryProtocolError, match="more than the 100 bytes"):
            await client.fetch_blob(DIGEST, 100)
        assert await client.fetch_blob(DIGEST, len(CONTENT)) == CONTENT


async def test_the_registrys_own_words() -> None:
    body = json.dumps({"errors": [{"code": "DENIED", "message": "no\npush\x1b for you"}]}).encode()
    async with fault_server(lambda asked: Reply(403, body=body)) as server, connected(server) as client:
        with pytest.raises(Forbidden, match="DENIED: no push  for you"):
            await client.push_manifest("v1", "application/json", b"{}")


async def test_no_secret_in_logs_errors_or_reprs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    encoded = base64.b64encode(b"alice:open sesame").decode()
    challenge = Reply(401, (("WWW-Authenticate", 'Basic realm="x"'),))
    async with fault_server(lambda asked: challenge) as server, connected(server, ALICE) as client:
        with pytest.raises(Unauthorized) as caught:
            await read(client)
        told = [repr(client), repr(client.open_blob(DIGEST)), repr(ALICE), caplog.text]
        told += [str(caught.value), repr(caught.value), repr(caught.value.fields)]
    assert server.asked[-1].headers["authorization"] == f"Basic {encoded}"
    assert not [text for text in told if "sesame" in text or encoded in text]


async def test_a_client_that_was_closed() -> None:
    async with fault_server(scripted()) as server:
        async with connected(server) as client:
            reader = client.open_blob(DIGEST, len(CONTENT))
        with pytest.raises(BackendError, match="closed"):
            await reader.read_range(0, 5)


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:" + "A" * 64, "../../x", DIGEST + "?x"])
async def test_a_malformed_digest_makes_no_request(digest: str) -> None:
    async with fault_server(scripted()) as server, connected(server) as client:
        with pytest.raises(ValueError, match="digest"):
            client.open_blob(digest)
        with pytest.raises(ValueError, match="digest"):
            await client.blob_size(digest)
        assert not server.asked


@pytest.mark.parametrize("key", ["", "../x", "a/b", "v1?x=1", "sha256:12"])
async def test_a_malformed_tag_makes_no_request(key: str) -> None:
    async with fault_server(scripted()) as server, connected(server) as client:
        with pytest.raises(ValueError, match="tag"):
            await client.fetch_manifest(key)
        with pytest.raises(ValueError, match="tag"):
            await client.push_manifest(key, "application/json", b"{}")
        assert not server.asked


async def test_a_waiting_connection_that_the_server_closed_is_replaced() -> None:
    closing = Reply(206, PART, CONTENT[1000:51_000], then="close")
    async with fault_server(lambda asked: closing) as server, connected(server) as client:
        for _ in range(5):
            assert await read(client) == CONTENT[1000:51_000]


@pytest.mark.parametrize(("random", "pauses"), [(0.0, [1, 2, 4, 5]), (1.0, [0.5, 1, 2, 2.5])])
async def test_the_pauses_of_a_policy(random: float, pauses: list[float]) -> None:
    slept: list[float] = []
    now = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds
        await trio.lowlevel.checkpoint()

    async def fail() -> None:
        await trio.lowlevel.checkpoint()
        raise ConnectionFailed(where="x", why="y")

    policy = RetryPolicy(5, 60.0, 1.0, 5.0, clock=lambda: now, sleep=sleep, random=lambda: random)
    with pytest.raises(ConnectionFailed):
        await policy.run(fail)
    assert slept == pauses


async def test_what_travelled_is_counted() -> None:
    async with fault_server(scripted()) as server, connected(server) as client:
        await read(client)
        assert client.statistics().received_bytes == 50_000
        assert client.statistics().requests == len(server.asked) == 1
