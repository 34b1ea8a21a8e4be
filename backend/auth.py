"""Authorization headers for one registry: basic, and bearer tokens per scope.

Concurrency: one `Authenticator` serves many tasks. Each scope has a slot with a lock: of the tasks
that were refused together one asks for a token and the others take its result, good or bad. A
cancelled asker hands the lock, and with it the asking, to the next one.
"""

import math
from collections.abc import Callable, Sequence
from urllib.parse import urlencode, urlunsplit

import msgspec
import trio

from backend.challenge import Challenge, merge_scopes, parse_challenges
from backend.contract import BackendError
from backend.credentials import Credential, CredentialSource, RenewingSource
from backend.http import HttpClient, HttpRequest, HttpResponse, RegistryProtocolError
from backend.origin import require_address
from backend.status import Forbidden, Unauthorized, raise_for_status

_CLIENT_ID = "nydus-py"
_TOKEN_LIMIT_BYTES = 256 * 1024
_DEFAULT_LIFE_S = 60.0  # https://distribution.github.io/distribution/spec/auth/token/, expires_in
_LONGEST_EARLY_S = 10.0
_MOST_CREDENTIALS = 6
"""How many credentials of a source that has several are tried at a token server."""


class _TokenAnswer(msgspec.Struct):
    token: str | None = None
    access_token: str | None = None
    expires_in: float | None = None


class _Slot:
    """What is known for one set of scopes."""

    __slots__ = ("challenge", "credential", "error", "failures", "header", "lock", "renew_at")

    def __init__(self) -> None:
        self.lock = trio.Lock()
        self.header: str | None = None
        self.renew_at = math.inf
        self.challenge: tuple[Challenge, ...] = ()
        self.credential: Credential | None = None
        self.failures = 0
        self.error: BackendError | None = None


