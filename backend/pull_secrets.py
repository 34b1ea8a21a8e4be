"""Credentials from the pull secrets of a Kubernetes cluster, kept in memory and up to date.

Every secret of the types `kubernetes.io/dockerconfigjson` and `kubernetes.io/dockercfg` that the service
account may see is used for the images that its keys cover, whatever namespace asks: who may pull an image was
decided by the kubelet before, and here only its chunks are fetched.

Concurrency: `run` has one task for each type and namespace, which alone changes the secrets of that kind.
Whoever wants fresh ones has them list again and waits for the end of that.
"""

import base64
import binascii
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import trio

from backend.credential_helper import CredentialsUnusable
from backend.credentials import Credential, decode_auths
from backend.image_pattern import covering
from backend.kube_api import KubeAccess, KubeApi, WatchExpired, open_kube_api
from rafs.errors import NydusError

log = logging.getLogger(__name__)

TYPES = {"kubernetes.io/dockerconfigjson": ".dockerconfigjson", "kubernetes.io/dockercfg": ".dockercfg"}
"""Type of a secret and the key of its text (k8s.io/api/core/v1, SecretTypeDockerConfigJson, ...Dockercfg)."""
FIRST_LIST_S = 10.0
FRESH_PAUSE_S = 5.0
"""Refused credentials make the secrets be listed again, but not more often than this."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 60.0


class _Meta(msgspec.Struct):
    name: str
    namespace: str = ""


class _Secret(msgspec.Struct):
    metadata: _Meta
    data: dict[str, str] | None = None

    def __repr__(self) -> str:
        return f"_Secret({self.metadata!r}, ...)"


@dataclass(slots=True)
class _Kind:
    """One list that is watched."""

    type: str
    namespace: str
    secrets: dict[tuple[str, str], dict[str, Credential]] = field(default_factory=dict, repr=False)
    listed: trio.Event = field(default_factory=trio.Event)
    """Set when a list has ended, well or not."""
    idle: trio.CancelScope | None = None
    """Around watching and pausing: cancelled, the secrets are listed at once."""

    @property
    def target(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}/secrets" if self.namespace else "/api/v1/secrets"


class PullSecrets:
    """A `CandidateSource`. `run` has to run; `candidates` waits for its first list, for a while."""

    name = "pull secrets"

    def __init__(self, access: KubeAccess, namespaces: Sequence[str] = ()) -> None:
        """`namespaces`: only those; all if empty, which wants a ClusterRole."""
        self._access = access
        self._kinds = [_Kind(type_, namespace) for namespace in namespaces or ("",) for type_ in TYPES]
        self._fresh_at = -FRESH_PAUSE_S

    def __repr__(self) -> str:
        return f"<PullSecrets {sum(len(kind.secrets) for kind in self._kinds)} secrets>"

    async def run(self) -> None:
        """Lists and watches until cancelled; whatever fails is tried again."""
        async with trio.open_nursery() as nursery:
            for kind in self._kinds:
                nursery.start_soon(self._follow, kind)

    async def candidates(self, host: str, repository: str, *, fresh: bool) -> Sequence[Credential]:
        """See `CandidateSource`. Never raises: without the API server, what was known last is used."""
        with trio.move_on_after(FIRST_LIST_S):
            if fresh:
                self._list_again()
            for kind in self._kinds:
                await kind.listed.wait()
        secrets = {key: auths for kind in self._kinds for key, auths in kind.secrets.items()}
        found: list[tuple[str, Credential]] = []
        for key in sorted(secrets):
            found += covering(secrets[key], host, repository)
        # The most specific key first; then by namespace and name, so that every host does the same.
        found.sort(key=lambda each: each[0].count("/"), reverse=True)
        return list(dict.fromkeys(credential for _, credential in found))

    def _list_again(self) -> None:
        now = trio.current_time()
        if now < self._fresh_at + FRESH_PAUSE_S:
            return
        self._fresh_at = now
        for kind in self._kinds:
            if kind.idle is not None:
                kind.listed = trio.Event()
                kind.idle.cancel()

    async def _follow(self, kind: _Kind) -> None:
        pause_s = FIRST_PAUSE_S
        told = ""
        while True:
            failure: NydusError | None = None
            try:
                # Opened anew for each list: the authority rotates, too.
                async with open_kube_api(self._access) as api:
                    version = await self._list(kind, api)
                    pause_s, told = FIRST_PAUSE_S, ""
                    await self._watch(kind, api, version)
            except WatchExpired:
                await trio.sleep(FIRST_PAUSE_S)  # a server may say so at once, again and again
                continue
            except NydusError as error:
                failure = error
                kind.listed.set()
            if failure is None:
                continue
            if told != str(failure):
                told = str(failure)
                log.warning("pull secrets: %s; those known before stay in use", failure)
            with trio.move_on_after(pause_s) as kind.idle:
                await trio.sleep_forever()
            kind.idle = None
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    async def _list(self, kind: _Kind, api: KubeApi) -> str:
        secrets: dict[tuple[str, str], dict[str, Credential]] = {}

        def keep(data: bytes) -> None:
            _put(secrets, kind.type, data)

        version = await api.list(kind.target, f"type={kind.type}", keep)
        kind.secrets = secrets
        kind.listed.set()
        return version

    async def _watch(self, kind: _Kind, api: KubeApi, version: str) -> None:
        """Returns when the secrets are to be listed again."""

        def change(what: str, data: bytes) -> None:
            if what == "DELETED":
                kind.secrets.pop(_key(_decode(data)), None)
            else:
                _put(kind.secrets, kind.type, data)

        try:
            with trio.CancelScope() as kind.idle:
                while True:
                    version = await api.watch(kind.target, f"type={kind.type}", version, change)
                    await trio.sleep(FIRST_PAUSE_S)  # a server may end it at once, again and again
        finally:
            kind.idle = None


def _put(secrets: dict[tuple[str, str], dict[str, Credential]], type_: str, data: bytes) -> None:
    """Takes a secret over; one that cannot be read hides none of the others."""
    secret = _decode(data)
    key = _key(secret)
    text = (secret.data or {}).get(TYPES[type_], "")
    try:
        secrets[key] = decode_auths(
            base64.b64decode(text, validate=True),
            f"secret {'/'.join(key)}",
            is_legacy=TYPES[type_] == ".dockercfg",
        )
    except (CredentialsUnusable, binascii.Error, ValueError) as error:
        secrets.pop(key, None)
        why = error if isinstance(error, CredentialsUnusable) else "its data is not base64"
        log.info("pull secret %s is left out: %s", "/".join(key), why)


def _decode(data: bytes) -> _Secret:
    try:
        return msgspec.json.decode(data, type=_Secret)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise CredentialsUnusable(where="Kubernetes API", why="a secret that is not JSON") from None


def _key(secret: _Secret) -> tuple[str, str]:
    return secret.metadata.namespace, secret.metadata.name
