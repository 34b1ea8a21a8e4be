"""Lists and watches objects of the Kubernetes API with the service account of this pod.

https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes

Concurrency: a `KubeApi` is used by one task for each list and watch; it keeps nothing.
"""

import os
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar
from urllib.parse import urlencode

import msgspec
import trio

from backend.contract import BackendError
from backend.http import HttpClient, HttpOptions, HttpRequest, HttpResponse, HttpTimeouts

ACCOUNT_DIR = Path("/var/run/secrets/kubernetes.io/serviceaccount")
WATCH_S = 290
"""The server ends a watch by itself after this."""
PAGE_ITEMS = 50
LIST_MAX_BYTES = 512 << 20
EVENT_MAX_BYTES = 8 << 20
"""A secret has 1 MiB at most, and base64 makes it longer."""
_TOKEN_MAX_BYTES = 64 << 10

T = TypeVar("T")


class KubeApiFailed(BackendError):
    """The Kubernetes API does not give what was asked."""

    message = "Kubernetes API {where}: {why}"
    exit_code: ClassVar[int] = 195
    retryable = True


class WatchExpired(BackendError):
    """The API server has forgotten the version to watch from (410): everything is to be listed again."""

    message = "Kubernetes API {where}: the watch has expired"
    exit_code: ClassVar[int] = 196
    retryable = True


class _ListMeta(msgspec.Struct, rename="camel"):
    resource_version: str = ""
    continue_: str = msgspec.field(default="", name="continue")


class _List(msgspec.Struct):
    items: list[msgspec.Raw]
    metadata: _ListMeta = msgspec.field(default_factory=_ListMeta)


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Status(msgspec.Struct):
    code: int = 0
    message: str = ""


class _Versioned(msgspec.Struct):
    metadata: _ListMeta = msgspec.field(default_factory=_ListMeta)


@dataclass(frozen=True, slots=True)
class KubeAccess:
    """Where the API server is, and the directory with `token` and `ca.crt`, which both rotate."""

    url: str
    account_dir: Path = ACCOUNT_DIR

    @classmethod
    def in_cluster(cls, environment: Mapping[str, str] | None = None) -> "KubeAccess":
        """As every pod is told. Raises `KubeApiFailed` outside of one."""
        environment = os.environ if environment is None else environment
        host, port = (environment.get(f"KUBERNETES_SERVICE_{name}") for name in ("HOST", "PORT"))
        if not host or not port:
            raise KubeApiFailed(
                where="of this pod", why="KUBERNETES_SERVICE_HOST is not set; is this no pod?"
            )
        return cls(f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}")


class KubeApi:
    """See above. Get one from `open_kube_api`."""

    def __init__(self, access: KubeAccess, http: HttpClient) -> None:
        self._access = access
        self._http = http

    async def list(self, target: str, selector: str, keep: Callable[[bytes], None]) -> str:
        """Gives each object of `target` to `keep` as JSON; the version to watch from.

        `selector` is a field selector. Raises `KubeApiFailed`, `WatchExpired`, and what HTTP raises.
        """
        query = {"fieldSelector": selector, "limit": str(PAGE_ITEMS)}
        while True:
            async with self._get(target, query) as response:
                page = _decode(await response.read(LIST_MAX_BYTES), _List, target)
            for item in page.items:
                keep(bytes(item))
            if not page.metadata.continue_:
                return page.metadata.resource_version
            query["continue"] = page.metadata.continue_

    async def watch(
        self, target: str, selector: str, version: str, changed: Callable[[str, bytes], None]
    ) -> str:
        """Gives each change (ADDED, MODIFIED or DELETED, and the object) to `changed` until the server ends.

        Returns the version to go on from. Raises as `list`.
        """
        query = {
            "fieldSelector": selector,
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(WATCH_S),
        }
        lines = _Lines(target)

        def sink(piece: bytes) -> bool:
            nonlocal version
            for line in lines.feed(piece):
                event = _decode(line, _Event, target)
                if event.type == "ERROR":
                    raise _failure(_decode(bytes(event.object), _Status, target), target)
                if event.type != "BOOKMARK":
                    changed(event.type, bytes(event.object))
                version = _decode(bytes(event.object), _Versioned, target).metadata.resource_version
            return True

        async with self._get(target, query) as response:
            await response.consume(sink)
        return version

    @asynccontextmanager
    async def _get(self, target: str, query: Mapping[str, str]) -> AsyncIterator[HttpResponse]:
        # Read each time: the kubelet writes a new one before the old one expires.
        token = await trio.to_thread.run_sync(_read_token, self._access.account_dir / "token")
        url = f"{self._access.url}{target}?{urlencode(query)}"
        headers = [("Authorization", f"Bearer {token}"), ("Accept", "application/json")]
        async with self._http.exchange(HttpRequest("GET", url, headers)) as response:
            if response.status != 200:
                raise await _refusal(response, target)
            yield response


@asynccontextmanager
async def open_kube_api(access: KubeAccess) -> AsyncIterator[KubeApi]:
    """Connections that trust the cluster's authority alone, as it is now. Raises `KubeApiFailed`."""
    context = None
    if access.url.startswith("https:"):
        authority = access.account_dir / "ca.crt"
        try:
            context = await trio.to_thread.run_sync(lambda: ssl.create_default_context(cafile=authority))
        except (OSError, ssl.SSLError) as error:
            raise KubeApiFailed(where=authority, why=f"not a usable authority ({error.strerror})") from error
    timeouts = HttpTimeouts(read_s=WATCH_S + 30.0)
    async with HttpClient(HttpOptions(timeouts=timeouts, connections=8, ssl_context=context)) as http:
        yield KubeApi(access, http)


class _Lines:
    """Cuts a stream into lines of bounded length."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._rest = bytearray()

    def feed(self, piece: bytes) -> list[bytes]:
        self._rest += piece
        if b"\n" not in piece:
            if len(self._rest) > EVENT_MAX_BYTES:
                raise KubeApiFailed(
                    where=self._target, why=f"sent an event of more than {EVENT_MAX_BYTES} bytes"
                )
            return []
        *lines, rest = bytes(self._rest).split(b"\n")
        self._rest = bytearray(rest)
        return [line for line in lines if line.strip()]


async def _refusal(response: HttpResponse, target: str) -> BackendError:
    try:
        status = msgspec.json.decode(await response.read(64 << 10), type=_Status)
    except (BackendError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        status = _Status()
    return _failure(_Status(response.status, status.message), target)


def _failure(status: _Status, target: str) -> BackendError:
    if status.code == 410:
        return WatchExpired(where=target)
    words = "".join(sign if sign.isprintable() else " " for sign in status.message)[:200]
    return KubeApiFailed(where=target, why=f"status {status.code}{f' ({words})' if words else ''}")


def _decode(data: bytes, form: type[T], target: str) -> T:
    try:
        return msgspec.json.decode(data, type=form)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise KubeApiFailed(where=target, why="sent something that is not the JSON expected") from None


def _read_token(path: Path) -> str:
    try:
        with path.open("rb") as file:
            token = file.read(_TOKEN_MAX_BYTES).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise KubeApiFailed(where=path, why="the service account's token cannot be read") from error
    if not token.isprintable() or not token:
        raise KubeApiFailed(where=path, why="no token in it")
    return token
