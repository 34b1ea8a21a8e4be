"""Several sources of credentials, and the socket through which an agent asks them."""

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from backend.credential_chain import REFUSED_S, CredentialChain, LookedUp
from backend.credential_helper import CredentialsUnusable
from backend.credential_service import CredentialServiceSilent, CredentialSocket, credential_routes
from backend.credentials import Credential, FixedCredential, NoCredentials
from backend.json_api import serve_api
from backend.kube_api import KubeAccess
from fuse.supervisor.listener import listen
from tools.credential_options import credential_options
from tools.peer_config import CREDENTIALS_SOCKET, CredentialSection, PeerSection, peer_options
from tools.settings import make_settings

HOST = "r.example.com"


def credential(user: str) -> Credential:
    return Credential(user, f"word of {user}")


class Several:
    """A source with some credentials, others when asked for fresh ones."""

    def __init__(self, name: str, *users: str, fresh: Sequence[str] | None = None) -> None:
        self.name = name
        self.users: Sequence[str] = users
        self.fresh = fresh
        self.failure: Exception | None = None
        self.asked: list[tuple[str, bool]] = []

    async def candidates(self, host: str, repository: str, *, fresh: bool) -> Sequence[Credential]:
        await trio.lowlevel.checkpoint()
        self.asked.append((repository, fresh))
        if self.failure is not None:
            raise self.failure
        if fresh and self.fresh is not None:
            self.users = self.fresh
        return [credential(user) for user in self.users]


async def test_the_first_source_that_knows_one_wins() -> None:
    fixed = LookedUp("fixed", FixedCredential(HOST, credential("last")))
    chain = CredentialChain([Several("a"), Several("b", "b"), fixed])
    assert await chain.lookup(HOST, "x") == credential("b")
    assert await CredentialChain([Several("a"), fixed]).lookup(HOST, "x") == credential("last")
    assert await CredentialChain([]).lookup(HOST, "x") is None


async def test_a_refused_one_is_passed_over_until_none_is_left() -> None:
    chain = CredentialChain([Several("a", "a1", "a2"), Several("b", "b")])
    seen = [await chain.lookup(HOST, "x")]
    while seen[-1] is not None:
        seen.append(await chain.renewed(HOST, "x", seen[-1]))
    assert seen == [credential("a1"), credential("a2"), credential("b"), None]
    # All were refused: perhaps the registry was wrong.
    assert await chain.lookup(HOST, "x") == credential("a1")


async def test_it_is_passed_over_for_that_repository_and_a_while_alone() -> None:
    now = [0.0]
    chain = CredentialChain([Several("a", "a"), Several("b", "b")], clock=lambda: now[0])
    assert await chain.renewed(HOST, "x", credential("a")) == credential("b")
    assert await chain.lookup(HOST, "x") == credential("b")
    assert await chain.lookup(HOST, "y") == credential("a")
    now[0] += REFUSED_S + 1
    assert await chain.lookup(HOST, "x") == credential("a")


async def test_a_source_whose_credentials_were_all_refused_is_asked_anew() -> None:
    first = Several("a", "old", fresh=["new"])
    chain = CredentialChain([first, Several("b", "b")])
    assert await chain.renewed(HOST, "x", credential("old")) == credential("new")
    assert [fresh for _, fresh in first.asked] == [False, True]


async def test_official_images_of_the_hub_have_one_name() -> None:
    first = Several("a", "a")
    await CredentialChain([first]).lookup("docker.io", "busybox")
    assert first.asked == [("library/busybox", False)]


@pytest.mark.logs_warning
async def test_a_source_that_fails_hides_no_other(caplog: pytest.LogCaptureFixture) -> None:
    first = Several("a", "a")
    first.failure = CredentialsUnusable(where="/helper", why="broken")
    chain = CredentialChain([first, Several("b", "b")])
    for _ in range(3):
        assert await chain.lookup(HOST, "x") == credential("b")
    assert [record.getMessage() for record in caplog.records] == [
        "credentials: a: /helper: no credentials from it: broken; the next source is asked"
    ]
    with pytest.raises(CredentialsUnusable, match="broken"):
        await CredentialChain([first]).lookup(HOST, "x")


