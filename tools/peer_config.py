"""How this host takes part in the peer cache: from a TOML file, and flags, which come first."""

import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import msgspec
import typer

from backend.keep_mode import KeepEncoded
from backend.peers.limit_settings import LimitInvalid
from fuse.agent.peer_options import PeerOptions
from fuse.supervisor.launch import python_command
from rafs.errors import NydusError
from tools.limit_options import section_limits
from tools.scheduler_url import check_scheduler_urls
from tools.settings import Settings

CREDENTIALS_SOCKET = "credentials.sock"
"""In the run directory: where a snapshotter answers for credentials."""
DEFAULT_FILE = Path("/etc/nydus-py/config.toml")
ConfigOption = Annotated[
    Path | None, typer.Option(help="TOML file.  [default: /etc/nydus-py/config.toml, if there is one]")
]


class ConfigInvalid(NydusError):
    """A configuration file that cannot be used."""

    message = "{path}: {why}"
    exit_code: ClassVar[int] = 222


class PeerSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[peers]` of the file; every key but `host_id` is also a flag of `nydus-py agent`."""

    scheduler: list[str] = []
    zone: str = ""
    labels: dict[str, str] = {}
    peer_listen: str = ":8771"
    host_id: str = ""
    pki: str = ""
    keep_encoded: KeepEncoded = KeepEncoded.AUTO


class CredentialSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[credentials]` of the file: where the snapshotter takes registry credentials from, beside auth files.

    `kube_api` and `service_account_dir` are for pull secrets from outside of a pod.
    """

    cri_listen: str = ""
    containerd: str = "/run/containerd/containerd.sock"
    provider_config: str = ""
    provider_bin_dir: str = ""
    pull_secrets: bool = False
    pull_secret_namespaces: list[str] = []
    kube_api: str = ""
    service_account_dir: str = ""


class ConfigFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file. `limits` as `tools.limit_options` reads them; what is not known is a slip of the pen.

    `metrics_listen`: where scrapers are answered, besides the socket.
    """

    peers: PeerSection = PeerSection()
    credentials: CredentialSection = CredentialSection()
    limits: dict[str, int | str] = {}
    metrics_listen: str = ""


def config_path(chosen: Path | None = None) -> Path | None:
    """The file to read: the one chosen, NYDUS_PY_CONFIG, or /etc/nydus-py/config.toml if there is one."""
    if chosen is not None:
        return chosen
    if named := os.environ.get("NYDUS_PY_CONFIG"):
        return Path(named)
    return DEFAULT_FILE if DEFAULT_FILE.exists() else None


def read_config(path: Path | None) -> ConfigFile:
    """What the file says. Raises `ConfigInvalid`."""
    if path is None:
        return ConfigFile()
    try:
        file = msgspec.convert(tomllib.loads(path.read_text()), ConfigFile)
        section_limits(file.limits)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigInvalid(path=path, why=str(error)) from error
    except LimitInvalid as error:
        raise ConfigInvalid(path=path, why=f"[limits]: {error}") from error
    return file


def peer_options(settings: Settings, section: PeerSection) -> PeerOptions | None:
    """What the agent is told; None when no scheduler is named. Raises `SchedulerUrlInvalid`."""
    if not section.scheduler:
        return None
    check_scheduler_urls(section.scheduler)
    pki = os.path.abspath(section.pki) if section.pki else None
    return PeerOptions(
        schedulers=section.scheduler,
        cache_dir=os.fspath(settings.cache_dir),
        upload_command=[
            *python_command("tools.upload_process"),
            "--log-level",
            settings.log_level.value,
            *(["--pki", pki] if pki else []),
        ],
        zone=section.zone,
        labels=section.labels,
        listen=section.peer_listen,
        host_id=section.host_id,
        plain_http=True if settings.plain_http else None,
        ca_file=os.fspath(settings.ca_file) if settings.ca_file else None,
        insecure=settings.insecure_skip_verify,
        pki=pki,
        keep_encoded=section.keep_encoded,
        credentials_socket=os.fspath(settings.run_dir / CREDENTIALS_SOCKET),
    )


def parse_labels(texts: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` each. Raises `ConfigInvalid`."""
    labels: dict[str, str] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise ConfigInvalid(path="--label", why=f"{text!r} is not NAME=VALUE")
        labels[name] = value
    return labels
