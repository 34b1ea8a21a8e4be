"""The kubelet's `CredentialProviderConfig`: which plugins give credentials for which images.

https://kubernetes.io/docs/reference/config-api/kubelet-config.v1/#kubelet-config-k8s-io-v1-CredentialProviderConfig
"""

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from backend.credential_helper import PROGRAM_NAME, CredentialsUnusable
from backend.go_duration import parse_duration
from backend.image_pattern import matches

CONFIG_VERSIONS = tuple(f"kubelet.config.k8s.io/{version}" for version in ("v1", "v1beta1", "v1alpha1"))
PLUGIN_VERSIONS = tuple(f"credentialprovider.kubelet.k8s.io/{v}" for v in ("v1", "v1beta1", "v1alpha1"))
_LARGEST_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Provider:
    """One plugin. `program` is its path; `cache_s` how long an answer is kept that does not say it itself."""

    program: Path
    patterns: tuple[str, ...]
    cache_s: float
    api_version: str
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict, repr=False)

    def serves(self, host: str, repository: str) -> bool:
        """Whether the plugin is for the repository."""
        return any(matches(pattern, host, repository) for pattern in self.patterns)


class _Variable(msgspec.Struct):
    name: str
    value: str = ""


class _Provider(msgspec.Struct, rename="camel"):
    name: str
    match_images: list[str]
    default_cache_duration: str
    api_version: str
    args: list[str] | None = None
    env: list[_Variable] | None = None
    token_attributes: dict[str, object] | None = None


class _Config(msgspec.Struct, rename="camel"):
    api_version: str
    kind: str
    providers: list[_Provider]


def read_providers(path: Path, plugin_dir: Path) -> tuple[Provider, ...]:
    """The plugins of a configuration file (YAML or JSON). Raises `CredentialsUnusable`."""
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE_BYTES + 1)
    except OSError as error:
        raise CredentialsUnusable(where=path, why=(error.strerror or "unreadable").lower()) from error
    if len(data) > _LARGEST_FILE_BYTES:
        raise CredentialsUnusable(where=path, why=f"larger than {_LARGEST_FILE_BYTES} bytes")
    try:
        config = msgspec.yaml.decode(data, type=_Config)
        if config.kind != "CredentialProviderConfig" or config.api_version not in CONFIG_VERSIONS:
            raise ValueError(f"{config.api_version} {config.kind}, not {CONFIG_VERSIONS[0]}")
        return tuple(_provider(each, plugin_dir) for each in config.providers)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise CredentialsUnusable(where=path, why=f"no CredentialProviderConfig: {error}") from None


def _provider(each: _Provider, plugin_dir: Path) -> Provider:
    if not PROGRAM_NAME.fullmatch(each.name):
        raise ValueError(f"provider {each.name!r}: not the name of a program")
    if each.api_version not in PLUGIN_VERSIONS:
        raise ValueError(f"provider {each.name}: apiVersion {each.api_version!r} is not known")
    if not each.match_images:
        raise ValueError(f"provider {each.name}: no matchImages")
    if each.token_attributes is not None:
        # Tokens of a pod's service account: the kubelet alone can ask for them.
        raise ValueError(f"provider {each.name}: tokenAttributes cannot be met outside of the kubelet")
    return Provider(
        plugin_dir / each.name,
        tuple(each.match_images),
        parse_duration(each.default_cache_duration),
        each.api_version,
        tuple(each.args or ()),
        {variable.name: variable.value for variable in each.env or ()},
    )
