"""Which sources of registry credentials a snapshotter asks: from the file, and flags, which come first."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from backend.kube_api import ACCOUNT_DIR, KubeAccess
from fuse.snapshotter.credential_sources import CredentialOptions
from tools.peer_config import CREDENTIALS_SOCKET, CredentialSection
from tools.settings import Settings

ProviderConfig = Annotated[
    Path | None,
    typer.Option(help="The kubelet's CredentialProviderConfig: its plugins are asked for credentials."),
]
ProviderBinDir = Annotated[Path | None, typer.Option(help="Directory of these plugins.")]
PullSecrets = Annotated[
    bool | None,
    typer.Option(
        "--pull-secrets/--no-pull-secrets",
        help="In a pod: use the pull secrets of the cluster that its service account may read.",
    ),
]
PullSecretNamespace = Annotated[
    list[str] | None, typer.Option(help="Read pull secrets of this namespace only; several.")
]
CriListen = Annotated[
    Path | None,
    typer.Option(
        help="Unix socket for the kubelet's --image-service-endpoint: calls go on to containerd, and the "
        "credentials of pulls are remembered, in memory."
    ),
]
ContainerdSocket = Annotated[
    Path | None,
    typer.Option("--containerd", help="Socket of containerd.  [default: /run/containerd/containerd.sock]"),
]


def merged_section(section: CredentialSection, **flags: Path | bool | list[str] | None) -> CredentialSection:
    """The section of the file with the flags that were given in its place; paths become absolute."""
    given = {
        name: os.path.abspath(value) if isinstance(value, Path) else value
        for name, value in flags.items()
        if value is not None and value != []
    }
    return msgspec.structs.replace(section, **given)


def credential_options(settings: Settings, section: CredentialSection) -> CredentialOptions:
    """What `open_credentials` is told. Raises `KubeApiFailed` for pull secrets outside of a pod."""
    options = CredentialOptions(
        socket=settings.run_dir / CREDENTIALS_SOCKET,
        cri_socket=Path(section.cri_listen) if section.cri_listen else None,
        containerd=Path(section.containerd),
        kubelet_config=Path(section.provider_config) if section.provider_config else None,
        kube_access=_access(section) if section.pull_secrets else None,
        namespaces=tuple(section.pull_secret_namespaces),
    )
    if section.provider_bin_dir:
        options = replace(options, kubelet_plugin_dir=Path(section.provider_bin_dir))
    return options


def _access(section: CredentialSection) -> KubeAccess:
    url = section.kube_api or KubeAccess.in_cluster().url
    return KubeAccess(url, Path(section.service_account_dir or ACCOUNT_DIR))
