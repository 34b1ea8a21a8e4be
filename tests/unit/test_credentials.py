"""Credentials from the files and helpers of docker and podman."""

import base64
import json
import os
from pathlib import Path

import pytest

from backend.credential_helper import CredentialsUnusable
from backend.credentials import AuthFiles, Credential

HOST = "r.example.com:5000"


def auth(user: str, password: str = "pw") -> dict[str, object]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def write(path: Path, config: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))
    return path


def files(home: Path, **environment: str) -> AuthFiles:
    return AuthFiles(environment, home, run_dir=home / "run-containers")


async def user_of(source: AuthFiles, host: str = HOST, repository: str = "a/b") -> str | None:
    credential = await source.lookup(host, repository)
    return credential.username if credential else None


async def test_each_place_in_order(tmp_path: Path) -> None:
    places = {
        tmp_path / "named.json": "first",
        tmp_path / "docker/config.json": "second",
        tmp_path / "run/containers/auth.json": "third",
        tmp_path / "config/containers/auth.json": "fourth",
        tmp_path / ".docker/config.json": "fifth",
    }
    for path, user in places.items():
        write(path, {"auths": {HOST: auth(user)}})
    source = files(
        tmp_path,
        REGISTRY_AUTH_FILE=str(tmp_path / "named.json"),
        DOCKER_CONFIG=str(tmp_path / "docker"),
        XDG_RUNTIME_DIR=str(tmp_path / "run"),
        XDG_CONFIG_HOME=str(tmp_path / "config"),
    )
    for path, user in places.items():
        assert await user_of(source) == user
        path.unlink()
    assert await user_of(source) is None


async def test_podmans_default_place(tmp_path: Path) -> None:
    write(tmp_path / ".config/containers/auth.json", {"auths": {HOST: auth("podman")}})
    assert await user_of(files(tmp_path)) == "podman"


async def test_where_skopeo_logs_root_in(tmp_path: Path) -> None:
    write(tmp_path / f"run-containers/{os.getuid()}/auth.json", {"auths": {HOST: auth("root")}})
    assert await user_of(files(tmp_path)) == "root"
    assert await user_of(files(tmp_path, XDG_RUNTIME_DIR=str(tmp_path / "run"))) is None


async def test_a_file_that_does_not_know_the_registry_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path / ".config/containers/auth.json", {"auths": {"other.example.com": auth("other")}})
    write(tmp_path / ".docker/config.json", {"auths": {HOST: auth("docker")}})
    assert await user_of(files(tmp_path)) == "docker"


async def test_the_most_specific_key_wins(tmp_path: Path) -> None:
    keys = {f"{HOST}/a/b": "repository", f"{HOST}/a": "namespace", HOST: "host"}
    write(tmp_path / ".docker/config.json", {"auths": {key: auth(user) for key, user in keys.items()}})
    source = files(tmp_path)
    assert await user_of(source, repository="a/b") == "repository"
    assert await user_of(source, repository="a/c") == "namespace"
    assert await user_of(source, repository="a/b/c") == "repository"
    assert await user_of(source, repository="ab") == "host"
    assert await user_of(source, host="r.example.com") is None


@pytest.mark.parametrize("host", ["docker.io", "index.docker.io", "registry-1.docker.io"])
@pytest.mark.parametrize(
    "key", ["https://index.docker.io/v1/", "docker.io", "index.docker.io", "registry-1.docker.io"]
)
async def test_the_names_of_docker_hub(tmp_path: Path, host: str, key: str) -> None:
    write(tmp_path / ".docker/config.json", {"auths": {key: auth("hub")}})
    assert await user_of(files(tmp_path), host=host) == "hub"


@pytest.mark.parametrize("key", [f"https://{HOST}", f"https://{HOST}/v1/", f"http://{HOST}/v2/"])
async def test_addresses_as_keys(tmp_path: Path, key: str) -> None:
    write(tmp_path / ".docker/config.json", {"auths": {key: auth("address")}})
    assert await user_of(files(tmp_path)) == "address"


