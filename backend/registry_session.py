"""Requests to one registry: its scheme, its authorization and its redirects.

Concurrency: one session serves many tasks; each call to `send` belongs to one.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from urllib.parse import urljoin

import trio

from backend.address import split_address
from backend.auth import Authenticator
from backend.challenge import pull_scope
from backend.credentials import CredentialSource
from backend.http import HttpClient, HttpRequest, HttpResponse, RegistryProtocolError
from backend.origin import RegistryOrigin, api_host, api_repository, origin_of
from backend.reference import RegistryReference

_MOST_REDIRECTS = 5
_MOST_RENEWALS = 6  # a chain of credentials may have several that the registry refuses
_REDIRECTS = (301, 302, 303, 307, 308)


class RegistrySession:
    """Sends authorized requests for one repository.

    Credentials go to the registry's own origin and to the token server that it names, nowhere else.
    """

    def __init__(
        self,
        http: HttpClient,
        reference: RegistryReference,
        credentials: CredentialSource,
        plain_http: bool | None,
    ) -> None:
        self._http = http
        self.host = reference.host
        self.repository = api_repository(reference.host, reference.repository)
        self._origin = RegistryOrigin(http, reference.host, plain_http)
        self._auth = Authenticator(
            http, reference.host, self.repository, credentials, self._origin.check, trio.current_time
        )

    def __repr__(self) -> str:
        return f"<RegistrySession {api_host(self.host)}/{self.repository}>"

    async def url(self, path: str) -> str:
        """The address of `path` under the repository, for instance "manifests/v1"."""
        return f"{await self._origin.base_url()}/v2/{self.repository}/{path}"

    async def is_own(self, url: str) -> bool:
        """Whether `url` is at the registry's own origin: the only place that sees its credentials."""
        return origin_of(url) == origin_of(await self._origin.base_url())

    @asynccontextmanager
    async def send(
        self,
        method: str,
        url: str,
        *,
        scopes: Sequence[str] = (),
        headers: Sequence[tuple[str, str]] = (),
        body: bytes | memoryview = b"",
    ) -> AsyncIterator[HttpResponse]:
        """The answer to a request, after redirects and after a challenge was met.

        `url` is absolute; `scopes` defaults to reading the repository. Any status may come out.
        Raises `Unauthorized` when the challenge cannot be met, and what `HttpClient.exchange` raises.
        """
        scopes = scopes or (pull_scope(self.repository),)
        redirects = renewals = 0
        while True:
            self._origin.check(url)
            own = await self.is_own(url)
            authorization = await self._auth.header(scopes) if own else None
            sent = [*headers, ("Authorization", authorization)] if authorization else headers
            async with self._http.exchange(HttpRequest(method, url, sent, body)) as response:
                if response.status == 401 and own and renewals < _MOST_RENEWALS:
                    await response.drain()
                    await self._auth.answer(response.headers("WWW-Authenticate"), scopes, authorization)
                    renewals += 1
                elif response.status in _REDIRECTS and (target := response.header("Location")):
                    redirects += 1
                    url = await self._redirected(method, response, target, redirects)
                else:
                    yield response
                    return

    async def _redirected(self, method: str, response: HttpResponse, target: str, count: int) -> str:
        if count > _MOST_REDIRECTS:
            raise RegistryProtocolError(
                where=response.where, why=f"redirected more than {_MOST_REDIRECTS} times"
            )
        if method not in ("GET", "HEAD") and response.status not in (307, 308):
            raise RegistryProtocolError(
                where=response.where, why=f"redirected a {method} with {response.status}"
            )
        url = absolute_location(response, target)
        await response.drain()
        return url


def absolute_location(response: HttpResponse, location: str) -> str:
    """`location` relative to the address that answered; `RegistryProtocolError` unless it is http(s)."""
    try:
        url = urljoin(response.url, location)
    except ValueError:
        url = ""
    parts = split_address(url)
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise RegistryProtocolError(
            where=response.where, why="names a location that is no http or https address"
        )
    return url
