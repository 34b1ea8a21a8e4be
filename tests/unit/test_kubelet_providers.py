"""Credential provider plugins of the kubelet: small scripts stand for them."""

import json
import os
from pathlib import Path

import pytest
import trio

from backend.credential_helper import CredentialsUnusable
from backend.credentials import Credential
from backend.kubelet_config import read_providers
from backend.kubelet_providers import KubeletProviders

API = "credentialprovider.kubelet.k8s.io/v1"
HOST = "r.example.com"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Rig:
    """A configuration with one plugin, which counts its runs in a file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.plugins = root / "plugins"
        self.plugins.mkdir()
        self.clock = Clock()
        self.configure()

    def configure(self, **changes: object) -> None:
        provider = {
            "name": "tell",
            "matchImages": ["*.example.com"],
            "defaultCacheDuration": "10m",
            "apiVersion": API,
            "args": ["get", "it"],
            "env": [{"name": "SEEN", "value": "by the plugin"}],
        }
        # The kubelet's own file is YAML; JSON is YAML as well.
        config = {
            "apiVersion": "kubelet.config.k8s.io/v1",
            "kind": "CredentialProviderConfig",
            "providers": [{**provider, **changes}],
        }
        self.config.write_text(json.dumps(config))

    def script(self, body: str) -> None:
        path = self.plugins / "tell"
        path.write_text(f'#!/bin/sh\necho "$*:$SEEN" >>{self.root}/runs\ncat >>{self.root}/runs\n{body}\n')
        path.chmod(0o755)

    def answers(self, auth: dict[str, tuple[str, str]], **changes: object) -> None:
        answer = {
            "apiVersion": API,
            "kind": "CredentialProviderResponse",
            "cacheKeyType": "Registry",
            "auth": {key: {"username": user, "password": word} for key, (user, word) in auth.items()},
            **changes,
        }
        self.script(f"cat <<'END'\n{json.dumps(answer)}\nEND")

    def runs(self) -> int:
        path = self.root / "runs"
        return path.read_text().count("get it:by the plugin\n") if path.exists() else 0

    def source(self, timeout_s: float = 30.0) -> KubeletProviders:
        return KubeletProviders(self.config, self.plugins, timeout_s=timeout_s, clock=self.clock)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


async def test_a_plugin_is_asked_as_the_kubelet_asks_it(rig: Rig) -> None:
    rig.answers({HOST: ("aws", "secret")})
    assert await rig.source().candidates(HOST, "a/b", fresh=False) == [Credential("aws", "secret")]
    lines = (rig.root / "runs").read_text().splitlines()
    assert lines[0] == "get it:by the plugin"
    assert json.loads(lines[1]) == {
        "apiVersion": API,
        "kind": "CredentialProviderRequest",
        "image": f"{HOST}/a/b",
    }


async def test_only_images_that_it_serves(rig: Rig) -> None:
    rig.answers({"*": ("aws", "secret")})
    assert await rig.source().candidates("registry.other.com", "a", fresh=False) == []
    assert rig.runs() == 0


async def test_the_most_specific_of_its_answers(rig: Rig) -> None:
    rig.answers({"*.example.com": ("all", "1"), f"{HOST}/a": ("a", "2"), "other.com": ("no", "3")})
    found = await rig.source().candidates(HOST, "a/b", fresh=False)
    assert [credential.username for credential in found] == ["a", "all"]


@pytest.mark.parametrize(
    ("kind", "runs"),
    [("Image", (2, 3)), ("Registry", (1, 2)), ("Global", (1, 1))],
)
async def test_answers_are_kept_by_image_registry_or_for_all(
    rig: Rig, kind: str, runs: tuple[int, int]
) -> None:
    rig.answers({"*.example.com": ("aws", "secret")}, cacheKeyType=kind)
    source = rig.source()
    for repository in ("a", "b", "a"):
        await source.candidates(HOST, repository, fresh=False)
    assert rig.runs() == runs[0]
    await source.candidates("other.example.com", "a", fresh=False)
    assert rig.runs() == runs[1]


@pytest.mark.parametrize(("said", "kept_s"), [("5m", 300), (None, 600), ("0", 0)])
async def test_for_as_long_as_it_says_or_the_configuration(rig: Rig, said: str | None, kept_s: float) -> None:
    rig.answers({HOST: ("aws", "secret")}, cacheDuration=said)
    source = rig.source()
    await source.candidates(HOST, "a", fresh=False)
    if kept_s:
        rig.clock.now += kept_s - 1
        await source.candidates(HOST, "a", fresh=False)
        assert rig.runs() == 1
    rig.clock.now += 1
    await source.candidates(HOST, "a", fresh=False)
    assert rig.runs() == 2


async def test_it_is_asked_again_when_its_answer_was_refused(rig: Rig) -> None:
    rig.answers({HOST: ("aws", "old")})
    source = rig.source()
    await source.candidates(HOST, "a", fresh=False)
    rig.answers({HOST: ("aws", "new")})
    rig.clock.now += 2
    assert await source.candidates(HOST, "a", fresh=False) == [Credential("aws", "old")]
    assert await source.candidates(HOST, "a", fresh=True) == [Credential("aws", "new")]


async def test_many_that_ask_together_cost_one_run(rig: Rig) -> None:
    rig.answers({HOST: ("aws", "secret")})
    source = rig.source()
    async with trio.open_nursery() as nursery:
        for number in range(20):

            async def ask(repository: str = f"a/{number}") -> None:
                assert await source.candidates(HOST, repository, fresh=True)

            nursery.start_soon(ask)
    assert rig.runs() == 1


async def test_the_configuration_is_read_again_when_it_changes(rig: Rig) -> None:
    rig.answers({"*": ("aws", "secret"), "*.example.com": ("aws", "secret")})
    source = rig.source()
    assert await source.candidates(HOST, "a", fresh=False)
    rig.configure(matchImages=["another.registry.com"])
    assert not await source.candidates(HOST, "a", fresh=False)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("exit 3", "failed with exit code 3"),
        ('echo \'{"auth": "secret word"}\'', "did not print"),
        ("head -c 2000000 /dev/zero", "printed more than"),
        ("kill -9 $$", "failed with exit code -9"),
    ],
)
async def test_what_a_broken_plugin_does(rig: Rig, body: str, why: str) -> None:
    rig.script(body)
    with pytest.raises(CredentialsUnusable, match=why) as caught:
        await rig.source().candidates(HOST, "a", fresh=False)
    assert "secret word" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [{"cacheKeyType": "Odd"}, {"cacheDuration": "often"}, {"kind": "Other"}, {"apiVersion": "v0"}],
)
async def test_an_answer_that_says_something_else(rig: Rig, changes: dict[str, str]) -> None:
    rig.answers({HOST: ("aws", "secret")}, **changes)
    with pytest.raises(CredentialsUnusable):
        await rig.source().candidates(HOST, "a", fresh=False)


async def test_a_plugin_that_hangs_is_killed_with_its_children(rig: Rig) -> None:
    rig.script(f"sleep 1000 & echo $! >{rig.root}/child; wait")
    noted = rig.root / "child"
    timeout_s = 0.25
    while not (noted.exists() and noted.read_text().endswith("\n")):  # the machine may be busy
        timeout_s *= 2
        with pytest.raises(CredentialsUnusable, match="no answer within"):
            await rig.source(timeout_s=timeout_s).candidates(HOST, "a", fresh=False)
    child = int(noted.read_text())
    with trio.fail_after(10):
        while _is_alive(child):  # noqa: ASYNC110 # nobody tells of its end
            await trio.sleep(0.01)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_a_plugin_that_is_not_there(rig: Rig) -> None:
    with pytest.raises(CredentialsUnusable, match="cannot be started"):
        await rig.source().candidates(HOST, "a", fresh=False)


def test_a_configuration_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("""\
apiVersion: kubelet.config.k8s.io/v1beta1
kind: CredentialProviderConfig
providers:
  - name: ecr-credential-provider
    matchImages:
      - "*.dkr.ecr.*.amazonaws.com"
    defaultCacheDuration: "12h"
    apiVersion: credentialprovider.kubelet.k8s.io/v1
    args: [get-credentials]
    env:
      - name: AWS_PROFILE
        value: example
