"""Challenges and tokens."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import parse_qs

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from backend.auth import Authenticator
from backend.challenge import Challenge, merge_scopes, parse_challenges
from backend.contract import BackendError
from backend.credentials import Credential
from backend.http import HttpClient, HttpOptions, RegistryProtocolError
from backend.origin import PlainHttpRefused
from backend.status import Forbidden, ServerFailed, Unauthorized
from tests.contract.fault_server import Asked, FaultServer, Reply, fault_server

PULL = ("repository:a/b:pull",)
PUSH = ("repository:a/b:pull,push",)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ('Basic realm="x y"', [Challenge("basic", "x y")]),
        ("basic", [Challenge("basic")]),
        (
            'Bearer realm="https://a.example/token",service="s p",scope="repository:a/b:pull,push"',
            [Challenge("bearer", "https://a.example/token", "s p", "repository:a/b:pull,push")],
        ),
        (
            'Bearer realm = "https://a/t" , error="invalid_token", Basic realm="z"',
            [Challenge("bearer", "https://a/t"), Challenge("basic", "z")],
        ),
        ('Negotiate, Basic realm="z"', [Challenge("negotiate"), Challenge("basic", "z")]),
        (r'Bearer realm="a\"b"', [Challenge("bearer", 'a"b')]),
        ("Bearer realm=https://a/t,service=s", [Challenge("bearer", "https://a/t", "s")]),
        ("", []),
        ("=,=", []),
        ("Basic " + "x" * 9000, []),
    ],
)
def test_challenges(header: str, expected: list[Challenge]) -> None:
    assert list(parse_challenges([header])) == expected


@given(st.text(max_size=200) | st.from_regex(r'(Bearer |Basic |[a-z]+="?|"|,|\\| |=){0,30}', fullmatch=True))
def test_any_header_gives_some_challenges(header: str) -> None:
    for challenge in parse_challenges([header]):
        assert challenge.scheme


def test_scopes_are_merged() -> None:
    assert merge_scopes("repository:a/b:pull", "repository:a/b:push,pull", "registry:catalog:*") == (
        "registry:catalog:*",
        "repository:a/b:pull,push",
    )
    assert merge_scopes("repository:h:5/x:pull repository:a:pull") == (
        "repository:a:pull",
        "repository:h:5/x:pull",
    )
    assert merge_scopes("", "odd") == ("odd",)


class Rotating:
    """Gives the credential of the moment and counts how often it was asked."""

    def __init__(self, credential: Credential | None) -> None:
        self.credential = credential
        self.lookups = 0

    async def lookup(self, host: str, repository: str) -> Credential | None:
        self.lookups += 1
        await trio.lowlevel.checkpoint()
        return self.credential


class Tokens:
    """A token server: numbered tokens, one reply out of turn when there is one."""

    def __init__(self, expires_in: object = 100, name: str = "token") -> None:
        self.count = 0
        self.out_of_turn: list[Reply] = []
        self._expires_in = expires_in
        self._name = name

    def __call__(self, asked: Asked) -> Reply:
        if self.out_of_turn:
            return self.out_of_turn.pop()
        self.count += 1
        value = {self._name: f"t{self.count}", "expires_in": self._expires_in}
        return Reply(body=json.dumps(value).encode(), before=trio.lowlevel.checkpoint)


@pytest.fixture
def clock() -> trio.testing.MockClock:
    """Virtual time, which goes on when told to."""
    return trio.testing.MockClock()


@asynccontextmanager
async def authenticator(credentials: Rotating) -> AsyncIterator[Authenticator]:
    async with HttpClient(HttpOptions()) as http:
        yield Authenticator(http, "r.example.com", "a/b", credentials, lambda url: None)


def bearer(server: FaultServer) -> list[str]:
    return [f'Bearer realm="{server.url}/token?x=1",service="the service",scope="repository:a/b:pull"']


async def test_a_token_is_kept_per_scope_until_it_is_about_to_expire(clock: trio.testing.MockClock) -> None:
    tokens = Tokens()
    async with fault_server(tokens) as server, authenticator(Rotating(Credential("bob", "pw"))) as auth:
        assert await auth.header(PULL) is None
        assert await auth.answer(bearer(server), PULL, None) == "Bearer t1"
        assert await auth.answer(bearer(server), PUSH, None) == "Bearer t2"
        assert await auth.header(PULL) == "Bearer t1"
        assert await auth.header(PUSH) == "Bearer t2"
        clock.jump(89)
        assert await auth.header(PULL) == "Bearer t1"
        clock.jump(1.5)
        assert await auth.header(PULL) == "Bearer t3"
    first, second, third = server.asked
    assert parse_qs(first.query) == {
        "x": ["1"],
        "service": ["the service"],
        "scope": ["repository:a/b:pull"],
        "account": ["bob"],
    }
    assert parse_qs(second.query)["scope"] == ["repository:a/b:pull,push"]
    assert first.headers["authorization"] == third.headers["authorization"] == Credential("bob", "pw").basic()


async def test_a_refused_token_is_renewed_before_its_time(clock: trio.testing.MockClock) -> None:
    async with fault_server(Tokens()) as server, authenticator(Rotating(None)) as auth:
        assert await auth.answer(bearer(server), PULL, None) == "Bearer t1"
        assert await auth.answer(bearer(server), PULL, "Bearer t1") == "Bearer t2"
        assert await auth.answer(bearer(server), PULL, "Bearer t1") == "Bearer t2"
    assert len(server.asked) == 2
    assert "authorization" not in server.asked[0].headers


@pytest.mark.parametrize("expires_in", [None, 0, -5])
async def test_a_token_without_a_life_lives_a_minute(
    clock: trio.testing.MockClock, expires_in: object
) -> None:
    async with (
        fault_server(Tokens(expires_in, "access_token")) as server,
        authenticator(Rotating(None)) as auth,
    ):
        await auth.answer(bearer(server), PULL, None)
        clock.jump(49)
        assert await auth.header(PULL) == "Bearer t1"
        clock.jump(2)
        assert await auth.header(PULL) == "Bearer t2"


async def test_tasks_refused_together_ask_once() -> None:
    tokens = Tokens()
    async with fault_server(tokens) as server, authenticator(Rotating(None)) as auth:
        got: list[str] = []

        async def one() -> None:
            got.append(await auth.answer(bearer(server), PULL, None))

        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(one)
        assert got == ["Bearer t1"] * 50


async def test_tasks_that_fail_together_ask_once() -> None:
    async with fault_server(lambda asked: Reply(500)) as server, authenticator(Rotating(None)) as auth:
        failed: list[BackendError] = []

        async def one() -> None:
            try:
                await auth.answer(bearer(server), PULL, None)
            except ServerFailed as error:
                failed.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(one)
        assert len(failed) == 20
        assert len({str(error) for error in failed}) == 1
        assert len(server.asked) == 1


async def test_a_cancelled_asker_hands_over() -> None:
    arrived = trio.Event()
    calls: list[Asked] = []

    async def hang() -> None:
        arrived.set()
        await trio.sleep_forever()

    def answer(asked: Asked) -> Reply:
        calls.append(asked)
        return Reply(before=hang) if len(calls) == 1 else Tokens()(asked)

    async with fault_server(answer) as server, authenticator(Rotating(None)) as auth:
        got: list[str] = []

        async def waiter() -> None:
            got.append(await auth.answer(bearer(server), PULL, None))

        async with trio.open_nursery() as nursery, trio.open_nursery() as first:
            first.start_soon(waiter)
            await arrived.wait()
            nursery.start_soon(waiter)
            await trio.testing.wait_all_tasks_blocked()
            first.cancel_scope.cancel()
        assert got == ["Bearer t1"]


async def test_an_identity_token_is_posted() -> None:
    credentials = Rotating(Credential(identity_token="refresh me"))
    async with fault_server(Tokens(name="access_token")) as server, authenticator(credentials) as auth:
        assert await auth.answer(bearer(server), PUSH, None) == "Bearer t1"
    (asked,) = server.asked
    assert asked.method == "POST"
    assert parse_qs(asked.body.decode()) == {
        "grant_type": ["refresh_token"],
        "refresh_token": ["refresh me"],
        "service": ["the service"],
        "client_id": ["nydus-py"],
        "scope": ["repository:a/b:pull,push"],
    }


async def test_a_ready_token_is_sent_as_it_is() -> None:
    async with authenticator(Rotating(Credential(registry_token="ready"))) as auth:
        assert await auth.answer(['Bearer realm="http://127.0.0.1:1/"'], PULL, None) == "Bearer ready"


async def test_a_rotated_password_is_found_when_the_old_one_is_refused() -> None:
    credentials = Rotating(Credential("bob", "old"))
    async with authenticator(credentials) as auth:
        old = await auth.answer(["Basic"], PULL, None)
        assert old == Credential("bob", "old").basic()
        assert await auth.header(PULL) == old
        assert credentials.lookups == 1
        credentials.credential = Credential("bob", "new")
        assert await auth.answer(["Basic"], PULL, old) == Credential("bob", "new").basic()
        with pytest.raises(Unauthorized, match="refused the credentials"):
            await auth.answer(["Basic"], PULL, Credential("bob", "new").basic())


async def test_bearer_is_preferred() -> None:
    async with fault_server(Tokens()) as server, authenticator(Rotating(Credential("bob", "pw"))) as auth:
        assert await auth.answer(["Basic realm=x", *bearer(server)], PULL, None) == "Bearer t1"


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        (Reply(401), Unauthorized, "stored credentials were refused"),
        (Reply(400), Unauthorized, "stored credentials were refused"),
        (Reply(403), Forbidden, "forbids"),
        (Reply(500), ServerFailed, "500"),
        (Reply(302, (("Location", "http://127.0.0.1:1/"),)), RegistryProtocolError, "302"),
        (Reply(body=b"<html>"), RegistryProtocolError, "not JSON"),
        (Reply(body=b'{"a":' * 20_000), RegistryProtocolError, "not JSON"),
        (Reply(body=b"{}"), RegistryProtocolError, "usable token"),
        (Reply(body=b'{"token": "a\\r\\nb"}'), RegistryProtocolError, "usable token"),
        (Reply(body=b'{"token": "' + b"x" * 300_000 + b'"}'), RegistryProtocolError, "more than"),
    ],
)
async def test_token_servers_that_fail(reply: Reply, error: type[BackendError], words: str) -> None:
    credentials = Rotating(Credential("bob", "sesame"))
    async with fault_server(lambda asked: reply) as server, authenticator(credentials) as auth:
        with pytest.raises(error, match=words) as caught:
            await auth.answer(bearer(server), PULL, None)
        assert "sesame" not in str(caught.value)


async def test_no_challenge_that_can_be_met() -> None:
    async with authenticator(Rotating(None)) as auth:
        for challenges in ([], ["Negotiate"], ["Bearer service=x"]):
            with pytest.raises(RegistryProtocolError, match="challenge"):
                await auth.answer(challenges, PULL, None)
        with pytest.raises(Unauthorized, match="none is stored"):
            await auth.answer(["Basic"], PULL, None)


@pytest.mark.parametrize("realm", ["https://[bad", "http://t.example:port/", "http://t.example:99999/"])
@pytest.mark.parametrize("credential", [None, Credential(identity_token="refresh me")])
async def test_a_realm_that_is_no_address(realm: str, credential: Credential | None) -> None:
    async with authenticator(Rotating(credential)) as auth:
        with pytest.raises(RegistryProtocolError, match="address that cannot be read"):
            await auth.answer([f'Bearer realm="{realm}"'], PULL, None)


async def test_passwords_do_not_go_to_another_machine_in_the_clear() -> None:
    def refuse(url: str) -> None:
        raise PlainHttpRefused(where=url)

    async with HttpClient(HttpOptions()) as http:
        auth = Authenticator(http, "r.example.com", "a/b", Rotating(Credential("bob", "pw")), refuse)
        with pytest.raises(PlainHttpRefused):
            await auth.answer(['Bearer realm="http://tokens.example/"'], PULL, None)


class Renewing(Rotating):
    """Has several credentials and goes on to the next one when it is told of a refusal."""

    def __init__(self, *users: str) -> None:
        super().__init__(Credential(users[0], "pw"))
        self.left = [Credential(user, "pw") for user in users[1:]]

    async def renewed(self, host: str, repository: str, refused: Credential) -> Credential | None:
        await trio.lowlevel.checkpoint()
        if refused == self.credential:
            self.credential = self.left.pop(0) if self.left else None
        return self.credential


async def test_a_registry_that_refuses_a_password_is_shown_the_next_one() -> None:
    async with authenticator(Renewing("old", "new")) as auth:
        first = await auth.answer(["Basic realm=x"], PULL, None)
        assert first == Credential("old", "pw").basic()
        second = await auth.answer(["Basic realm=x"], PULL, first)
        assert second == Credential("new", "pw").basic()
        assert await auth.header(PULL) == second
        with pytest.raises(Unauthorized):
            await auth.answer(["Basic realm=x"], PULL, second)


async def test_a_token_server_that_refuses_a_password_is_shown_the_next_one() -> None:
    def answer(asked: Asked) -> Reply:
        if asked.headers.get("authorization") == Credential("third", "pw").basic():
            return Reply(body=b'{"token": "t"}')
        return Reply(401)

    async with fault_server(answer) as server, authenticator(Renewing("first", "second", "third")) as auth:
        assert await auth.answer(bearer(server), PULL, None) == "Bearer t"
        assert len(server.asked) == 3
    async with fault_server(answer) as server, authenticator(Renewing("first", "second")) as auth:
        with pytest.raises(Unauthorized):
            await auth.answer(bearer(server), PULL, None)
        assert len(server.asked) == 2


async def test_a_token_that_has_expired_says_nothing_about_the_password() -> None:
    source = Renewing("only", "another")
    async with fault_server(Tokens()) as server, authenticator(source) as auth:
        token = await auth.answer(bearer(server), PULL, None)
        await auth.answer(bearer(server), PULL, token)
        assert source.credential == Credential("only", "pw")
