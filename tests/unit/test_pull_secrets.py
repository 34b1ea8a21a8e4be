"""Pull secrets, from an API server that answers as it is told."""

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs

import pytest
import trio

from backend.credentials import Credential
from backend.kube_api import KubeAccess, KubeApiFailed
from backend.pull_secrets import FIRST_PAUSE_S, PullSecrets
from tests.contract.fault_server import Asked, FaultServer, Reply, fault_server

HOST = "r.example.com"


def secret(name: str, user: str, key: str = HOST, *, legacy: bool = False) -> dict[str, object]:
    auths = {key: {"auth": base64.b64encode(f"{user}:pw".encode()).decode()}}
    text = json.dumps(auths if legacy else {"auths": auths}).encode()
    entry = ".dockercfg" if legacy else ".dockerconfigjson"
    return {
        "metadata": {"name": name, "namespace": "default", "resourceVersion": "7"},
        "data": {entry: base64.b64encode(text).decode()},
    }


class Api:
    """The secrets there are, and the events that a watch begins with; a watch then stays open."""

    def __init__(self, account: Path) -> None:
        self.account = account
        account.mkdir()
        self.token("first")
        self.secrets: list[dict[str, object]] = []
        self.legacy: list[dict[str, object]] = []
        self.events: list[dict[str, object]] = []
        self.watch_then = "stall"
        self.refuse: Reply | None = None
        self.pages = 1
        self.watched = trio.Event()

    def token(self, text: str) -> None:
        (self.account / "token").write_text(text + "\n")

    def answer(self, asked: Asked) -> Reply:
        query = {key: values[0] for key, values in parse_qs(asked.query).items()}
        if self.refuse is not None:
            return self.refuse
        is_legacy = query["fieldSelector"] == "type=kubernetes.io/dockercfg"
        if "watch" in query:
            return self._watch(is_legacy)
        items = self.legacy if is_legacy else self.secrets
        page = int(query.get("continue", "0"))
        share = items[page :: self.pages]
        metadata = {"resourceVersion": "5"}
        if page + 1 < self.pages:
            metadata["continue"] = str(page + 1)
        return Reply(body=json.dumps({"items": share, "metadata": metadata}).encode())

    def _watch(self, is_legacy: bool) -> Reply:
        self.watched.set()
        events = [] if is_legacy else self.events
        self.events = self.events if is_legacy else []
        body = "".join(json.dumps(event) + "\n" for event in events).encode()
        return Reply(body=body, length=len(body) + 1, then="stall" if is_legacy else self.watch_then)


@pytest.fixture
def api(tmp_path: Path) -> Api:
    return Api(tmp_path / "account")


@asynccontextmanager
async def running(api: Api, *namespaces: str) -> AsyncIterator[tuple[PullSecrets, FaultServer]]:
    async with fault_server(api.answer) as server, trio.open_nursery() as nursery:
        source = PullSecrets(KubeAccess(server.url, api.account), namespaces)
        nursery.start_soon(source.run)
        yield source, server
        nursery.cancel_scope.cancel()


async def users(source: PullSecrets, *, fresh: bool = False, repository: str = "a/b") -> list[str]:
    return [each.username for each in await source.candidates(HOST, repository, fresh=fresh)]


async def until(source: PullSecrets, expected: list[str]) -> None:
    with trio.fail_after(20):
        while await users(source) != expected:  # noqa: ASYNC110 # the source tells nobody
            await trio.sleep(0.01)


async def test_both_types_in_every_namespace(api: Api) -> None:
    api.secrets = [secret("one", "new"), secret("two", "other", "other.example.com")]
    api.legacy = [secret("old", "legacy", legacy=True)]
    async with running(api) as (source, server):
        assert await users(source) == ["legacy", "new"]
        asked = server.asked[0]
        assert asked.path == "/api/v1/secrets"
        assert asked.headers["authorization"] == "Bearer first"
        assert "pw" not in repr(source)
        assert (await source.candidates(HOST, "a", fresh=False))[0] == Credential("legacy", "pw")


async def test_only_the_namespaces_that_are_named(api: Api) -> None:
    api.secrets = [secret("one", "new")]
    async with running(api, "team-a", "team-b") as (source, server):
        assert await users(source) == ["new"]
        paths = {asked.path for asked in server.asked if "watch" not in asked.query}
        assert paths == {"/api/v1/namespaces/team-a/secrets", "/api/v1/namespaces/team-b/secrets"}


