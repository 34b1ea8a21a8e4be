"""Where passwords and tokens come from: the files and helpers of docker and podman.

Nothing here is kept: every lookup reads again, so that a rotated credential is found when the old
one is refused. Secrets stay out of reprs, errors and logs.
"""

import base64
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import msgspec
import trio

from backend.address import split_address
from backend.credential_helper import CredentialsUnusable, HelperAnswer, ask_helper
from backend.origin import HUB_ALIASES, HUB_HOST

_HUB_KEYS = ("https://index.docker.io/v1/", "index.docker.io", HUB_HOST, "registry-1.docker.io")
_LARGEST_FILE_BYTES = 4 << 20

Entry = TypeVar("Entry")


@dataclass(frozen=True, slots=True)
class Credential:
    """What to show a registry: a user and password, or a token. Secrets are not in the repr."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)

    def basic(self) -> str:
        """The value of an Authorization header with user and password."""
        pair = f"{self.username}:{self.password}".encode()
        return "Basic " + base64.b64encode(pair).decode("ascii")


class CredentialSource(Protocol):
    """Finds the credential for a repository. Implementations are safe for concurrent use."""

    async def lookup(self, host: str, repository: str) -> Credential | None:
        """The credential for `host` (with port) and `repository`; None to go without."""
        ...


@runtime_checkable
class RenewingSource(CredentialSource, Protocol):
    """A source that keeps answers, or has several: it must be told which one was refused."""

    async def renewed(self, host: str, repository: str, refused: Credential) -> Credential | None:
        """Another credential than `refused`, which the registry has just not taken; None for none."""
        ...


class NoCredentials:
    """Everything is anonymous."""

    async def lookup(self, host: str, repository: str) -> Credential | None:
        """Always None."""
        await trio.lowlevel.checkpoint()
        return None


@dataclass(frozen=True, slots=True)
class FixedCredential:
    """The same credential for one registry, for instance one given on the command line."""

    host: str
    credential: Credential

    async def lookup(self, host: str, repository: str) -> Credential | None:
        """The credential, when `host` is the registry that it is meant for."""
        await trio.lowlevel.checkpoint()
        return self.credential if host == self.host else None


class _AuthEntry(msgspec.Struct):
    auth: str | None = None
    username: str | None = None
    password: str | None = None
    identitytoken: str | None = None
    registrytoken: str | None = None


class _AuthConfig(msgspec.Struct):
    auths: dict[str, _AuthEntry | None] | None = None
    cred_helpers: dict[str, str] | None = msgspec.field(default=None, name="credHelpers")
    creds_store: str | None = msgspec.field(default=None, name="credsStore")


@dataclass(frozen=True, slots=True)
class AuthFiles:
    """The auth files of docker and podman, in the order of `files`; the first that knows the registry wins.

    `environment` and `home` default to the process's own at the time of each lookup; `run_dir` is where
    podman and skopeo keep the file of root, who has no XDG_RUNTIME_DIR.
    """

    environment: Mapping[str, str] | None = None
    home: Path | None = None
    helper_timeout_s: float = 30.0
    run_dir: Path = Path("/run/containers")

    def files(self) -> Iterator[Path]:
        """What the environment names first, then podman's places, then docker's (containers-auth.json(5))."""
        environment = os.environ if self.environment is None else self.environment
        home = self.home or Path(environment.get("HOME") or os.path.expanduser("~"))
        if named := environment.get("REGISTRY_AUTH_FILE"):
            yield Path(named)
        if named := environment.get("DOCKER_CONFIG"):
            yield Path(named) / "config.json"
        runtime = environment.get("XDG_RUNTIME_DIR")
        yield Path(runtime) / "containers/auth.json" if runtime else self.run_dir / f"{os.getuid()}/auth.json"
        yield Path(environment.get("XDG_CONFIG_HOME") or home / ".config") / "containers/auth.json"
        yield home / ".docker/config.json"

    async def lookup(self, host: str, repository: str) -> Credential | None:
        """Reads the files and asks the helpers now. Raises `CredentialsUnusable`."""
        for path in self.files():
            config = await trio.to_thread.run_sync(_load, path)
            if config is not None:
                credential = await self._from_config(config, path, host, repository)
                if credential is not None:
                    return credential
        return None

    async def _from_config(
        self, config: _AuthConfig, path: Path, host: str, repository: str
    ) -> Credential | None:
        keys = _keys(host, repository)
        helper = _most_specific(config.cred_helpers or {}, keys)
        if helper is not None:
            found = _of_helper(
                await ask_helper(helper[1], _helper_key(helper[0], host), self.helper_timeout_s)
            )
            if found is not None:
                return found
        entry = _most_specific({key: auth for key, auth in (config.auths or {}).items() if auth}, keys)
        if entry is not None and (credential := _of_entry(entry[1], path, entry[0])):
            return credential
        if config.creds_store:
            key = _helper_key(host, host)
            return _of_helper(await ask_helper(config.creds_store, key, self.helper_timeout_s))
        return None


def _load(path: Path) -> _AuthConfig | None:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CredentialsUnusable(where=path, why=(error.strerror or "unreadable").lower()) from error
    if len(data) > _LARGEST_FILE_BYTES:
        raise CredentialsUnusable(where=path, why=f"larger than {_LARGEST_FILE_BYTES} bytes")
    if not data.strip():
        return None
    try:
        return msgspec.json.decode(data, type=_AuthConfig)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # The decoder's own words might quote the content.
        raise CredentialsUnusable(where=path, why="not JSON of the expected form") from None


def decode_auths(data: bytes, where: str, *, is_legacy: bool = False) -> dict[str, Credential]:
    """What the text of a docker config file holds itself, by its keys; `is_legacy` is a `.dockercfg`.

    Helpers that it names are not asked. Raises `CredentialsUnusable`, which names `where`.
    """
    try:
        if is_legacy:
            entries = msgspec.json.decode(data, type=dict[str, _AuthEntry | None])
        else:
            entries = msgspec.json.decode(data, type=_AuthConfig).auths or {}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise CredentialsUnusable(where=where, why="not JSON of the expected form") from None
    found = {key: _of_entry(entry, where, key) for key, entry in entries.items() if entry is not None}
    return {key: credential for key, credential in found.items() if credential is not None}


def _keys(host: str, repository: str) -> list[str]:
    """The keys that may stand for the repository, the most specific first."""
    hosts = _HUB_KEYS if host in HUB_ALIASES else (host,)
    parts = repository.split("/") if repository else []
    paths = ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return [f"{name}/{path}" for path in paths for name in hosts if "://" not in name] + list(hosts)


def _most_specific(entries: Mapping[str, Entry], keys: list[str]) -> tuple[str, Entry] | None:
    for key in keys:
        if key in entries:
            return key, entries[key]
    # Docker also wrote addresses such as https://HOST/v1/ for a whole registry.
    for key, value in entries.items():
        parts = split_address(key) if "://" in key else None
        if parts is not None and parts.netloc in keys:
            return key, value
    return None


def _of_entry(entry: _AuthEntry, path: Path | str, key: str) -> Credential | None:
    username, password = entry.username or "", entry.password or ""
    if entry.auth:
        try:
            pair = base64.b64decode(entry.auth, validate=True).decode()
        except ValueError:  # not ASCII, not base64, or not UTF-8 in it
            raise CredentialsUnusable(where=path, why=f"the 'auth' of {key} is not base64") from None
        username, _, password = pair.partition(":")
        password = password.strip("\0")  # some versions of docker padded it
    registry_token = entry.registrytoken or ""
    if not registry_token.isascii() or not registry_token.isprintable():  # it becomes a header as it is
        raise CredentialsUnusable(where=path, why=f"the 'registrytoken' of {key} cannot be sent")
    credential = Credential(username, password, entry.identitytoken or "", registry_token)
    return credential if credential != Credential() else None


def _helper_key(key: str, host: str) -> str:
    return _HUB_KEYS[0] if host in HUB_ALIASES else key


def _of_helper(answer: HelperAnswer | None) -> Credential | None:
    if answer is None:
        return None
    if answer.username == "<token>":  # docker's mark for an identity token in place of a password
        return Credential(identity_token=answer.secret)
    return Credential(answer.username, answer.secret)