class Authenticator:
    """Answers the challenges of one registry for one repository.

    `check_url` raises when a token server's address must not be spoken to.
    """

    def __init__(
        self,
        http: HttpClient,
        host: str,
        repository: str,
        credentials: CredentialSource,
        check_url: Callable[[str], None],
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self._http = http
        self._host = host
        self._repository = repository
        self._credentials = credentials
        self._check_url = check_url
        self._clock = clock
        self._slots: dict[tuple[str, ...], _Slot] = {}

    def __repr__(self) -> str:
        return f"<Authenticator {self._host} {len(self._slots)} scopes>"

    async def header(self, scopes: Sequence[str]) -> str | None:
        """The Authorization header to send, renewed when about to expire; None before the first challenge."""
        slot = self._slot(scopes)
        if slot.header is not None and self._clock() >= slot.renew_at:
            return await self._renewed(slot, scopes, slot.header)
        return slot.header

    async def answer(self, challenges: Sequence[str], scopes: Sequence[str], refused: str | None) -> str:
        """A header for these WWW-Authenticate values; `refused` is the one that was answered with 401.

        Raises `Unauthorized` when there is none or it would be the same again, `RegistryProtocolError`
        for a challenge nobody knows, and whatever asking a token server or a helper can raise.
        """
        slot = self._slot(scopes)
        slot.challenge = parse_challenges(challenges)
        header = await self._renewed(slot, scopes, refused)
        if header == refused:
            raise self._unauthorized("the registry refused the credentials")
        return header

    def _slot(self, scopes: Sequence[str]) -> _Slot:
        return self._slots.setdefault(merge_scopes(*scopes), _Slot())

    async def _renewed(self, slot: _Slot, scopes: Sequence[str], old: str | None) -> str:
        failures = slot.failures
        async with slot.lock:
            if slot.header is not None and slot.header != old:
                return slot.header  # another task was faster
            if slot.failures != failures and slot.error is not None:
                raise type(slot.error)(**slot.error.fields) from slot.error
            try:
                await self._fill(slot, scopes, old)
            except BackendError as error:
                slot.failures += 1
                slot.error = error
                raise
            assert slot.header is not None
            return slot.header

    async def _fill(self, slot: _Slot, scopes: Sequence[str], old: str | None) -> None:
        refused = _shown(slot.credential, old)
        slot.credential = await self._credential(refused)
        if refused is not None and slot.credential is None:
            raise self._unauthorized("the registry refused all stored credentials")
        for challenge in sorted(slot.challenge, key=lambda each: each.scheme != "bearer"):
            if challenge.scheme == "bearer" and challenge.realm:
                await self._fill_bearer(slot, challenge, scopes)
                return
            if challenge.scheme == "basic":
                if slot.credential is None or not slot.credential.username:
                    raise self._unauthorized("it wants a user name and a password, and none is stored")
                slot.header, slot.renew_at = slot.credential.basic(), math.inf
                return
        raise RegistryProtocolError(where=self._host, why="answered 401 without a challenge that can be met")

    async def _credential(self, refused: Credential | None) -> Credential | None:
        """What the source has; another than `refused` where it can be told."""
        if refused is not None and isinstance(self._credentials, RenewingSource):
            return await self._credentials.renewed(self._host, self._repository, refused)
        return await self._credentials.lookup(self._host, self._repository)

    async def _fill_bearer(self, slot: _Slot, challenge: Challenge, scopes: Sequence[str]) -> None:
        """Asks for a token, with one credential after the other while the token server refuses them."""
        for _ in range(_MOST_CREDENTIALS):
            try:
                slot.header, slot.renew_at = await self._bearer(challenge, scopes, slot.credential)
                return
            except Unauthorized:
                refused = slot.credential
                if refused is None or not isinstance(self._credentials, RenewingSource):
                    raise
                slot.credential = await self._credential(refused)
                if slot.credential in (None, refused):
                    raise
        raise self._unauthorized(f"{_MOST_CREDENTIALS} stored credentials were refused")

    async def _bearer(
        self, challenge: Challenge, scopes: Sequence[str], credential: Credential | None
    ) -> tuple[str, float]:
        if credential is not None and credential.registry_token:
            return f"Bearer {credential.registry_token}", math.inf
        asked_at = self._clock()
        answer = await self._ask(challenge, merge_scopes(challenge.scope, *scopes), credential)
        token = answer.token or answer.access_token
        if not token or not token.isascii() or not token.isprintable():
            raise RegistryProtocolError(
                where=self._host, why="its token server answered without a usable token"
            )
        life_s = answer.expires_in if answer.expires_in and answer.expires_in > 0 else _DEFAULT_LIFE_S
        return f"Bearer {token}", asked_at + life_s - min(_LONGEST_EARLY_S, life_s / 4)

    async def _ask(
        self, challenge: Challenge, scopes: Sequence[str], credential: Credential | None
    ) -> _TokenAnswer:
        request = _token_request(challenge, scopes, credential, self._host)
        self._check_url(request.url)
        async with self._http.exchange(request) as response:
            return await self._token_answer(response, credential)

    async def _token_answer(self, response: HttpResponse, credential: Credential | None) -> _TokenAnswer:
        if response.status in (400, 401):
            await response.drain()
            why = "the stored credentials were refused" if credential else "a login is needed"
            raise self._unauthorized(f"{why} by {response.where}")
        if response.status == 403:
            raise Forbidden(where=f"{self._host}/{self._repository}", why=f" (said by {response.where})")
        await raise_for_status(response, 200, host=self._host)
        try:
            return msgspec.json.decode(await response.read(_TOKEN_LIMIT_BYTES), type=_TokenAnswer)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise RegistryProtocolError(where=response.where, why="a token answer that is not JSON") from None

    def _unauthorized(self, why: str) -> Unauthorized:
        return Unauthorized(where=f"{self._host}/{self._repository}", host=self._host, why=why)


def _shown(credential: Credential | None, header: str | None) -> Credential | None:
    """The credential, if `header` shows it itself: then who refused the header has refused it."""
    if credential is None or header is None:
        return None
    shows = header in (credential.basic(), f"Bearer {credential.registry_token}")
    return credential if shows else None


def _token_request(
    challenge: Challenge, scopes: Sequence[str], credential: Credential | None, host: str
) -> HttpRequest:
    """OAuth2 POST for an identity token, GET for a password or nothing (docker's token specification).

    Raises `RegistryProtocolError` when the realm that `host` named is no address.
    """
    parts = require_address(challenge.realm, host)
    if credential is not None and credential.identity_token:
        form = {
            "grant_type": "refresh_token",
            "refresh_token": credential.identity_token,
            "service": challenge.service,
            "client_id": _CLIENT_ID,
            "scope": " ".join(scopes),
        }
        headers = [("Content-Type", "application/x-www-form-urlencoded")]
        return HttpRequest("POST", challenge.realm, headers, urlencode(form).encode())
    query = [("service", challenge.service)] if challenge.service else []
    query += [("scope", scope) for scope in scopes]
    headers = []
    if credential is not None and credential.username:
        query.append(("account", credential.username))
        headers.append(("Authorization", credential.basic()))
    joined = "&".join(filter(None, (parts.query, urlencode(query))))
    return HttpRequest("GET", urlunsplit(parts._replace(query=joined, fragment="")), headers)