async def test_a_list_in_pages(api: Api) -> None:
    api.pages = 3
    api.secrets = [secret(f"s{number}", f"u{number}") for number in range(5)]
    async with running(api) as (source, _):
        assert sorted(await users(source)) == ["u0", "u1", "u2", "u3", "u4"]


async def test_changes_are_followed(api: Api) -> None:
    api.secrets = [secret("gone", "gone"), secret("kept", "before")]
    api.events = [
        {"type": "ADDED", "object": secret("more", "more", f"{HOST}/a")},
        {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "9"}}},
        {"type": "MODIFIED", "object": secret("kept", "after")},
        {"type": "DELETED", "object": secret("gone", "gone")},
    ]
    async with running(api) as (source, _):
        await until(source, ["more", "after"])
        assert await users(source, repository="b") == ["after"]


async def test_a_watch_that_has_expired_lists_again(api: Api) -> None:
    api.secrets = [secret("one", "before")]
    api.events = [{"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old"}}]
    async with running(api) as (source, _):
        await users(source)
        await api.watched.wait()
        api.secrets = [secret("one", "after")]
        await until(source, ["after"])


async def test_an_api_server_for_which_everything_has_expired_is_not_asked_all_the_time(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    sleep = trio.sleep

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0.001)

    monkeypatch.setattr("backend.pull_secrets.trio.sleep", pause)
    api.refuse = Reply(410, body=b'{"message": "too old"}')
    async with running(api) as (_, server):
        with trio.fail_after(20):
            while len(server.asked) < 10:
                await sleep(0.001)
        # Each of the two lists pauses before it is asked for again.
        assert pauses == [FIRST_PAUSE_S] * len(pauses)
        assert len(pauses) >= len(server.asked) - 2


async def test_one_broken_secret_hides_none(api: Api) -> None:
    broken = secret("broken", "x")
    broken["data"] = {".dockerconfigjson": "!!!"}
    other = secret("other", "x")
    other["data"] = {".dockerconfigjson": base64.b64encode(b"[]").decode()}
    api.secrets = [broken, other, secret("empty", "x") | {"data": None}, secret("good", "good")]
    async with running(api) as (source, _):
        assert await users(source) == ["good"]


@pytest.mark.logs_warning
async def test_the_token_is_read_again(api: Api) -> None:
    api.refuse = Reply(401, body=b'{"message": "Unauthorized"}')
    api.secrets = [secret("one", "user")]
    async with running(api) as (source, server):
        assert await users(source) == []
        api.token("second")
        api.refuse = None
        await until(source, ["user"])
        assert server.asked[-1].headers["authorization"] == "Bearer second"


@pytest.mark.logs_warning
async def test_what_was_known_stays_while_the_api_server_is_away(api: Api) -> None:
    api.secrets = [secret("one", "user")]
    async with running(api) as (source, _):
        await until(source, ["user"])
        api.refuse = Reply(then="drop")
        assert await users(source, fresh=True) == ["user"]


async def test_refused_credentials_make_it_list_again(api: Api) -> None:
    api.secrets = [secret("one", "before")]
    async with running(api) as (source, server):
        assert await users(source) == ["before"]
        api.secrets = [secret("one", "after")]
        assert await users(source) == ["before"]
        await api.watched.wait()
        assert await users(source, fresh=True) == ["after"]
        asked = len(server.asked)
        assert await users(source, fresh=True) == ["after"]
        assert len([each for each in server.asked[asked:] if "watch" not in each.query]) == 0


@pytest.mark.logs_warning
@pytest.mark.parametrize("reply", [Reply(body=b"[]"), Reply(body=b"{"), Reply(403), Reply(then="drop")])
async def test_an_api_server_that_makes_no_sense_costs_nobody_time(api: Api, reply: Reply) -> None:
    api.refuse = reply
    async with running(api) as (source, _):
        assert await users(source) == []


@pytest.mark.logs_warning
async def test_without_a_token_nothing_is_asked(api: Api) -> None:
    (api.account / "token").unlink()
    async with running(api) as (source, server):
        assert await users(source) == []
        assert server.asked == []


def test_outside_of_a_cluster() -> None:
    with pytest.raises(KubeApiFailed, match="API of this pod: KUBERNETES_SERVICE_HOST is not set"):
        KubeAccess.in_cluster({})
    access = KubeAccess.in_cluster({"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"})
    assert access.url == "https://[fd00::1]:443"
