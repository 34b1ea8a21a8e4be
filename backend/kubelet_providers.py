"""Credentials from the kubelet's credential provider plugins: programs that are asked over stdin and stdout.

https://kubernetes.io/docs/reference/config-api/kubelet-credentialprovider.v1/

Concurrency: a plugin runs once at a time; who waits for it takes its answer if that covers the image, too.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import trio

from backend.bounded_process import Finished
from backend.credential_helper import CredentialsUnusable, ask_program
from backend.credentials import Credential
from backend.go_duration import parse_duration
from backend.image_pattern import covering
from backend.kubelet_config import Provider, read_providers

PLUGIN_TIMEOUT_S = 60.0
"""The kubelet's own (pkg/credentialprovider/plugin, execPluginTimeout)."""
ANSWERS_MAX = 1024


class _Auth(msgspec.Struct):
    username: str = ""
    password: str = ""

    def __repr__(self) -> str:
        return f"_Auth({self.username!r}, ...)"


class _Answer(msgspec.Struct, rename="camel"):
    api_version: str
    kind: str
    cache_key_type: str
    cache_duration: str | None = None
    auth: dict[str, _Auth] | None = None


@dataclass(frozen=True, slots=True)
class _Kept:
    asked_at: float
    until: float
    credentials: dict[str, Credential] = field(repr=False)


@dataclass(slots=True)
class _Plugin:
    provider: Provider
    lock: trio.Lock = field(default_factory=trio.Lock)
    kept: dict[tuple[str, str], _Kept] = field(default_factory=dict)


class KubeletProviders:
    """A `CandidateSource`. The configuration is read again when the file has changed."""

    name = "kubelet credential providers"

    def __init__(
        self,
        config: Path,
        plugin_dir: Path,
        *,
        timeout_s: float = PLUGIN_TIMEOUT_S,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self._config = config
        self._plugin_dir = plugin_dir
        self._timeout_s = timeout_s
        self._clock = clock
        self._read: tuple[int, int, int] | None = None
        self._plugins: list[_Plugin] = []
        self._reading = trio.Lock()

    async def candidates(self, host: str, repository: str, *, fresh: bool) -> Sequence[Credential]:
        """Asks each plugin that serves the image; see `CandidateSource`. Raises `CredentialsUnusable`."""
        async with self._reading:
            await self._refresh()
        found: list[Credential] = []
        failure: CredentialsUnusable | None = None
        for plugin in self._plugins:
            if plugin.provider.serves(host, repository):
                try:
                    answers = await self._ask(plugin, host, repository, fresh=fresh)
                except CredentialsUnusable as error:
                    failure = error
                    continue
                found += [credential for _, credential in covering(answers, host, repository)]
        if failure is not None and not found:
            raise failure
        return found

    async def _refresh(self) -> None:
        try:
            state = await trio.to_thread.run_sync(os.stat, self._config)
        except OSError as error:
            raise CredentialsUnusable(where=self._config, why=(error.strerror or "").lower()) from error
        seen = (state.st_mtime_ns, state.st_size, state.st_ino)
        if seen != self._read:
            providers = await trio.to_thread.run_sync(read_providers, self._config, self._plugin_dir)
            self._plugins = [_Plugin(provider) for provider in providers]
            self._read = seen

    async def _ask(
        self, plugin: _Plugin, host: str, repository: str, *, fresh: bool
    ) -> dict[str, Credential]:
        wanted_at = self._clock()
        async with plugin.lock:
            kept = self._kept(plugin, host, repository)
            if kept is not None and (not fresh or kept.asked_at >= wanted_at):
                return kept.credentials
            asked_at = self._clock()
            answer = await self._run(plugin.provider, f"{host}/{repository}")
            credentials = _credentials(answer)
            until = asked_at + _cache_s(answer, plugin.provider)
            key = _cache_key(answer.cache_key_type, host, repository, plugin.provider.program)
            plugin.kept.pop(key, None)
            if until > asked_at:
                plugin.kept[key] = _Kept(asked_at, until, credentials)
                if len(plugin.kept) > ANSWERS_MAX:
                    del plugin.kept[next(iter(plugin.kept))]
            return credentials

    def _kept(self, plugin: _Plugin, host: str, repository: str) -> _Kept | None:
        for key in (("Image", f"{host}/{repository}"), ("Registry", host), ("Global", "")):
            kept = plugin.kept.get(key)
            if kept is not None:
                if self._clock() < kept.until:
                    return kept
                del plugin.kept[key]
        return None

    async def _run(self, provider: Provider, image: str) -> _Answer:
        request = {"apiVersion": provider.api_version, "kind": "CredentialProviderRequest", "image": image}
        command = [os.fspath(provider.program), *provider.arguments]
        environment = {**os.environ, **provider.environment}
        done = await ask_program(command, msgspec.json.encode(request), self._timeout_s, environment)
        return _decoded(provider, done)


def _decoded(provider: Provider, done: Finished) -> _Answer:
    where = provider.program
    if done.returncode != 0:
        raise CredentialsUnusable(where=where, why=f"failed with exit code {done.returncode}")
    try:
        answer = msgspec.json.decode(done.output, type=_Answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # The decoder's own words might quote a password.
        raise CredentialsUnusable(where=where, why="did not print a CredentialProviderResponse") from None
    if answer.kind != "CredentialProviderResponse" or answer.api_version != provider.api_version:
        raise CredentialsUnusable(
            where=where, why=f"did not print a CredentialProviderResponse of {provider.api_version}"
        )
    return answer


def _credentials(answer: _Answer) -> dict[str, Credential]:
    return {
        pattern: Credential(auth.username, auth.password)
        for pattern, auth in (answer.auth or {}).items()
        if auth.username or auth.password
    }


def _cache_s(answer: _Answer, provider: Provider) -> float:
    if answer.cache_duration is None:
        return provider.cache_s
    try:
        return parse_duration(answer.cache_duration)
    except ValueError as error:
        raise CredentialsUnusable(where=provider.program, why=f"cacheDuration: {error}") from None


def _cache_key(kind: str, host: str, repository: str, program: Path) -> tuple[str, str]:
    if kind == "Image":
        return kind, f"{host}/{repository}"
    if kind == "Registry":
        return kind, host
    if kind == "Global":
        return kind, ""
    raise CredentialsUnusable(where=program, why=f"cacheKeyType {kind[:32]!r} is not known")