""")
    (provider,) = read_providers(path, Path("/plugins"))
    assert os.fspath(provider.program) == "/plugins/ecr-credential-provider"
    assert provider.cache_s == 43200
    assert provider.arguments == ("get-credentials",)
    assert provider.environment == {"AWS_PROFILE": "example"}
    assert "example" not in repr(provider)
    assert provider.serves("1234.dkr.ecr.eu-west-1.amazonaws.com", "app")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"name": "../evil"}, "not the name of a program"),
        ({"apiVersion": "v9"}, "is not known"),
        ({"matchImages": []}, "no matchImages"),
        ({"defaultCacheDuration": "soon"}, "not a duration"),
        ({"tokenAttributes": {"serviceAccountTokenAudience": "x"}}, "outside of the kubelet"),
        ({"matchImages": 7}, "no CredentialProviderConfig"),
    ],
)
async def test_what_a_configuration_cannot_say(rig: Rig, changes: dict[str, object], why: str) -> None:
    rig.configure(**changes)
    with pytest.raises(CredentialsUnusable, match=why):
        await rig.source().candidates(HOST, "a", fresh=False)


@pytest.mark.parametrize("text", ["", "a: [", "[]", "kind: Pod", "\x00"])
def test_what_is_no_configuration(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(CredentialsUnusable):
        read_providers(path, tmp_path)
    with pytest.raises(CredentialsUnusable, match="no such file"):
        read_providers(tmp_path / "none", tmp_path)