@pytest.mark.parametrize("key", ["https://[x", "https://[x]/v1/", "https://x:port/", "://"])
async def test_a_key_that_is_no_address_is_passed_over(tmp_path: Path, key: str) -> None:
    auths = {key: auth("broken"), f"https://{HOST}/v1/": auth("address")}
    write(tmp_path / ".docker/config.json", {"auths": auths, "credHelpers": {key: "never-asked"}})
    assert await user_of(files(tmp_path)) == "address"


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (auth("bob", "with:colon"), Credential("bob", "with:colon")),
        ({"username": "bob", "password": "x"}, Credential("bob", "x")),
        ({"identitytoken": "t"}, Credential(identity_token="t")),
        ({**auth("bob"), "identitytoken": "t"}, Credential("bob", "pw", "t")),
        ({"registrytoken": "t"}, Credential(registry_token="t")),
        ({"auth": None, "email": "x"}, None),
        ({}, None),
        (None, None),
    ],
)
async def test_what_an_entry_can_hold(tmp_path: Path, entry: object, expected: Credential | None) -> None:
    write(tmp_path / ".docker/config.json", {"auths": {HOST: entry}, "psFormat": "x"})
    assert await files(tmp_path).lookup(HOST, "a/b") == expected


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"auths": 3}',
        json.dumps({"auths": {HOST: {"auth": 5}}}),
        json.dumps({"auths": {HOST: {"auth": "sesame!"}}}),
        json.dumps({"auths": {HOST: {"auth": "sesamé"}}}),
        json.dumps({"auths": {HOST: {"registrytoken": "sesame é"}}}),
        json.dumps({"auths": {HOST: {"registrytoken": "sesame\r\nX: y"}}}),
        '{"auths":' * 20_000,
    ],
)
async def test_an_unusable_file_is_named_and_not_quoted(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / ".docker/config.json", {})
    path.write_text(text)
    with pytest.raises(CredentialsUnusable, match=r"config\.json") as caught:
        await files(tmp_path).lookup(HOST, "a/b")
    assert "sesame" not in str(caught.value)


async def test_an_empty_file_is_no_error(tmp_path: Path) -> None:
    path = write(tmp_path / ".docker/config.json", {})
    path.write_text("\n")
    assert await user_of(files(tmp_path)) is None


async def test_nothing_is_kept_between_lookups(tmp_path: Path) -> None:
    source = files(tmp_path)
    for user in ("old", "new"):
        write(tmp_path / ".docker/config.json", {"auths": {HOST: auth(user)}})
        assert await user_of(source) == user


def test_secrets_are_not_in_reprs() -> None:
    credential = Credential("bob", "sesame", "sesame", "sesame")
    assert "sesame" not in repr(credential)
    assert "bob" in repr(credential)


class Helper:
    """A `docker-credential-fake` on PATH; it writes down what it was asked."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._program = directory / "bin" / "docker-credential-fake"
        self._asked = directory / "asked"
        self._program.parent.mkdir()
        monkeypatch.setenv("PATH", str(self._program.parent), prepend=":")

    def does(self, script: str) -> None:
        self._program.write_text(f'#!/bin/sh\nread -r key\necho "$1 $key" > "{self._asked}"\n{script}\n')
        self._program.chmod(0o755)

    def answers(self, user: str, secret: str = "pw") -> None:
        self.does(f"echo '{json.dumps({'ServerURL': 'x', 'Username': user, 'Secret': secret})}'")

    def asked(self) -> str:
        return self._asked.read_text().strip()


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Helper:
    return Helper(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("config", "host", "key"),
    [
        ({"credHelpers": {HOST: "fake"}}, HOST, HOST),
        ({"credHelpers": {HOST: "fake"}, "auths": {HOST: auth("file")}}, HOST, HOST),
        ({"credsStore": "fake", "auths": {HOST: {}}}, HOST, HOST),
        ({"credsStore": "fake"}, "docker.io", "https://index.docker.io/v1/"),
    ],
)
async def test_a_helper_is_asked(tmp_path: Path, helper: Helper, config: object, host: str, key: str) -> None:
    helper.answers("helped")
    write(tmp_path / ".docker/config.json", config)
    assert await user_of(files(tmp_path), host=host) == "helped"
    assert helper.asked() == f"get {key}"


async def test_a_helper_with_an_identity_token(tmp_path: Path, helper: Helper) -> None:
    helper.answers("<token>", "t")
    write(tmp_path / ".docker/config.json", {"credsStore": "fake"})
    assert await files(tmp_path).lookup(HOST, "a/b") == Credential(identity_token="t")


async def test_a_helper_that_knows_nothing(tmp_path: Path, helper: Helper) -> None:
    helper.does("echo credentials not found in native keychain; exit 1")
    write(tmp_path / ".docker/config.json", {"credHelpers": {HOST: "fake"}, "auths": {HOST: auth("file")}})
    assert await user_of(files(tmp_path)) == "file"


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo sesame; exit 3", "exit code 3"),
        ("echo sesame", "did not print"),
        ("echo sesame; exec sleep 1000", "no answer within"),
    ],
)
async def test_a_helper_that_fails(tmp_path: Path, helper: Helper, script: str, why: str) -> None:
    helper.does(script)
    write(tmp_path / ".docker/config.json", {"credHelpers": {HOST: "fake"}})
    source = AuthFiles({}, tmp_path, helper_timeout_s=0.5 if "sleep" in script else 30, run_dir=tmp_path)
    with pytest.raises(CredentialsUnusable, match=why) as caught:
        await source.lookup(HOST, "a/b")
    assert "docker-credential-fake" in str(caught.value)
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent", "../../bin/sh", "", "a b"])
async def test_a_helper_that_is_not_there(tmp_path: Path, name: str) -> None:
    write(tmp_path / ".docker/config.json", {"credHelpers": {HOST: name}})
    with pytest.raises(CredentialsUnusable, match="docker-credential-"):
        await files(tmp_path).lookup(HOST, "a/b")