@asynccontextmanager
async def served(path: Path, *sources: Several) -> AsyncIterator[None]:
    chain = CredentialChain(sources)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_api, listen(path), credential_routes(chain))
        yield
        nursery.cancel_scope.cancel()
    path.unlink()


async def test_an_agent_asks_over_a_socket(tmp_path: Path) -> None:
    path = tmp_path / "credentials.sock"
    client = CredentialSocket(path, NoCredentials())
    async with served(path, Several("a", "a", "b")):
        assert os.stat(path).st_mode & 0o777 == 0o600
        assert await client.lookup(HOST, "x") == credential("a")
        assert await client.renewed(HOST, "x", credential("a")) == credential("b")
        assert await client.renewed(HOST, "x", credential("b")) is None
    assert [each.name for each in tmp_path.iterdir()] == []


async def test_a_successor_asks_for_itself(tmp_path: Path) -> None:
    path = tmp_path / "credentials.sock"
    async with served(path, Several("a", "a")):
        assert await CredentialSocket(path, NoCredentials()).lookup(HOST, "x") == credential("a")
        assert await CredentialSocket(path, NoCredentials()).lookup(HOST, "x") == credential("a")


@pytest.mark.logs_warning
async def test_what_is_used_while_nobody_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "credentials.sock"
    own = FixedCredential(HOST, credential("own"))
    client = CredentialSocket(path, own)
    async with served(path, Several("a", "a")):
        await client.lookup(HOST, "x")
    assert await client.lookup(HOST, "x") == credential("a")
    assert await client.lookup(HOST, "y") == credential("own")
    assert await client.renewed(HOST, "x", credential("a")) == credential("own")
    assert len(caplog.records) == 1
    assert "word of" not in caplog.text
    with pytest.raises(CredentialServiceSilent) as caught:
        await client.renewed(HOST, "x", credential("own"))
    assert caught.value.retryable
    async with served(path, Several("a", "again")):
        assert await client.lookup(HOST, "x") == credential("again")


def test_images_that_are_opened_for_others_ask_the_same_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NYDUS_PY_RUN_DIR", str(tmp_path))
    settings = make_settings()
    options = peer_options(settings, PeerSection(scheduler=["http://s:8770"]))
    assert options is not None
    assert options.credentials_socket == f"{tmp_path}/{CREDENTIALS_SOCKET}"
    assert credential_options(settings, CredentialSection()).socket == tmp_path / CREDENTIALS_SOCKET


def test_a_service_account_that_is_named_is_taken_in_a_pod_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    section = CredentialSection(pull_secrets=True, service_account_dir=str(tmp_path))
    assert credential_options(make_settings(), section).kube_access == KubeAccess(
        "https://10.0.0.1:443", tmp_path
    )
    usual = CredentialSection(pull_secrets=True)
    assert credential_options(make_settings(), usual).kube_access == KubeAccess("https://10.0.0.1:443")


async def test_a_service_that_need_not_be_there(tmp_path: Path) -> None:
    own = FixedCredential(HOST, credential("own"))
    client = CredentialSocket(tmp_path / "none.sock", own, is_required=False)
    assert await client.lookup(HOST, "x") == credential("own")
    assert await client.lookup("other.example.com", "x") is None


@pytest.mark.logs_warning
async def test_a_service_whose_sources_fail_says_why(tmp_path: Path) -> None:
    path = tmp_path / "credentials.sock"
    broken = Several("a")
    broken.failure = CredentialsUnusable(where="/helper", why="broken")
    async with served(path, broken):
        with pytest.raises(CredentialServiceSilent, match="/helper: no credentials from it: broken"):
            await CredentialSocket(path, NoCredentials()).lookup(HOST, "x")


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n\r\n{", b"not HTTP\r\n\r\n"])
async def test_a_service_that_makes_no_sense(tmp_path: Path, answer: bytes) -> None:
    path = tmp_path / "credentials.sock"

    async def lie(stream: trio.SocketStream) -> None:
        await stream.receive_some(4096)
        await stream.send_all(answer)
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(listen(path)))
        nursery.start_soon(trio.serve_listeners, lie, [listener])
        client = CredentialSocket(path, NoCredentials())
        with pytest.raises(CredentialServiceSilent):
            await client.lookup(HOST, "x")
        nursery.cancel_scope.cancel()
