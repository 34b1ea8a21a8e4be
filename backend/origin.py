"""Which scheme a registry is spoken to with: TLS everywhere, plain HTTP where it cannot be overheard."""

import ipaddress
from typing import ClassVar
from urllib.parse import SplitResult

import trio

from backend.address import split_address
from backend.contract import BackendError
from backend.http import HttpClient, HttpRequest, RegistryProtocolError, TlsFailed

_HANDSHAKE_S = 3.0  # a plain HTTP server may wait for the rest of what it takes for a request line
_DEFAULT_PORTS = {"http": 80, "https": 443}
HUB_HOST = "docker.io"
HUB_ALIASES = frozenset({HUB_HOST, "index.docker.io", "registry-1.docker.io"})
_HUB_API_HOST = "registry-1.docker.io"


class PlainHttpRefused(BackendError):
    """Something asked for plain HTTP to another machine."""

    message = "{where}: plain HTTP to another machine is refused; allow it with --plain-http"
    exit_code: ClassVar[int] = 44


def is_loopback(host: str) -> bool:
    """Whether `host` (with or without port, IPv6 in brackets) can only be this machine."""
    parts = split_address(f"//{host}")
    name = (parts and parts.hostname) or ""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def require_address(url: str, where: str) -> SplitResult:
    """The parts of an address that `where` named; raises `RegistryProtocolError` for what is none.

    The address stays out of the message: it may carry a signature.
    """
    parts = split_address(url)
    if parts is None:
        raise RegistryProtocolError(where=where, why="names an address that cannot be read")
    return parts


def origin_of(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of `url`: what credentials are bound to. Raises `RegistryProtocolError`."""
    parts = require_address(url, "the registry")
    return parts.scheme, parts.hostname or "", parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)


def api_host(host: str) -> str:
    """The host that answers the registry API for `host`; they differ for Docker Hub alone."""
    return _HUB_API_HOST if host in HUB_ALIASES else host


def api_repository(host: str, repository: str) -> str:
    """The repository's name in the API: Docker Hub keeps its official images under "library/"."""
    return f"library/{repository}" if host in HUB_ALIASES and "/" not in repository else repository


class RegistryOrigin:
    """The base address of one registry, found at first use and remembered.

    Concurrency: tasks that come while it is being found wait for the same answer.
    """

    def __init__(self, http: HttpClient, host: str, plain_http: bool | None) -> None:
        self._http = http
        self._host = api_host(host)
        self._plain_http = plain_http
        self._lock = trio.Lock()
        self._base_url = "" if self._must_look() else self._url("http" if plain_http else "https")

    def _must_look(self) -> bool:
        return self._plain_http is None and is_loopback(self._host)

    def _url(self, scheme: str) -> str:
        return f"{scheme}://{self._host}"

    async def base_url(self) -> str:
        """`https://HOST[:PORT]` or `http://...`, without a slash at the end. Raises `BackendError`."""
        if not self._base_url:
            async with self._lock:
                if not self._base_url:
                    self._base_url = await self._look()
        return self._base_url

    def check(self, url: str) -> None:
        """Raises `PlainHttpRefused` when `url` is plain HTTP to another machine and nobody allowed it, and
        `RegistryProtocolError` when it is no address.
        """
        parts = require_address(url, self._host)
        if parts.scheme == "http" and not self._plain_http and not is_loopback(parts.netloc):
            raise PlainHttpRefused(where=parts.netloc.rpartition("@")[2])

    async def _look(self) -> str:
        try:
            return await self._answers("https")
        except TlsFailed as error:
            if error.untrusted:
                raise
        except BackendError:
            pass  # a plain server hangs up at a handshake or waits; whether it is down, the next call tells
        return await self._answers("http")

    async def _answers(self, scheme: str) -> str:
        url = self._url(scheme)
        # A deadline of httpx's own: cancelling a handshake from outside would leave its socket open.
        request = HttpRequest("GET", f"{url}/v2/", connect_s=_HANDSHAKE_S)
        async with self._http.exchange(request) as response:
            await response.drain()
        return url
