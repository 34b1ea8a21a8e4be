"""All sources of registry credentials of a host together, and the socket at which agents ask for them.

The order is fixed: what came with the CRI image request, pull secrets of the cluster, the kubelet's
credential provider plugins, and last the files and helpers of docker and podman. What the registry refuses is
passed over, and the next one is asked (backend/credential_chain.py).

Concurrency: `open_credentials` owns one task for the socket and one for the pull secrets; the CRI proxy has
threads of its own.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import trio

from backend.credential_chain import CandidateSource, CredentialChain, LookedUp
from backend.credential_service import credential_routes
from backend.credentials import AuthFiles
from backend.json_api import serve_api
from backend.kube_api import KubeAccess
from backend.kubelet_providers import KubeletProviders
from backend.pull_secrets import PullSecrets
from fuse.snapshotter.cri_auths import CriAuths
from fuse.snapshotter.cri_proxy import start_cri_proxy
from fuse.supervisor.listener import is_served, listen
from rafs.errors import NydusError

PROXY_GRACE_S = 2.0


class CredentialsTaken(NydusError):
    """Two snapshotters on one host would answer for each other."""

    message = "{path}: another process answers for credentials here; is a snapshotter running already?"
    exit_code: ClassVar[int] = 218


@dataclass(frozen=True, slots=True)
class CredentialOptions:
    """Which sources there are beside the auth files. `socket` is where agents ask.

    `cri_socket`: the kubelet's requests come here, and go on to `containerd`. `kubelet_config` names plugins
    in `kubelet_plugin_dir`. `kube_access`: pull secrets of `namespaces`, or of all.
    """

    socket: Path
    cri_socket: Path | None = None
    containerd: Path = Path("/run/containerd/containerd.sock")
    kubelet_config: Path | None = None
    kubelet_plugin_dir: Path = Path("/usr/libexec/kubernetes/kubelet-plugins/credential-provider/exec")
    kube_access: KubeAccess | None = None
    namespaces: tuple[str, ...] = ()


@asynccontextmanager
async def open_credentials(options: CredentialOptions) -> AsyncIterator[CredentialChain]:
    """The chain of all sources, which agents can ask while the block runs.

    Raises `CredentialsTaken` and `CannotProxy`.
    """
    if is_served(options.socket):
        raise CredentialsTaken(path=options.socket)
    auths, sources = CriAuths(), list[CandidateSource]()
    async with trio.open_nursery() as nursery:
        if options.cri_socket is not None:
            sources.append(auths)
        if options.kube_access is not None:
            secrets = PullSecrets(options.kube_access, options.namespaces)
            nursery.start_soon(secrets.run)
            sources.append(secrets)
        if options.kubelet_config is not None:
            sources.append(KubeletProviders(options.kubelet_config, options.kubelet_plugin_dir))
        sources.append(LookedUp("auth files", AuthFiles()))
        chain = CredentialChain(sources)
        nursery.start_soon(serve_api, listen(options.socket), credential_routes(chain))
        try:
            async with _cri_proxy(options, auths):
                yield chain
        finally:
            options.socket.unlink(missing_ok=True)
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def _cri_proxy(options: CredentialOptions, auths: CriAuths) -> AsyncIterator[None]:
    if options.cri_socket is None:
        yield
        return
    proxy = start_cri_proxy(options.cri_socket, options.containerd, auths)
    try:
        yield
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(proxy.stop, PROXY_GRACE_S)
